"""The measurements themselves, each over one open model: perplexity, speed, answers. All numbers are JSON-safe."""

from __future__ import annotations

import hashlib
import math
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.chat.templates import FALLBACK_STOP
from modules.errors import GenerationFailed, IncompatibleModel, InvalidParameter
from modules.evaluate.plan import DEFAULT_CONTEXT
from modules.evaluate.windows import Tally, Window, counted, cut, safe_exp
from modules.schema import features_of

if TYPE_CHECKING:
    from modules.chat.templates import TemplateRenderer
    from modules.evaluate.plan import Plan, QuestionPlan, SpeedPlan
    from modules.evaluate.subject import Subject
    from modules.evaluate.texts import Text

OnStep = Callable[[float, str], Awaitable[None]]
"""Called with (fraction of this measurement, words): the place to save and to show."""


# --- perplexity ----------------------------------------------------------------------------------------------------


@dataclass
class PartScore:
    """A perplexity in the making: the NLL sum and the token count of each window done. `to_dict` is what is stored."""

    settings: dict[str, Any]
    tally: Tally = field(default_factory=lambda: Tally([], []))
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "sums": self.tally.sums, "counts": self.tally.counts, "seconds": self.seconds}

    @classmethod
    def resume(cls, stored: dict[str, Any] | None, settings: dict[str, Any]) -> PartScore:
        """Go on with what is stored when it is of the very same measurement, else start."""
        if stored is None or stored.get("settings") != settings:
            return cls(settings)
        return cls(settings, Tally(list(stored["sums"]), list(stored["counts"])), stored["seconds"])


async def perplexity(
    subject: Subject,
    text: Text,
    plan: Plan,
    on_step: OnStep,
    part: Callable[[PartScore], None],
    stored: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Token and word perplexity of one text.

    `part` gets the state after each window, to be kept for a resumed run. Raises InvalidParameter for a text that is too
    short and GenerationFailed for numbers that are not finite.
    """  # fmt: skip
    spec = subject.client.spec
    if "score" not in features_of(spec, subject.info):
        raise IncompatibleModel(
            f"{spec.title} can't score text, which perplexity needs.", hint="Load the model through another backend."
        )
    await on_step(0.0, "reading the text")
    ids = await subject.client.encode(text.content, plan.windows == "papers")
    context = context_of(subject, plan)
    counted_ids = len(ids)
    if plan.windows == "rolling":
        ids = [await first_id(subject), *ids]
    windows = cut(len(ids), context, plan.stride, plan.windows)
    most = min(n for n in (plan.max_windows or len(windows), text.max_windows or len(windows), len(windows)) if n)
    settings = {
        "context": context,
        "stride": plan.stride or context,
        "windows": plan.windows,
        "count": most,
        "ids_sha256": ids_hash(ids),
    }
    score = PartScore.resume(stored, settings)
    for window in windows[len(score.tally.sums) : most]:
        started = time.perf_counter()
        try:
            score.tally.add(await _score(subject, ids, window))
        except ValueError as error:
            raise GenerationFailed(
                f"{subject.model.id} gave numbers that are not finite on {text.name}.",
                hint="Load it in another number format, or check the checkpoint.",
            ) from error
        score.seconds += time.perf_counter() - started
        subject.look_at_memory()
        part(score)
        done = len(score.tally.sums)
        await on_step(done / most, f"window {done} of {most}, perplexity {score.tally.perplexity():.3f}")
    return _result(score, text, counted_ids, most, len(windows))


async def _score(subject: Subject, ids: Sequence[int], window: Window) -> Sequence[float]:
    return counted(await subject.client.score(ids[window.start : window.end]), window)


def _result(score: PartScore, text: Text, all_tokens: int, used: int, windows: int) -> dict[str, Any]:
    """Words and bytes are those of the counted share of the text: its tokens over all."""
    tally, settings = score.tally, score.settings
    share = min(1.0, tally.tokens / all_tokens)
    words, size = text.words * share, text.size * share
    return settings | {
        "perplexity": _finite(tally.perplexity()),
        "error": _finite(tally.perplexity_error()),
        "word_perplexity": _finite(safe_exp(tally.nll / words)) if words else None,
        "bits_per_byte": tally.nll / math.log(2) / size if size else None,
        "nll": tally.nll,
        "tokens": tally.tokens,
        "all_tokens": all_tokens,
        "words": round(words),
        "count": used,
        "of_windows": windows,
        "seconds": round(score.seconds, 3),
        "tok_s": round(tally.tokens / score.seconds, 1) if score.seconds else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def context_of(subject: Subject, plan: Plan) -> int:
    """The window length: what was asked for, else 2048 or what the model holds. Raises InvalidParameter when it is too long."""
    holds = subject.info.context_length
    if plan.context and holds and plan.context > holds:
        raise InvalidParameter(
            f"{subject.model.id} holds {holds} tokens; the windows have {plan.context}.",
            hint=f"Use --context {holds}, or load the model with a larger context.",
            param="context",
        )
    return plan.context or min(DEFAULT_CONTEXT, holds or DEFAULT_CONTEXT)


async def first_id(subject: Subject) -> int:
    """What stands before a text: BOS, or EOS where the model has no BOS."""
    if subject.info.bos_token:
        ids = await subject.client.encode(subject.info.bos_token, False)
        if len(ids) == 1:
            return ids[0]
    if subject.info.eos_token_ids:
        return subject.info.eos_token_ids[0]
    raise IncompatibleModel(f"{subject.model.id} has neither BOS nor EOS.", hint="Use --windows papers.")


def ids_hash(ids: Sequence[int]) -> str:
    """Tells whether two backends read a text as the same tokens."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()[:16]


# --- speed ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over the repetitions (sample), and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 3), "sd": round(deviation, 3), "n": len(values)}


async def speed(subject: Subject, text: str, plan: SpeedPlan, on_step: OnStep) -> dict[str, Any]:
    """Prefill and decode rates by number of beams, in tok/s. Each repetition has a prompt of its own: no prefix is reused.

    Beams: tokens of the answer over the time of the whole search, as the study counts, since the prefill is part of it.
    """
    holds = subject.info.context_length or 1 << 20
    length = max(1, min(plan.prompt_tokens, holds - plan.new_tokens - 1))
    tokens = min(plan.new_tokens, holds - 2)
    prompts = _prompts(await subject.client.encode(text, False), length, plan.repetitions + 1)
    found: dict[str, Any] = {"prompt_tokens": length, "new_tokens": tokens, "beams": {}}
    steps = len(plan.beams) * (plan.repetitions + 1)
    for index, beams in enumerate(plan.beams):
        if beams > 1 and "num_beams" not in subject.client.spec.samplers:
            found["beams"][str(beams)] = {"reason": f"{subject.client.spec.title} has no beam search."}
            continue
        sampling = {"temperature": 0.0} | ({"num_beams": beams} if beams > 1 else {})
        prefill: list[float] = []
        decode: list[float] = []
        for repetition, prompt in enumerate(prompts):  # the first is the warm-up
            await on_step((index * (plan.repetitions + 1) + repetition) / steps, f"{beams} beam{'s' if beams > 1 else ''}")
            ids, _, done = await subject.generate(token_ids=prompt, max_tokens=tokens, sampling=sampling, ignore_eos=True)
            subject.look_at_memory()
            if repetition == 0:
                continue
            rate = done.timings.prefill_rate(done.usage)
            prefill += [rate] if rate else []
            rate = done.timings.decode_rate(done.usage) if beams == 1 else len(ids) / max(done.timings.decode_s, 1e-9)
            decode += [rate] if rate else []
        entry: dict[str, Any] = {}
        if prefill:
            entry["prefill_tok_s"] = spread(prefill)
        if decode:
            entry["decode_tok_s"] = spread(decode)
        found["beams"][str(beams)] = entry or {"reason": "It wrote too few tokens to be timed."}
    return found


def _prompts(ids: Sequence[int], length: int, count: int) -> list[tuple[int, ...]]:
    """`count` prompts that begin differently, out of a text that may be too short for all of them."""
    if not ids:
        raise InvalidParameter("The prompt has no tokens.", param="prompt")
    needed = length + count * 7
    many = list(ids) * (needed // len(ids) + 1)
    return [tuple(many[shift * 7 : shift * 7 + length]) for shift in range(count)]


# --- answers -------------------------------------------------------------------------------------------------------


async def answers(subject: Subject, plan: QuestionPlan, templates: TemplateRenderer, on_step: OnStep) -> list[dict[str, Any]]:
    """Each question's greedy answer: its text, its tokens' ids and pieces, and how it ended."""
    found = []
    info = subject.info
    for index, question in enumerate(plan.questions):
        await on_step(index / len(plan.questions), f"question {index + 1} of {len(plan.questions)}")
        messages = [{"role": "system", "content": plan.system}] if plan.system else []
        messages.append({"role": "user", "content": question})
        prompt = await templates.render(info.chat_template, messages, True, info.bos_token, info.eos_token)
        stop = () if info.chat_template else FALLBACK_STOP
        ids, text, done = await subject.generate(prompt=prompt, max_tokens=plan.max_tokens, stop=stop, add_special=False)
        subject.look_at_memory()
        found.append(
            {
                "question": question,
                "text": text.strip(),
                "ids": ids,
                "pieces": [await subject.client.decode([token], False) for token in ids],
                "finish_reason": done.finish_reason,
                "prompt_tokens": done.usage.prompt_tokens,
                "decode_tok_s": _finite(done.timings.decode_rate(done.usage)),
            }
        )
    return found

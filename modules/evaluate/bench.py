"""The study's benchmark: one prompt, some repetitions after a warm-up, tokens per second with their deviation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules.errors import BackendUnavailable, UnsupportedParameter
from modules.evaluate.measure import spread
from modules.hardware import detect

if TYPE_CHECKING:
    from modules.evaluate.subject import Subject
    from modules.schema import LoaderSpec

DEVICES = ("auto", "cpu", "cuda", "metal")
PROMPT = "Explain in a few sentences how a railway switch guides a train from one track to another."
OnStep = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """`warmup` answers are written and not counted."""

    prompt: str = PROMPT
    max_tokens: int = 100
    repetitions: int = 10
    num_beams: int = 1
    warmup: int = 1


def device_options(spec: LoaderSpec, device: str) -> dict[str, Any]:
    """A backend's load options for a device. Raises BackendUnavailable where there is no such device."""
    if device == "auto":
        return {}
    if device == "cpu":
        if "cpu" not in spec.devices:
            raise BackendUnavailable(f"{spec.title} does not run on a CPU.", hint="Use --device cuda.")
        if spec.option("cpu"):
            return {"cpu": True}
        return {"gpu_layers": 0} if spec.option("gpu_layers") else {}
    kinds = {"cuda": ("nvidia", "amd"), "metal": ("apple",)}[device]
    found = detect()
    name = {"metal": ("metal", "mps")}.get(device, (device,))
    if found.kind not in kinds:
        raise BackendUnavailable(f"There is no {device} device here ({found.name}).", hint="Use --device cpu.")
    if not set(name) & set(spec.devices):
        raise BackendUnavailable(f"{spec.title} does not run on {device}.", hint=f"It runs on {', '.join(spec.devices)}.")
    return {}


async def bench(subject: Subject, plan: BenchPlan, on_step: OnStep) -> dict[str, Any]:
    """Rates over the repetitions, in tok/s: `tok_s` is the answer's tokens over the whole time, as the study counts.

    Between two repetitions another prompt takes the place of the prefix cache, so that each one pays its own prefill.
    """
    spec = subject.client.spec
    if plan.num_beams > 1 and "num_beams" not in spec.samplers:
        raise UnsupportedParameter(f"{spec.title} has no beam search.", hint="Use --num-beams 1.", param="num_beams")
    sampling: dict[str, Any] = {"temperature": 0.0} | ({"num_beams": plan.num_beams} if plan.num_beams > 1 else {})
    prompt = tuple(await subject.client.encode(plan.prompt, True))
    other = (prompt[0] + 1 if prompt and prompt[0] + 1 < subject.info.vocab_size else 0,)
    rates: dict[str, list[float]] = {"tok_s": [], "decode_tok_s": [], "prefill_tok_s": [], "ttft_ms": []}
    tokens, text = 0, ""
    for repetition in range(-plan.warmup, plan.repetitions):
        words = "warm-up" if repetition < 0 else f"repetition {repetition + 1} of {plan.repetitions}"
        await on_step(words)
        await subject.generate(token_ids=other, max_tokens=1, ignore_eos=True)
        ids, text, done = await subject.generate(
            token_ids=prompt or None,
            prompt=None if prompt else "",
            max_tokens=plan.max_tokens,
            sampling=sampling,
            ignore_eos=True,
        )
        subject.look_at_memory()
        tokens = len(ids)
        if repetition < 0:
            continue
        total = done.timings.prefill_s + done.timings.decode_s
        rates["tok_s"].append(tokens / max(total, 1e-9))
        for name, rate in (
            ("decode_tok_s", done.timings.decode_rate(done.usage) if plan.num_beams == 1 else None),
            ("prefill_tok_s", done.timings.prefill_rate(done.usage)),
            ("ttft_ms", done.timings.prefill_s * 1000 or None),
        ):
            if rate is not None:
                rates[name].append(rate)
    return {
        "num_beams": plan.num_beams,
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "repetitions": plan.repetitions,
        **{name: spread(values) for name, values in rates.items() if values},
        "text": text,
        "load_s": round(subject.load_s, 3),
        "peak_memory_bytes": subject.peak_memory(),
        "peak_device_bytes": subject.peak_device_memory(),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """One line per model, backend and number of beams."""
    lines = [
        "| Model | Backend | Device | Beams | tok/s | Decode, tok/s | Prefill, tok/s | TTFT, ms | Memory, MB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        memory = row.get("peak_device_bytes") or row.get("peak_memory_bytes")
        cells = [row["model"], row["loader_title"], row["device"], str(row["num_beams"])]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            cells += [_spread(row.get(name)) for name in ("tok_s", "decode_tok_s", "prefill_tok_s", "ttft_ms")]
            cells.append(f"{memory / 1e6:,.0f}" if memory else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.2f} ± {value['sd']:.2f}"

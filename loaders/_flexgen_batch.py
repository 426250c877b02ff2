"""Requests into FlexGen's blocks and tokens back to their requests.

A block is a fixed set of sequences that start together; requests that come while one runs wait for the next. The worker steps
every request's iterator in turn; whichever has nothing to give drives the block one step, and every row of it gets its token.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders._logits import guidance_of, negative_ids
from loaders._process import peak_memory
from modules.assemble import TokenAssembler
from modules.detokenize import WindowDetokenizer
from modules.errors import (
    AppError,
    ContextLengthExceeded,
    GenerateOutOfMemory,
    GenerationFailed,
    InvalidParameter,
    is_out_of_memory,
)
from modules.grammar import Grammars
from modules.sampler_math import guided
from modules.samplers import SamplerChain, SequenceBreakers, token_logprob
from modules.schema import Done, Event, GenerationRequest, ModelInfo, PrefillProgress, Timings, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from loaders._flexgen_model import FlexModel
    from loaders._hf_text import TextCodec
    from modules.engine import CancelToken

# A block starts when no further request has come for this long: one chat hardly waits, a burst of many gathers.
GATHER_ONE_S = 0.01
GATHER_MANY_S = 0.05
_SCORE_ROWS = 256  # logits of this many positions at a time
_SHORTER = "Shorten the prompt."


class _Row:
    """One request in, or waiting for, a block."""

    def __init__(self, request: GenerationRequest, cancel: CancelToken, ids: list[int], assembler: TokenAssembler) -> None:
        self.request, self.cancel, self.ids, self.assembler = request, cancel, ids, assembler
        self.chain: SamplerChain | None = None
        self.ignored: dict[str, str] = {}
        self.guided: dict[str, Any] = {}  # guidance's parameters, for the receipt
        self.negative: list[int] = []  # the negative prompt: a second sequence beside the first
        self.events: deque[Event] = deque()
        self.failure: Exception | None = None
        self.left = False
        self.started = self.first = self.last = 0.0

    @property
    def over(self) -> bool:
        return self.left or self.failure is not None or self.assembler.finish_reason is not None

    @property
    def takes_largest(self) -> bool:
        """Whether the largest logit is all there is to its next token."""
        chain = self.chain
        plain = self.request.logprobs is None and not self.negative
        return chain is not None and chain.is_argmax and plain and self.assembler.may_end

    def done(self, peak: int | None) -> Done:
        assembler, now = self.assembler, time.perf_counter()
        assert assembler.finish_reason is not None and self.chain is not None
        first = self.first or now
        return Done(
            self.request.request_id,
            assembler.finish_reason,
            Usage(len(self.ids), assembler.count),
            Timings(first - (self.started or first), max((self.last or first) - first, 0.0)),
            stop_match=assembler.stop_match,
            peak_memory_bytes=peak,
            applied=self.chain.applied | self.guided,
            ignored=self.ignored | self.chain.ignored,
            seed=self.chain.seed,
        )


# A sequence of a block: whose it is and whether it is the negative prompt's; None fills up.
Lane = tuple[_Row, bool] | None


def lanes(rows: Sequence[_Row], size: int) -> list[Lane]:
    """The sequences of these rows. Both of a guided row go into one GPU batch of `size`: they are combined there."""
    found: list[Lane] = []
    for row in rows:
        if row.negative and len(found) % size == size - 1:
            found.append(None)
        found.append((row, False))
        if row.negative:
            found.append((row, True))
    return found


class Batcher:
    """All generation on one loaded FlexModel. Not thread-safe but for `text`."""

    def __init__(self, model: FlexModel, text: TextCodec, info: ModelInfo) -> None:
        self._model, self.text, self.info = model, text, info
        self._eos_ids = frozenset(info.eos_token_ids)
        self._breakers = SequenceBreakers(info.vocab_size, text.token_text)
        self._grammars = Grammars(lambda: text.vocabulary(info.vocab_size, self._eos_ids))
        newline = text.encode("\n", add_special=False)[-1:]
        self._protected = frozenset(self._eos_ids | set(newline))
        self._waiting: list[_Row] = []
        self._block: list[_Row] = []
        self._work: Iterator[None] | None = None
        self._arrived = 0.0

    # --- one request ------------------------------------------------------------------------------------------------

    def generate(
        self, request: GenerationRequest, cancel: CancelToken, sampler: dict[str, Any], ignored: dict[str, str]
    ) -> Iterator[Event | None]:
        row = self._admit(request, cancel, sampler, ignored)
        try:
            while True:
                while row.events:
                    event = row.events.popleft()
                    yield event
                    if isinstance(event, Done):
                        return
                if row.failure is not None:
                    raise row.failure
                self._advance()
                if not row.events and row.failure is None:
                    yield None
        finally:
            row.left = True
            if row in self._waiting:
                self._waiting.remove(row)

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """The request's prompt as ids, checked against the context and the vocabulary. An empty prompt is BOS, or EOS."""
        if request.token_ids is not None:
            ids = list(request.token_ids)
            if any(not 0 <= i < self.info.vocab_size for i in ids):
                raise InvalidParameter(f"A token id is outside the vocabulary of {self.info.vocab_size}.", param="prompt")
        else:
            ids = self.text.encode(request.prompt or "", request.add_special)
        ids = ids or [self.text.bos_id if self.text.bos_id is not None else min(self._eos_ids, default=0)]
        if len(ids) >= self.info.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(ids)} tokens; this model's context holds {self.info.context_length}.", hint=_SHORTER
            )
        return ids

    def _admit(self, request: GenerationRequest, cancel: CancelToken, sampler: dict[str, Any], ignored: dict[str, str]) -> _Row:
        ids = self.prompt_ids(request)
        decode = self.text.decoder(bool(request.sampling.get("skip_special_tokens", True)))
        room = self.info.context_length - len(ids)
        constraint = self._grammars.constraint(request)
        assembler = TokenAssembler(request, WindowDetokenizer(decode, ids), self._eos_ids, room, constraint)
        row = _Row(request, cancel, ids, assembler)
        row.ignored = ignored
        row.chain = SamplerChain(
            sampler,
            ids,
            self.info.vocab_size,
            eos_ids=row.assembler.end_ids or self._eos_ids,
            breakers=self._breakers,
            protected_ids=self._protected,
            constraint=constraint,
        )
        self._guide(row, sampler)
        self._waiting.append(row)
        self._arrived = time.perf_counter()
        return row

    def _guide(self, row: _Row, sampler: dict[str, Any]) -> None:
        """Classifier-free guidance as `_hf_modes.Guidance` has it, in a second sequence of the block."""
        on = guidance_of(sampler)
        if on and self._model.plan.gpu_batch_size < 2:
            row.ignored = row.ignored | dict.fromkeys(on, "Guidance needs two sequences computed together: gpu_batch_size is 1.")
        elif on:
            row.guided = on
            row.negative = negative_ids(on, self.text.encode, row.ids, self.info.context_length, self._limit(row))

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One step of the running block, or the start of the next when it is time."""
        if self._work is None:
            self._finish_cancelled()
            if not self._waiting or not self._gathered():
                return
            self._take_block()
            self._work = self._run(self._block)
        try:
            next(self._work)
        except StopIteration:
            self._work, self._block = None, []
        except Exception as error:
            failure = self._typed(error)
            for row in self._block:
                if not row.over:
                    row.failure = failure
            self._work, self._block = None, []

    def _take_block(self) -> None:
        """As many of the waiting rows, in their order, as have room in a block."""
        plan, count = self._model.plan, 1
        while count < len(self._waiting) and len(lanes(self._waiting[: count + 1], plan.gpu_batch_size)) <= plan.slots:
            count += 1
        self._block, self._waiting = self._waiting[:count], self._waiting[count:]

    def _gathered(self) -> bool:
        if len(self._waiting) >= self._model.plan.slots:
            return True
        wait = GATHER_ONE_S if len(self._waiting) == 1 else GATHER_MANY_S
        return time.perf_counter() - self._arrived >= wait

    def _finish_cancelled(self) -> None:
        """Requests that were cancelled before their block began."""
        for row in [row for row in self._waiting if row.cancel.cancelled]:
            self._waiting.remove(row)
            self._end(row, row.assembler.cancel())

    def _run(self, rows: list[_Row]) -> Iterator[None]:
        """The block's life: prefill, then one token a step for every row that is not over."""
        for row in rows:
            row.started = time.perf_counter()
            row.events.append(PrefillProgress(row.request.request_id, 0, len(row.ids)))
            if row.request.echo:
                row.events.append(self._echo(row))
            if row.assembler.finish_reason is not None:  # no token was asked for
                self._end(row, None)
        live = [row for row in rows if not row.over]
        if not live:
            return
        room = max(self._limit(row) for row in live)
        sequences = lanes(live, self._model.plan.gpu_batch_size)
        size = min(self._model.plan.gpu_batch_size, len(sequences))
        prompts = [live[0].ids[-1:] if lane is None else lane[0].negative if lane[1] else lane[0].ids for lane in sequences]

        def pick(k: int, logits: Any) -> Sequence[int]:
            return self._pick(sequences[k * size : (k + 1) * size], logits)

        def stop() -> bool:
            for row in live:
                if row.cancel.cancelled and not row.over:
                    self._end(row, row.assembler.cancel())
            return all(row.over for row in live)

        told = time.perf_counter()
        for share in self._model.run(prompts, room, pick, stop):
            if share is None:
                yield None
            elif time.perf_counter() - told > 0.1:
                told = time.perf_counter()
                for row in live:
                    if not row.over and share < 1:
                        row.events.append(PrefillProgress(row.request.request_id, int(share * len(row.ids)), len(row.ids)))
                yield None

    def _limit(self, row: _Row) -> int:
        room = self.info.context_length - len(row.ids)
        asked = row.request.stop.max_tokens
        return room if asked is None else min(asked, room)

    def _pick(self, sequences: Sequence[Lane], logits: Any) -> Sequence[int]:
        """One token for each sequence of a GPU batch; those that are over, and those that fill it up, get token 0."""
        ids = [0] * len(logits)
        live = [(at, lane[0]) for at, lane in enumerate(sequences) if lane and not lane[1] and not lane[0].over]
        plain = all(row.takes_largest for _, row in live)
        if plain and not bool(logits.isnan().any()):
            likeliest = logits.argmax(dim=-1).tolist()
            for at, row in live:
                assert row.chain is not None
                ids[at] = likeliest[at]
                row.chain.accept(ids[at])
                self._push(row, ids[at], None)
            return ids
        values = logits.float().cpu().numpy()
        for at, row in live:
            self._sample(row, at, values, ids)
        return ids

    def _sample(self, row: _Row, at: int, values: Any, ids: list[int]) -> None:
        """A token for `row` from the logits `values` [sequences, vocab], put into `ids` at its place (and its negative's)."""
        assert row.chain is not None
        try:
            if np.isnan(values[at]).any():  # greedy would take the NaN for the largest
                raise FloatingPointError
            logits = values[at]
            if row.negative:
                logits = guided(logits, values[at + 1], row.guided["guidance_scale"])
            ids[at] = row.chain.sample(logits, ban_ends=not row.assembler.may_end)
        except FloatingPointError:
            row.failure = GenerationFailed(
                "The model gave numbers that are not finite.", hint="Load it without compression, or another copy of it."
            )
            return
        if row.negative:
            ids[at + 1] = ids[at]
        count = row.request.logprobs
        self._push(row, ids[at], None if count is None else token_logprob(logits, ids[at], count, self.text.token_text))

    def _push(self, row: _Row, token: int, entry: TokenLogprob | None) -> None:
        row.last = time.perf_counter()
        if not row.first:
            row.first = row.last
            row.events.append(PrefillProgress(row.request.request_id, len(row.ids), len(row.ids)))
        event = row.assembler.push(token, entry)
        if row.assembler.finish_reason is None:
            if event is not None:
                row.events.append(event)
        else:
            self._end(row, event)

    def _end(self, row: _Row, event: TokenEvent | None) -> None:
        if event is not None:
            row.events.append(event)
        row.events.append(row.done(self.peak_memory()))

    def _echo(self, row: _Row) -> TokenEvent:
        """The prompt's own tokens as the first event; with logprobs, each token's under those before it."""
        request, entries = row.request, ()
        if request.logprobs is not None:
            values = [0.0, *self.score(row.ids)]
            entries = tuple(TokenLogprob(i, self.text.token_text(i), v) for i, v in zip(row.ids, values, strict=True))
        text = request.prompt if request.prompt is not None else self.text.decode(row.ids)
        return TokenEvent(request.request_id, -1, tuple(row.ids), text, entries)

    # --- scoring and embedding ------------------------------------------------------------------------------------------

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first."""
        ids, scores = list(token_ids), []
        if len(ids) < 2:
            return []
        self._check_length(ids)

        def use(states: Any, embedding: Any) -> None:
            for start in range(0, len(ids) - 1, _SCORE_ROWS):
                part = states[0, start : min(start + _SCORE_ROWS, len(ids) - 1)]
                logits = (part @ embedding.T).float()
                wanted = logits.new_tensor(ids[start + 1 : start + 1 + len(part)]).long()
                scores.extend((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)).tolist())

        self._states(ids, use)
        return scores

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        """The mean of the last hidden states, scaled to length 1."""
        ids, found = list(token_ids), []
        self._check_length(ids)

        def use(states: Any, embedding: Any) -> None:
            mean = states[0].float().mean(dim=0)
            found.extend((mean / mean.norm()).tolist())

        self._states(ids, use)
        return found

    def _states(self, ids: list[int], use: Any) -> None:
        try:
            self._model.states(ids, use)
        except Exception as error:
            raise self._typed(error) from error

    def _check_length(self, ids: list[int]) -> None:
        if not 0 < len(ids) <= self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(ids)} tokens do not fit into the context of {self.info.context_length}.", hint=_SHORTER
            )

    # --- memory and errors ------------------------------------------------------------------------------------------

    def peak_memory(self) -> int | None:
        import torch

        return int(torch.cuda.max_memory_allocated()) if self._model.plan.cuda else peak_memory()

    def _typed(self, error: Exception) -> Exception:
        import torch

        text = str(error)
        if is_out_of_memory(error):
            if self._model.plan.cuda:
                torch.cuda.empty_cache()
            return GenerateOutOfMemory(
                "The memory ran out in the middle of a block.",
                hint="Lower gpu_batch_size, keep more of the cache on CPU or disk, or set a max_tokens.",
            )
        if isinstance(error, AppError):
            return error
        if isinstance(error, (OSError, EOFError)):
            return GenerationFailed(f"The weights or the cache on disk can't be read: {text}.", hint="Look at the disk.")
        import traceback

        traceback.print_exception(error)
        print("flexgen: the block was given up", file=sys.stderr)
        return GenerationFailed(f"FlexGen failed: {text[:300] or type(error).__name__}.", hint="Try again.")

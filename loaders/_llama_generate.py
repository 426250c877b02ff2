"""Runs an open llama.cpp model: prefill by batches, then decode and sample one token at a time, all through the C interface.

The KV cache stays between requests; only what a prompt does not share with the last one is computed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from loaders._llama_capi import AbortCallback, Token
from loaders._llama_guidance import guidance
from loaders._llama_sampling import NativeSampler
from loaders._llama_vision import Prompt, Span
from loaders._process import peak_memory
from modules.assemble import TokenAssembler
from modules.detokenize import ByteDetokenizer
from modules.errors import (
    ContextLengthExceeded,
    GenerateOutOfMemory,
    GenerationFailed,
    InvalidParameter,
    LoadOutOfMemory,
    UnsupportedParameter,
)
from modules.samplers import token_logprob
from modules.schema import Done, Event, GenerationRequest, PrefillProgress, Timings, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from loaders._llama_load import LlamaModel
    from modules.engine import CancelToken
    from modules.grammar import Constraint

_SHORTER = "Shorten the prompt, or load the model with a larger context (ctx_size)."
_ABORTED = 2
# Below this many new tokens a prefill is over before anybody could cancel it.
_WORTH_ABORTING = 64


class LlamaRunner:
    """All computing on one open model."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._lib = model, model.lib
        self.info = model.info
        self._memory = self._lib.llama_get_memory(model.ctx)
        self._ids: list[int] = []  # what the KV cache holds, as in Prompt.ids
        try:
            self._decode([self._first_id()])  # the first pass sets up buffers: not in the first request's time
        except GenerateOutOfMemory as error:
            raise LoadOutOfMemory("The memory is too small for this context.", hint=error.hint) from error
        self._forget()

    # --- generation -----------------------------------------------------------------------------------------

    def _prompt(self, request: GenerationRequest) -> AbstractContextManager[Prompt]:
        """The request's prompt, whose images are good inside the block."""
        if not request.images:
            return nullcontext(Prompt(self._prompt_ids(request)))
        if self._model.vision is None:
            raise UnsupportedParameter("This model reads no images.", hint=self.info.no_images, param="messages")
        if request.echo:
            raise UnsupportedParameter("A prompt with images can't be echoed.", hint="Leave echo out.", param="echo")
        return self._model.vision.read(request.prompt or "", request.images, add_special=request.add_special)

    def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        """Checked before native code sees them. An empty prompt is BOS, or EOS without one."""
        if request.token_ids is not None:
            ids = list(request.token_ids)
            if any(not 0 <= i < self._model.n_vocab for i in ids):
                raise InvalidParameter(f"A token id is outside the vocabulary of {self._model.n_vocab}.", param="prompt")
        else:
            ids = self._model.encode(request.prompt or "", request.add_special)
        return ids or [self._first_id()]

    def _check_length(self, prompt: Prompt) -> int:
        """The prompt's tokens. Raises ContextLengthExceeded."""
        length = prompt.tokens(len(prompt.ids))
        if length >= self.info.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {length} tokens; this model's context holds {self.info.context_length}.", hint=_SHORTER
            )
        if prompt.spans and prompt.spans[-1].end == len(prompt.ids):
            raise InvalidParameter("The prompt ends in an image.", hint="Put words behind it.", param="messages")
        return length

    def generate(
        self,
        request: GenerationRequest,
        cancel: CancelToken,
        grammar: str | None,
        ignored: dict[str, str],
        constraint: Constraint | None = None,
    ) -> Iterator[Event | None]:
        """`grammar` is GBNF for llama.cpp; `constraint` holds the answer to a form instead of it."""
        started = time.perf_counter()
        with self._prompt(request) as prompt:
            yield from self._generate(prompt, started, request, cancel, grammar, ignored, constraint)

    def _generate(
        self,
        prompt: Prompt,
        started: float,
        request: GenerationRequest,
        cancel: CancelToken,
        grammar: str | None,
        ignored: dict[str, str],
        constraint: Constraint | None,
    ) -> Iterator[Event | None]:
        model = self._model
        length, ids = self._check_length(prompt), prompt.words
        special = not request.sampling.get("skip_special_tokens", True)
        detokenizer = ByteDetokenizer(lambda token: model.piece(token, special))
        assembler = TokenAssembler(request, detokenizer, model.eos_ids, self.info.context_length - length, constraint)
        sampler = NativeSampler(model, request.sampling, ids, grammar=grammar, end_ids=assembler.end_ids, constraint=constraint)
        held = grammar is not None or constraint is not None
        guide, guided = None, {}
        if held and request.stop.min_tokens:
            ignored = ignored | {"min_tokens": "The grammar decides where the text may end."}
        first = last = 0.0
        try:
            guide, guided = guidance(model, request.sampling, ids, assembler.limit)
            cached = self._reuse(prompt)
            for done in self._prefill(prompt, cached, cancel):
                yield PrefillProgress(request.request_id, prompt.tokens(done), length)
            if request.echo:
                yield self._echo(request, ids)
            if guide is not None:
                guide.start(cancel)
            one, place = (Token * 1)(), (ctypes.c_int32 * 1)()
            batch = self._lib.llama_batch_get_one(one, 1)
            batch.pos = place
            decode, context, read = self._lib.llama_decode, model.ctx, self._ids
            token: int | None = None
            while assembler.finish_reason is None:
                if cancel.cancelled:
                    event = assembler.cancel()
                else:
                    row = None if request.logprobs is None else model.logits().copy()
                    token = sampler.next(not assembler.may_end)
                    if token is None:  # the grammar is at its end
                        event = assembler.cancel()
                        assembler.finish_reason = "stop"
                    else:
                        event = assembler.push(token, None if row is None else self._logprob(row, token, request.logprobs or 0))
                    last = time.perf_counter()
                    first = first or last
                if event is not None:
                    yield event
                if assembler.finish_reason is None and token is not None:
                    one[0], place[0] = token, len(read)
                    status = decode(context, batch)
                    if status:
                        self._raise_decode(status)
                    read.append(token)
                    if guide is not None:
                        guide.next(token)
        finally:
            sampler.close()
            if guide is not None:
                guide.close()
        yield Done(
            request.request_id,
            assembler.finish_reason,
            Usage(length, assembler.count, prompt.tokens(cached)),
            Timings((first or time.perf_counter()) - started, max(last - first, 0.0)),
            stop_match=assembler.stop_match,
            peak_memory_bytes=peak_memory(),
            applied=sampler.applied | guided | ({"grammar": True} if held else {}),
            ignored=ignored | sampler.ignored,
            seed=sampler.seed,
        )

    def _first_id(self) -> int:
        return self._model.bos_id if self._model.bos_id >= 0 else min(self._model.eos_ids, default=0)

    def _reuse(self, prompt: Prompt) -> int:
        """Cut the KV cache down to what it shares with `prompt` (at least the last token is left over: its logits are needed);
        the number of positions that need not be computed again. An image is shared as a whole or not at all."""
        shared, ids = 0, prompt.ids
        limit = min(len(self._ids), len(ids) - 1)
        while shared < limit and self._ids[shared] == ids[shared]:
            shared += 1
        shared = next((span.start for span in prompt.spans if span.start < shared < span.end), shared)
        if shared == 0 or (shared < len(self._ids) and not self._lib.llama_memory_seq_rm(self._memory, 0, shared, -1)):
            self._forget()  # a recurrent state can't go back
            return 0
        del self._ids[shared:]
        return shared

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self._ids.clear()

    def _prefill(self, prompt: Prompt, cached: int, cancel: CancelToken) -> Iterator[int]:
        """Positions in the cache after each batch; stops early when cancelled, in mid-batch too."""
        ids = prompt.ids
        long = bool(prompt.spans) or len(ids) - cached > _WORTH_ABORTING
        abort = AbortCallback(lambda _: cancel.cancelled) if long else None
        if abort is not None:
            self._model.set_abort(abort)
        try:
            images = {span.start: span for span in prompt.spans if span.start >= cached}
            stops = sorted({*images, len(ids)})
            while len(self._ids) < len(ids) and not cancel.cancelled:
                start = len(self._ids)
                if start in images:
                    self._see(images[start], ids, cancel)
                else:
                    stop = next(place for place in stops if place > start)
                    self._decode(ids[start : min(stop, start + self._model.n_batch)], aborting=cancel)
                yield len(self._ids)
        finally:
            if abort is not None:
                self._model.set_abort(None)

    def _see(self, span: Span, ids: Sequence[int], cancel: CancelToken) -> None:
        """Put an image into the cache. A cancelled one leaves nothing of itself there."""
        vision = self._model.vision
        assert vision is not None
        vectors = vision.encode(span)
        if cancel.cancelled:
            return
        status = vision.decode(span, vectors)
        if not status:
            self._ids.extend(ids[span.start : span.end])
        elif status != _ABORTED or not cancel.cancelled:
            self._raise_decode(status)
        elif not self._lib.llama_memory_seq_rm(self._memory, 0, span.start, -1):
            self._forget()

    def _decode(self, ids: Sequence[int], aborting: CancelToken | None = None) -> None:
        """Run these tokens after those in the cache; logits of the last one."""
        tokens = (Token * len(ids))(*ids)
        first = len(self._ids)
        places = (ctypes.c_int32 * len(ids))(*range(first, first + len(ids)))  # behind an image llama.cpp would count otherwise
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        batch.pos = places
        status = self._lib.llama_decode(self._model.ctx, batch)
        if status == _ABORTED and aborting is not None and aborting.cancelled:
            kept = int(self._lib.llama_memory_seq_pos_max(self._memory, 0)) + 1 - len(self._ids)
            self._ids.extend(ids[: max(kept, 0)])
        elif status:
            self._raise_decode(status)
        else:
            self._ids.extend(ids)

    def _raise_decode(self, status: int) -> NoReturn:
        self._forget()
        if status == -2:
            raise GenerateOutOfMemory("llama.cpp ran out of memory.", hint="Load the model with a smaller context or batch.")
        if status == 1:
            raise GenerationFailed("llama.cpp found no room in its KV cache.", hint="Load the model with a larger context.")
        raise GenerationFailed(f"llama.cpp could not compute (code {status}): {self._model.log.last()}.", hint="Try again.")

    def _logprob(self, row: Any, token: int, count: int) -> TokenLogprob:
        return token_logprob(row, token, count, self.token_text)

    def token_text(self, token_id: int) -> str:
        return self._model.piece(token_id, special=True).decode("utf-8", "replace")

    def _echo(self, request: GenerationRequest, ids: list[int]) -> TokenEvent:
        """The prompt's own tokens as the first event; with logprobs they are computed once more, in full."""
        entries: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            values = [0.0, *self.score(ids)]
            entries = tuple(TokenLogprob(i, self.token_text(i), v) for i, v in zip(ids, values, strict=True))
            # Scoring stops before the last token, whose logits the first answer token needs.
            self._decode(ids[-1:])
        text = request.prompt if request.prompt is not None else self._model.decode(ids)
        return TokenEvent(request.request_id, -1, tuple(ids), text, entries)

    # --- scoring --------------------------------------------------------------------------------------------

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first."""
        import numpy as np

        if len(token_ids) > self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(token_ids)} tokens do not fit into the context of {self.info.context_length}.", hint=_SHORTER
            )
        ids = list(token_ids)
        self._forget()
        scores: list[float] = []
        for start in range(0, max(len(ids) - 1, 0), self._model.n_batch):
            chunk = ids[start : min(start + self._model.n_batch, len(ids) - 1)]
            self._decode_with_all_logits(chunk)
            for index in range(len(chunk)):
                row = self._model.logits(index).astype(np.float64)
                top = row.max()
                scores.append(float(row[ids[start + index + 1]] - top - np.log(np.exp(row - top).sum())))
        return scores

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        """The mean of the last hidden states, scaled to length 1."""
        import numpy as np

        if not 0 < len(token_ids) <= self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(token_ids)} tokens do not fit into the context of {self.info.context_length}.", hint=_SHORTER
            )
        model, lib = self._model, self._lib
        width = model.n_embd
        total = np.zeros(width)
        self._forget()
        lib.llama_set_embeddings(model.ctx, True)
        try:
            for start in range(0, len(token_ids), model.n_batch):
                chunk = list(token_ids[start : start + model.n_batch])
                self._decode_with_all_logits(chunk)
                for index in range(len(chunk)):
                    state = lib.llama_get_embeddings_ith(model.ctx, index)
                    if not state:
                        raise UnsupportedParameter("This model gives no hidden states.", hint="Use the Transformers backend.")
                    total += np.ctypeslib.as_array(state, (width,))
        finally:
            lib.llama_set_embeddings(model.ctx, False)
            self._forget()
        length = float(np.linalg.norm(total))
        return list((total / length if length else total).tolist())

    def _decode_with_all_logits(self, ids: Sequence[int]) -> None:
        tokens = (Token * len(ids))(*ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        wanted = (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
        batch.logits = wanted
        status = self._lib.llama_decode(self._model.ctx, batch)
        if status:
            self._raise_decode(status)
        self._ids.extend(ids)

"""Runs an open llama.cpp model: prefill by batches, then decode and sample one token at a time, all through the C interface.

The KV cache stays between requests; only what a prompt does not share with the last one is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from loaders._llama_capi import AbortCallback, Token
from loaders._llama_guidance import guidance
from loaders._llama_sampling import NativeSampler
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
        self._ids: list[int] = []  # what the KV cache holds
        try:
            self._decode([self._first_id()])  # the first pass sets up buffers: not in the first request's time
        except GenerateOutOfMemory as error:
            raise LoadOutOfMemory("The memory is too small for this context.", hint=error.hint) from error
        self._forget()

    # --- generation -----------------------------------------------------------------------------------------

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """The request's prompt as ids, checked before native code sees them. An empty prompt is BOS, or EOS without one."""
        if request.token_ids is not None:
            ids = list(request.token_ids)
            if any(not 0 <= i < self._model.n_vocab for i in ids):
                raise InvalidParameter(f"A token id is outside the vocabulary of {self._model.n_vocab}.", param="prompt")
        else:
            ids = self._model.encode(request.prompt or "", request.add_special)
        ids = ids or [self._first_id()]
        if len(ids) >= self.info.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(ids)} tokens; this model's context holds {self.info.context_length}.", hint=_SHORTER
            )
        return ids

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
        model = self._model
        ids = self.prompt_ids(request)
        special = not request.sampling.get("skip_special_tokens", True)
        detokenizer = ByteDetokenizer(lambda token: model.piece(token, special))
        assembler = TokenAssembler(request, detokenizer, model.eos_ids, self.info.context_length - len(ids), constraint)
        sampler = NativeSampler(model, request.sampling, ids, grammar=grammar, end_ids=assembler.end_ids, constraint=constraint)
        held = grammar is not None or constraint is not None
        guide, guided = None, {}
        if held and request.stop.min_tokens:
            ignored = ignored | {"min_tokens": "The grammar decides where the text may end."}
        first = last = 0.0
        try:
            guide, guided = guidance(model, request.sampling, ids, assembler.limit)
            cached = self._reuse(ids)
            for done in self._prefill(ids, cached, cancel):
                yield PrefillProgress(request.request_id, done, len(ids))
            if request.echo:
                yield self._echo(request, ids)
            if guide is not None:
                guide.start(cancel)
            one = (Token * 1)()
            batch = self._lib.llama_batch_get_one(one, 1)
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
                    one[0] = token
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
            Usage(len(ids), assembler.count, cached),
            Timings((first or time.perf_counter()) - started, max(last - first, 0.0)),
            stop_match=assembler.stop_match,
            peak_memory_bytes=peak_memory(),
            applied=sampler.applied | guided | ({"grammar": True} if held else {}),
            ignored=ignored | sampler.ignored,
            seed=sampler.seed,
        )

    def _first_id(self) -> int:
        return self._model.bos_id if self._model.bos_id >= 0 else min(self._model.eos_ids, default=0)

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the KV cache down to what it shares with `prompt` (at least the last token is left over: its logits are needed);
        the number of tokens that need not be computed again."""
        shared = 0
        limit = min(len(self._ids), len(prompt) - 1)
        while shared < limit and self._ids[shared] == prompt[shared]:
            shared += 1
        if shared == 0 or (shared < len(self._ids) and not self._lib.llama_memory_seq_rm(self._memory, 0, shared, -1)):
            self._forget()  # a recurrent state can't go back
            return 0
        del self._ids[shared:]
        return shared

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self._ids.clear()

    def _prefill(self, ids: list[int], cached: int, cancel: CancelToken) -> Iterator[int]:
        """Tokens in the cache after each batch; stops early when cancelled, in mid-batch too."""
        abort = AbortCallback(lambda _: cancel.cancelled) if len(ids) - cached > _WORTH_ABORTING else None
        if abort is not None:
            self._model.set_abort(abort)
        try:
            for start in range(cached, len(ids), self._model.n_batch):
                if cancel.cancelled:
                    return
                self._decode(ids[start : start + self._model.n_batch], aborting=cancel)
                yield len(self._ids)
        finally:
            if abort is not None:
                self._model.set_abort(None)

    def _decode(self, ids: Sequence[int], aborting: CancelToken | None = None) -> None:
        """Run these tokens after those in the cache; logits of the last one."""
        tokens = (Token * len(ids))(*ids)
        status = self._lib.llama_decode(self._model.ctx, self._lib.llama_batch_get_one(tokens, len(ids)))
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
        import ctypes

        tokens = (Token * len(ids))(*ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        wanted = (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
        batch.logits = wanted
        status = self._lib.llama_decode(self._model.ctx, batch)
        if status:
            self._raise_decode(status)
        self._ids.extend(ids)

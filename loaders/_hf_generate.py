"""Runs a loaded transformers model: prefill in chunks, one token at a time, with the KV cache kept between requests."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from loaders import _hf_compat, _process
from loaders._hf_contrast import ContrastiveSearch, settings
from loaders._hf_modes import Guidance, PromptLookup
from loaders._hf_prefix import PrefixCache
from loaders._logits import guidance_of, negative_ids
from modules import sampling as table
from modules.assemble import TokenAssembler
from modules.detokenize import WindowDetokenizer
from modules.errors import (
    ContextLengthExceeded,
    GenerateOutOfMemory,
    GenerationFailed,
    InvalidParameter,
    LoadOutOfMemory,
    is_out_of_memory,
)
from modules.grammar import Constraint, Grammars
from modules.samplers import SamplerChain, SequenceBreakers, token_logprob
from modules.schema import Done, Event, GenerationRequest, PrefillProgress, Timings, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from loaders._hf_load import Loaded
    from loaders._hf_vision import Seen
    from modules.engine import CancelToken

MODES = frozenset({"guidance_scale", "negative_prompt", "prompt_lookup_num_tokens"})
_SHORTER = "Shorten the prompt, or load the model with a larger context."
Mode = Guidance | PromptLookup | ContrastiveSearch


class HfRunner:
    """All computing on one loaded model. Not thread-safe but for `text`."""

    def __init__(self, loaded: Loaded, prefill_chunk: int) -> None:
        import torch

        from loaders._wide_products import Products

        self._torch = torch
        self.model = loaded.model
        self.device = loaded.input_device
        self._on_cpu = loaded.input_device.type == "cpu"
        self.products = Products(loaded.info)
        self.products.lay_out(loaded.model)
        self.text = loaded.text
        self.info = loaded.info
        self._vision = loaded.vision
        self._images = ""  # which images the prefix holds
        self._eos_ids = loaded.eos_ids
        self.chunk = prefill_chunk
        self._prefix: Any = self._new_prefix()
        # Some models of transformers 4 compute every position's logits; what is not asked for is left aside.
        forward = getattr(loaded.model, "forward", None)
        self._keeps = forward is not None and "logits_to_keep" in inspect.signature(forward).parameters
        self._breakers = SequenceBreakers(self.info.vocab_size, self.text.token_text)
        self._grammars = Grammars(lambda: self.text.vocabulary(self.info.vocab_size, loaded.eos_ids))
        newline = self.text.encode("\n", add_special=False)[-1:]
        self._protected = frozenset(loaded.eos_ids | set(newline))
        try:
            self._step(self._prompt_of_one(), 1)  # the first pass sets up kernels: not in the first request's time
        except Exception as error:
            if is_out_of_memory(error):
                raise LoadOutOfMemory("The memory is too small to run this model.", hint="Choose a smaller one.") from error
            raise
        self._prefix.reset()

    def _new_prefix(self) -> Any:
        """What remembers the text that has been read; other runners have other kinds."""
        return PrefixCache(self.model)

    def _prompt_of_one(self) -> list[int]:
        return [self.text.bos_id if self.text.bos_id is not None else min(self._eos_ids, default=0)]

    # --- generation -----------------------------------------------------------------------------------------

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """The request's prompt as ids, checked against the context and the vocabulary. An empty prompt is BOS, or EOS."""
        return self._inputs(request)[0]

    def _inputs(self, request: GenerationRequest) -> tuple[list[int], Seen | None]:
        """(the prompt's ids, its images as the model takes them)."""
        seen = None
        if request.images and self._vision is not None:
            seen = self._vision.read(request.prompt or "", request.images, add_special=request.add_special)
            ids = seen.ids
        elif request.token_ids is not None:
            ids = list(request.token_ids)
            if any(not 0 <= i < self.info.vocab_size for i in ids):
                raise InvalidParameter(f"A token id is outside the vocabulary of {self.info.vocab_size}.", param="prompt")
        else:
            ids = self.text.encode(request.prompt or "", request.add_special)
        ids = ids or self._prompt_of_one()
        if len(ids) >= self.info.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(ids)} tokens; this model's context holds {self.info.context_length}.", hint=_SHORTER
            )
        return ids, seen

    def generate(
        self, request: GenerationRequest, cancel: CancelToken, sampler: dict[str, Any], ignored: dict[str, str]
    ) -> Iterator[Event | None]:
        started = time.perf_counter()
        ids, seen = self._inputs(request)
        constraint = self._grammars.constraint(request)
        assembler = self.assembler(request, ids, constraint)
        contrast, parameters, lost = settings(sampler, images=seen is not None)
        chain = self._chain(parameters, ids, assembler, constraint)
        mode: Mode | None = ContrastiveSearch(self, *contrast) if contrast else None
        cached = self._reuse(ids, seen) if mode is None else 0
        ignored = ignored | lost
        first = last = 0.0
        try:
            logits = None
            for read, rows in self._read(mode, ids, cached, cancel, seen):
                logits = rows
                yield PrefillProgress(request.request_id, read, len(ids))
            if logits is not None and bool(logits.isnan().any()):  # greedy would take the NaN for the largest
                raise FloatingPointError
            if request.echo:
                yield self._echo(request, ids)
            if logits is not None and mode is None:
                mode, ignored = self._mode(sampler, ids, assembler.limit, ignored)
                logits = logits if mode is None else mode.start(logits)
            while assembler.finish_reason is None:
                if cancel.cancelled or logits is None:
                    event = assembler.cancel()
                else:
                    token, entry = self._pick(chain, logits, request.logprobs, not assembler.may_end, mode)
                    event = assembler.push(token, entry)
                    last = time.perf_counter()
                    first = first or last
                if event is not None:
                    yield event
                if assembler.finish_reason is None:
                    logits = self._step([token], 1) if mode is None else mode.next(token)
            if mode is not None:
                mode.close()
        except GeneratorExit:
            if mode is not None:
                self._prefix.reset()
            raise
        except Exception as error:
            self._prefix.reset()  # the cache may hold half a step
            self.raise_typed(error)
        done = self._done(request, assembler, ids, cached, (started, first or time.perf_counter(), last), chain, ignored)
        yield self._with_mode(done, contrast, sampler)

    def _chain(
        self, parameters: dict[str, Any], ids: list[int], assembler: TokenAssembler, constraint: Constraint | None
    ) -> SamplerChain:
        return SamplerChain(
            parameters,
            ids,
            self.info.vocab_size,
            eos_ids=assembler.end_ids or self._eos_ids,
            breakers=self._breakers,
            protected_ids=self._protected,
            constraint=constraint,
        )

    def _with_mode(self, done: Done, contrast: tuple[float, int] | None, sampler: dict[str, Any]) -> Done:
        """The receipt with the parameters of the way to decode."""
        applied = dict(done.applied)
        if contrast:
            applied.pop("temperature", None)
            applied |= {"penalty_alpha": contrast[0], "top_k": contrast[1]}
        else:
            applied |= {name: sampler[name] for name in MODES & table.active(sampler).keys() - done.ignored.keys()}
        return replace(done, applied=applied)

    def _reuse(self, ids: list[int], seen: Seen | None) -> int:
        """Cut the prefix cache down to what it shares with this prompt. The same marks may stand for other images, and a
        prompt with new images is read in one piece."""
        key = seen.key if seen is not None else ""
        if key != self._images:
            self._prefix.reset()
            self._images = key
            for part in (self.model, getattr(self.model, "model", None)):
                if hasattr(part, "rope_deltas"):  # where text goes on after images: a memory of the model's own
                    part.rope_deltas = None
        cached = int(self._prefix.reuse(ids))
        if seen is not None and cached < seen.end:
            self._prefix.reset()
            return 0
        return cached

    def _read(
        self, mode: Mode | None, ids: list[int], cached: int, cancel: CancelToken, seen: Seen | None
    ) -> Iterator[tuple[int, Any]]:
        if isinstance(mode, ContrastiveSearch):
            yield from mode.prefill(ids, self.chunk, cancel)
            return
        if seen is not None and cached == 0 and not cancel.cancelled:
            yield len(ids), self.forward(self._prefix, ids, 1, seen.tensors)
            return
        yield from self._prefill(ids, cached, cancel)

    def _mode(
        self, sampler: dict[str, Any], ids: list[int], answer: int, ignored: dict[str, str]
    ) -> tuple[Mode | None, dict[str, str]]:
        """The way to decode that these parameters ask for, and what is ignored with it. `answer` is its longest length."""
        on = table.active(sampler)
        if guidance := guidance_of(sampler):
            negative = negative_ids(guidance, self.text.encode, ids, self.info.context_length, answer)
            if "prompt_lookup_num_tokens" in on:
                ignored = ignored | {"prompt_lookup_num_tokens": "Guidance computes every token by itself."}
            return Guidance(self, negative, on["guidance_scale"], self._new_prefix()), ignored
        if "prompt_lookup_num_tokens" in on:
            if not self._prefix.can_cut():
                return None, ignored | {"prompt_lookup_num_tokens": "This model's cache can't drop a wrong draft."}
            room = self.info.context_length - len(ids)
            return PromptLookup(self, ids, on["prompt_lookup_num_tokens"], room), ignored
        return None, ignored

    def assembler(self, request: GenerationRequest, ids: list[int], constraint: Constraint | None = None) -> TokenAssembler:
        decode = self.text.decoder(bool(request.sampling.get("skip_special_tokens", True)))
        room = self.info.context_length - len(ids)
        return TokenAssembler(request, WindowDetokenizer(decode, ids), self._eos_ids, room, constraint)

    def _prefill(self, ids: list[int], cached: int, cancel: CancelToken) -> Iterator[tuple[int, Any]]:
        """(tokens in the cache, logits of the last of them) after each chunk; stops early when cancelled."""
        position = cached
        while position < len(ids) and not cancel.cancelled:
            chunk = ids[position : position + self.chunk]
            logits = self._step(chunk, 1)
            position += len(chunk)
            yield position, logits if position == len(ids) else None

    def _step(self, ids: list[int], keep: int) -> Any:
        """`forward` with the cache kept between requests."""
        return self.forward(self._prefix, ids, keep)

    @property
    def prefix(self) -> PrefixCache:
        return self._prefix

    def forward(self, prefix: PrefixCache, ids: list[int], keep: int, images: dict[str, Any] | None = None) -> Any:
        """One forward pass over the next `ids`; the logits of the last `keep` positions: [vocab] for 1, else [keep, vocab].
        `images` are the tensors of those that `ids` has marks for."""
        if prefix.cache is None:
            prefix.reset()
        logits = self.run_model([ids], prefix.cache, keep, images)[0]
        prefix.ids.extend(ids)
        return logits[-1] if keep == 1 else logits[-keep:]

    def run_model(self, rows: list[list[int]], cache: Any, keep: int, images: dict[str, Any] | None = None) -> Any:
        """Logits [rows, at least `keep`, vocab] of the last positions of `rows` of equal length, which follow `cache`."""
        torch = self._torch
        with torch.inference_mode(), self.products(len(rows) * len(rows[0])):
            tokens = torch.tensor(rows) if self._on_cpu else torch.tensor(rows, device=self.device)
            more: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
            for name, value in (images or {}).items():
                more[name] = value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **more).logits

    def _pick(
        self, chain: SamplerChain, logits: Any, logprobs: int | None, ban_ends: bool, mode: Mode | None
    ) -> tuple[int, TokenLogprob | None]:
        search = mode if isinstance(mode, ContrastiveSearch) else None
        if chain.is_argmax and logprobs is None and not ban_ends and search is None:
            token = int(logits.argmax())
            chain.accept(token)
            return token, None
        row = logits.float().cpu().numpy()
        # A row of the model's padding beyond the tokenizer's vocabulary stays: its logits are trained down.
        token = chain.sample(row, ban_ends=ban_ends) if search is None else search.pick(chain, row, ban_ends)
        return token, None if logprobs is None else token_logprob(row, token, logprobs, self.text.token_text)

    def _echo(self, request: GenerationRequest, ids: list[int]) -> TokenEvent:
        """The prompt's own tokens as the first event; with logprobs, each token's under those before it."""
        entries: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            values = [0.0, *self._score_beside(ids)]
            entries = tuple(TokenLogprob(i, self.text.token_text(i), v) for i, v in zip(ids, values, strict=True))
        text = request.prompt if request.prompt is not None else self.text.decode(ids)
        return TokenEvent(request.request_id, -1, tuple(ids), text, entries)

    def _done(
        self,
        request: GenerationRequest,
        assembler: TokenAssembler,
        ids: list[int],
        cached: int,
        times: tuple[float, float, float],
        chain: SamplerChain,
        ignored: dict[str, str],
    ) -> Done:
        started, first, last = times
        assert assembler.finish_reason is not None
        return Done(
            request.request_id,
            assembler.finish_reason,
            Usage(len(ids), assembler.count, cached),
            Timings(first - started, max(last - first, 0.0)),
            stop_match=assembler.stop_match,
            peak_memory_bytes=self.peak_memory(),
            applied=chain.applied,
            ignored=ignored | chain.ignored,
            seed=chain.seed,
        )

    # --- scoring and embedding ------------------------------------------------------------------------------

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first. Takes the place of the prefix cache."""
        if len(token_ids) > self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(token_ids)} tokens do not fit into the context of {self.info.context_length}.", hint=_SHORTER
            )
        ids = list(token_ids)
        self._prefix.reset()
        scores: list[float] = []
        try:
            for start in range(0, max(len(ids) - 1, 0), self.chunk):
                chunk = ids[start : min(start + self.chunk, len(ids) - 1)]
                rows = self._step(chunk, len(chunk)).float().reshape(len(chunk), -1)
                wanted = self._torch.tensor(ids[start + 1 : start + 1 + len(chunk)], device=rows.device)
                picked = rows.gather(1, wanted[:, None])[:, 0] - rows.logsumexp(dim=1)
                scores.extend(picked.tolist())
        except Exception as error:
            self._prefix.reset()
            self.raise_typed(error)
        return scores

    def _score_beside(self, ids: list[int]) -> list[float]:
        """`score` with the generation's cache put aside."""
        kept, self._prefix = self._prefix, self._new_prefix()
        try:
            return self.score(ids)
        finally:
            self._prefix = kept

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        """The mean of the last hidden states, scaled to length 1."""
        torch = self._torch
        if not 0 < len(token_ids) <= self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(token_ids)} tokens do not fit into the context of {self.info.context_length}.", hint=_SHORTER
            )
        try:
            with torch.inference_mode(), self.products(len(token_ids)):
                tokens = torch.tensor([list(token_ids)], device=self.device)
                states = _hf_compat.decoder_of(self.model)(input_ids=tokens, use_cache=False).last_hidden_state[0].float()
                return list(torch.nn.functional.normalize(states.mean(dim=0), dim=0).tolist())
        except Exception as error:
            self.raise_typed(error)

    # --- memory and errors ----------------------------------------------------------------------------------

    def device_memory(self) -> int | None:
        torch = self._torch
        if not torch.cuda.is_available():
            return None
        return sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())) or None

    def peak_memory(self) -> int | None:
        torch = self._torch
        if any(name.startswith("cuda") for name in self.info.device_map):
            return int(sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())))
        return _process.peak_memory()

    def raise_typed(self, error: Exception) -> NoReturn:
        """Raise the product's error for what torch raised; anything unknown as it is."""
        if is_out_of_memory(error):
            if self._torch.cuda.is_available():
                self._torch.cuda.empty_cache()
            raise GenerateOutOfMemory(
                "The memory ran out in the middle of the answer.", hint="Use a shorter prompt or a smaller model."
            ) from error
        if isinstance(error, FloatingPointError):
            raise GenerationFailed(
                "The model gave numbers that are not finite.", hint="Load it in another dtype (bfloat16 instead of float16)."
            ) from error
        raise error

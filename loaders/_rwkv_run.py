"""Runs a loaded RWKV model: prefill in chunks, one token at a time, with the recurrent states kept between requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loaders._hf_generate import HfRunner
from loaders._rwkv_states import StateCache
from loaders._rwkv_text import ByteCodec
from modules.assemble import TokenAssembler
from modules.detokenize import ByteDetokenizer
from modules.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from loaders._hf_load import Loaded
    from modules.engine import CancelToken
    from modules.grammar import Constraint
    from modules.schema import GenerationRequest

_MB = 1_000_000


class RwkvRunner(HfRunner):
    """The Transformers runner's requests, sampling and receipts around a network with a state instead of a KV cache."""

    def __init__(self, loaded: Loaded, options: dict[str, Any]) -> None:
        self._states = StateCache(options["state_cache_mb"] * _MB, options["state_every"])
        super().__init__(loaded, prefill_chunk=options["prefill_chunk"])
        self._prefix = self._states
        self._step(self._prompt_of_one() * 2, 1)  # several tokens at once are another path: it, too, is set up now
        self._states.forget()

    def _new_prefix(self) -> StateCache:
        """A state of its own, of which no copies are kept."""
        return StateCache(0, self._states.every)

    def assembler(self, request: GenerationRequest, ids: list[int], constraint: Constraint | None = None) -> TokenAssembler:
        codec: Any = self.text
        if not isinstance(codec, ByteCodec):
            return super().assembler(request, ids, constraint)
        skip = bool(request.sampling.get("skip_special_tokens", True))
        detokenizer = ByteDetokenizer(lambda token: codec.piece(token, skip))
        return TokenAssembler(request, detokenizer, self._eos_ids, self.info.context_length - len(ids), constraint)

    def _prefill(self, ids: list[int], cached: int, cancel: CancelToken) -> Iterator[tuple[int, Any]]:
        """(tokens read, logits of the last of them) after each chunk. States are kept on the way and before the last token."""
        position, last, every = cached, len(ids) - 1, self._states.every
        while position < len(ids) and not cancel.cancelled:
            ends = (position + self.chunk, position - position % every + every, last if position < last else len(ids))
            chunk = ids[position : min(ends)]
            logits = self._step(chunk, 1)
            position += len(chunk)
            if position == last:
                self._states.keep(place=False)
            yield position, logits if position == len(ids) else None

    def forward(self, prefix: Any, ids: list[int], keep: int, images: Any = None) -> Any:
        """Read the next `ids`; the logits of the last `keep` positions: [vocab] for 1, else [keep, vocab]."""
        with self._torch.inference_mode(), self.products(len(ids)):
            logits, prefix.state = self.model.forward(ids, prefix.state, keep > 1)
        prefix.ids.extend(ids)
        if prefix.due():
            prefix.keep(place=True)
        return logits

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first. The kept states stay."""
        if len(token_ids) > self.info.context_length:
            raise ContextLengthExceeded(
                f"{len(token_ids)} tokens do not fit into the context of {self.info.context_length}.",
                hint="Shorten the text, or load the model with a larger ctx_size.",
            )
        ids = list(token_ids)
        scores: list[float] = []
        state = None
        try:
            for start in range(0, max(len(ids) - 1, 0), self.chunk):
                chunk = ids[start : min(start + self.chunk, len(ids) - 1)]
                with self._torch.inference_mode(), self.products(len(chunk)):
                    rows, state = self.model.forward(chunk, state, True)
                    rows = rows.float().reshape(len(chunk), -1)
                    wanted = self._torch.tensor(ids[start + 1 : start + 1 + len(chunk)], device=rows.device)
                    scores.extend((rows.gather(1, wanted[:, None])[:, 0] - rows.logsumexp(dim=1)).tolist())
        except Exception as error:
            self.raise_typed(error)
        return scores

    def _score_beside(self, ids: list[int]) -> list[float]:
        return self.score(ids)

"""exllamav2 and exllamav3 behind the forward call of a transformers model, which is what `_hf_generate` runs.

Both packages keep one KV cache, allocated when the model is loaded. A `Session` is what the runner takes for a cache: the ids
that are in it. The runner may begin a second one beside the first (to score a prompt in the middle of an answer); whichever is
used next takes the one cache over, and a session that has lost it is computed again from its ids.

Neither package can be imported without CUDA; nothing here imports them. Names and arguments of what is called are checked
against the packages' source by tests/unit/test_loader_exllama.py where the source is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Session:
    """The ids in the cache. `croppable`: whether the end can be cut off; `state` belongs to the net."""

    croppable: bool = True
    ids: list[int] = field(default_factory=list)
    state: Any = None

    def crop(self, surplus: int) -> None:
        """Drop the last -`surplus` ids: transformers' sign."""
        if surplus < 0:
            del self.ids[surplus:]


@dataclass(frozen=True)
class Output:
    """logits [1, positions, vocabulary]."""

    logits: Any


class Net(ABC):
    """One loaded model. `chunk` is the most tokens of one pass, `vocab_size` the columns of the logits that are tokens."""

    croppable = True

    def __init__(self, chunk: int, vocab_size: int) -> None:
        self._chunk, self._vocab_size = chunk, vocab_size
        self._owner: Session | None = None

    def new_cache(self) -> Session:
        return Session(self.croppable)

    def __call__(self, **arguments: Any) -> Output:
        return self.forward(**arguments)

    def forward(self, input_ids: Any, past_key_values: Session, use_cache: bool = True, logits_to_keep: int = 1) -> Output:
        """Compute `input_ids` [1, n] after what the session holds; the logits of the last `logits_to_keep` positions."""
        session = past_key_values
        if self._owner is not session:
            self._take_over(session, input_ids)
        logits = self.compute(input_ids, session, logits_to_keep)
        session.ids.extend(input_ids[0].tolist())
        return Output(logits[..., -logits_to_keep:, : self._vocab_size])

    def _take_over(self, session: Session, like: Any) -> None:
        if self._owner is not None:
            self.release(self._owner)
        self._owner = session
        ids, session.ids = session.ids, []
        for start in range(0, len(ids), self._chunk):
            part = like.new_tensor([ids[start : start + self._chunk]])
            self.compute(part, session, 1)
            session.ids.extend(ids[start : start + self._chunk])

    @abstractmethod
    def compute(self, input_ids: Any, session: Session, keep: int) -> Any:
        """One pass after position len(session.ids); logits of at least the last `keep` positions."""

    def release(self, session: Session) -> None:
        """The session loses the cache."""
        session.state = None


class V2Net(Net):
    """exllamav2: ExLlamaV2.forward on a cache whose `current_seq_len` is set before each pass."""

    def __init__(self, model: Any, cache: Any, loras: list[Any], chunk: int, vocab_size: int) -> None:
        super().__init__(chunk, vocab_size)
        self._model, self._cache, self._loras = model, cache, loras

    def compute(self, input_ids: Any, session: Session, keep: int) -> Any:
        self._cache.current_seq_len = len(session.ids)
        return self._model.forward(input_ids, cache=self._cache, last_id_only=keep == 1, loras=self._loras or None)


class V3Net(Net):
    """exllamav3: Model.forward with its parameters for one sequence in a rectangular cache of `size` tokens.

    A model with recurrent layers keeps a state beside the cache that can't go back.
    """

    def __init__(self, model: Any, cache: Any, size: int, chunk: int, vocab_size: int) -> None:
        super().__init__(chunk, vocab_size)
        self._model, self._cache, self._size = model, cache, size
        self.croppable = not model.get_recurrent_layers()

    def compute(self, input_ids: Any, session: Session, keep: int) -> Any:
        parameters = {
            "attn_mode": "flash_attn",
            "cache": self._cache,
            "batch_shape": (1, self._size),
            "past_len": len(session.ids),
            "last_tokens_only": keep,
        }
        if session.state is not None:
            parameters["recurrent_states"] = session.state
        logits = self._model.forward(input_ids, parameters)
        session.state = parameters.get("recurrent_states")
        return logits

    def release(self, session: Session) -> None:
        for state in session.state or ():
            self._cache.release_state(state)
        super().release(session)

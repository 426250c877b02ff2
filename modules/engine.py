"""What a loader implements, inside its worker process.

One thread loads and computes for the worker's whole life: torch's CPU build and llama.cpp share libgomp, and a second
computing thread halves the speed. So `load`, `generate`, `score` and `embed` run in that thread; `encode`, `decode`
and `token_text` may be called from another one while a generation runs and must not touch tensors.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from modules.errors import UnsupportedParameter
from modules.schema import ChatInput, Event, GenerationRequest, LoaderSpec, LoadProgress, ModelInfo

Progress = Callable[[LoadProgress], None]


class CancelToken:
    """Set by the reader thread; the engine looks at it once per token (and per prefill chunk where it can)."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()


class Engine(ABC):
    """A loaded model. The constructor takes nothing and imports nothing heavy."""

    spec: ClassVar[LoaderSpec]
    computes_elsewhere: ClassVar[bool] = False  # `score` and `embed` then run like `encode`, and hold up no generation

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Backend package -> version, for the handshake, the receipt and `doctor`."""
        return {}

    @abstractmethod
    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        """Load the model at `path` (a file or folder). `options` are checked against `spec.options` and complete.

        Raises LoadError's subclasses; any other exception is reported as load_failed with its traceback in the log.
        """

    @abstractmethod
    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        """Yield PrefillProgress*, TokenEvent*, then exactly one Done. None means "nothing yet".

        With `spec.slots` > 1 the worker steps several of these iterators in turn, in the one compute thread.
        Raises ContextLengthExceeded, GenerationFailed or GenerateOutOfMemory; the engine is usable afterwards.
        Helpers that every loader shares: modules.assemble.TokenAssembler, modules.grammar.Grammars.
        """

    @abstractmethod
    def encode(self, text: str, add_special: bool) -> list[int]:
        """Text -> token ids. Special tokens written out in the text are recognised. `add_special` allows BOS/EOS."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Token ids -> text; bytes that are no UTF-8 become U+FFFD."""

    def token_text(self, token_id: int) -> str:
        """The piece of one token, for logprobs."""
        return self.decode([token_id], skip_special=False)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Natural-log probability of each token after the first, given those before it: n ids -> n - 1 values."""
        raise UnsupportedParameter(f"{self.spec.title} can't score text.")

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        """One embedding vector of the whole sequence."""
        raise UnsupportedParameter(f"{self.spec.title} makes no embeddings.")

    def render(self, chat: ChatInput) -> str:
        """The prompt that a conversation becomes, from an engine that renders them itself; like `encode`, from any thread."""
        raise UnsupportedParameter(f"The prompt of this model is made by {self.spec.title}.")

    def wait_for_news(self) -> None:
        """Pass a moment in which every running generation had nothing yet. At most 5 ms: a new request waits for it."""
        time.sleep(0.0005)

    def memory_bytes(self) -> int | None:
        """Device memory beyond the process's own RSS (CUDA), None when there is none."""
        return None

    def close(self) -> None:  # noqa: B027 - optional: the process ends right after
        """Release what the end of the process would not (temporary files)."""

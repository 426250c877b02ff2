"""One loaded model, seen from the parent: what every part of the server asks of it.

The one kind there is runs in a worker process (modules.worker_client), Ray's in a gateway to its replicas that speaks the same
protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.errors import EngineDead
    from modules.schema import ChatInput, Event, GenerationRequest, LoaderSpec, LoadProgress, ModelInfo

OnProgress = Callable[["LoadProgress"], None]


class EngineClient(ABC):
    spec: LoaderSpec
    info: ModelInfo | None = None
    pid: int | None = None
    dead: EngineDead | None = None
    versions: dict[str, str]
    on_death: Callable[[EngineDead], None] | None = None

    @abstractmethod
    async def load(self, path: str, options: dict[str, Any], on_progress: OnProgress | None = None) -> ModelInfo:
        """Load once. Raises LoadError's subclasses or EngineDead; the client is then good for `close` only."""

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Events up to and including Done. Raises AppError. Closing the iterator early aborts the request."""

    @abstractmethod
    async def abort(self, request_id: str) -> None:
        """Ask one generation to stop; its Done says finish_reason cancelled."""

    @abstractmethod
    async def call(self, method: str, **arguments: Any) -> Any:
        """encode, decode, score or embed by name."""

    @abstractmethod
    async def close(self, grace_s: float = 5.0) -> None:
        """End the worker and wait until it is gone."""

    async def encode(self, text: str, add_special: bool = False) -> list[int]:
        return list(await self.call("encode", text=text, add_special=add_special))

    async def render(self, chat: ChatInput) -> str:
        """The prompt that an engine makes of a conversation itself. Raises UnsupportedParameter where it does not tell."""
        return str(await self.call("render", chat=to_wire(chat)))

    async def count(self, text: str, add_special: bool = False) -> int:
        """How many tokens a text has: an estimate, four bytes each, where the model's server does not tell (`info.lacks`)."""
        if self.info is not None and "tokenizer" in self.info.lacks:
            return -(-len(text.encode("utf-8", "replace")) // 4)
        return len(await self.encode(text, add_special))

    async def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return str(await self.call("decode", token_ids=list(token_ids), skip_special=skip_special))

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return list(await self.call("score", token_ids=list(token_ids)))

    async def embed(self, token_ids: Sequence[int]) -> list[float]:
        return list(await self.call("embed", token_ids=list(token_ids)))

    def memory_bytes(self) -> int | None:
        """Resident memory of the worker and its children."""
        return None

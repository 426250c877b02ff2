"""What a chat store is: the data it gives back and the promises it makes.

The interface is asynchronous and says nothing of the database behind it: a SQLite file (`store_sqlite`), which one server has to
itself, or PostgreSQL (`store_postgres`), which many servers share. Its promises:

1. What a call has returned is on disk, unless `memory_only` says why it can't be. A save happens whole or not at all.
2. A user's message and the empty answer below it are saved together, before any generation starts.
3. Every change carries the revision it was based on, where the caller has one; a mismatch is a Conflict, and the
   caller may keep both as a branch. No call replaces a history: there are only additions, marks and versions.
4. A generation writes to its own node only, and only while that node still belongs to it. An answer whose server ended
   becomes `interrupted`; while the server lives, others see it as `generating`.
5. An action is repeated without effect when its `client_id` was seen before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from modules.errors import StorageError

Role = Literal["user", "assistant", "system"]
Status = Literal["complete", "generating", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Node:
    """One message. `siblings` are the ids of its versions in order, itself among them."""

    id: str
    parent: str | None
    role: Role
    text: str
    created_at: float
    status: Status
    siblings: tuple[str, ...]
    model: str | None = None
    loader: str | None = None
    receipt: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation with the messages of its active path, first message first."""

    id: str
    title: str
    pinned: bool
    trashed: bool
    created_at: float
    updated_at: float
    revision: int
    system_prompt: str
    leaf: str | None
    messages: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of the conversation list. `snippet` is around the match, or the newest text."""

    id: str
    title: str
    pinned: bool
    trashed: bool
    updated_at: float
    snippet: str
    generating: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What an action did. `node` is the assistant node to write to, None when nothing is to be generated.

    `fresh` is False when this client_id was seen before: the action was not done a second time.
    `prefix` is text the node already has (continue).
    """

    snapshot: Snapshot
    node: str | None = None
    fresh: bool = True
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True, slots=True)
class NewNode:
    """A node to import. `key` and `parent` are names within the import only; the store gives new ids."""

    key: str
    parent: str | None
    role: Role
    text: str
    created_at: float | None = None
    status: Status = "complete"
    model: str | None = None
    loader: str | None = None
    receipt: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class NewConversation:
    title: str
    nodes: tuple[NewNode, ...]
    system_prompt: str = ""
    leaf: str | None = None
    pinned: bool = False
    created_at: float | None = None


class ChatStore(ABC):
    """All methods raise NotFound for an unknown id and StorageError's subclasses when the disk refuses."""

    notices: list[Notice]
    """What `open` found and did, for the page."""
    memory_only: StorageError | None
    """Why what is said now is kept in memory only (the disk went read-only or away); None while promise 1 holds."""
    on_change: Callable[[str | None], None] | None = None
    """Called, on the event loop, with the id of a conversation that another server changed; None: any may have changed."""
    on_stop: Callable[[str], object] | None = None
    """Called, on the event loop, with a node that someone at another server wants no more of."""

    @abstractmethod
    async def open(self) -> list[Notice]:
        """Lock, check, repair, migrate. Answers whose server has ended become `interrupted`."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def save_again(self) -> bool:
        """While `memory_only`: try to write everything. Whether all is on disk now."""

    @abstractmethod
    async def conversations(self, query: str = "", trashed: bool = False, limit: int = 1000) -> list[Summary]:
        """Pinned first, then newest first. Every word of `query` must occur in the title, or in one message."""

    @abstractmethod
    async def create(self, title: str = "", system_prompt: str = "") -> Snapshot: ...

    @abstractmethod
    async def snapshot(self, conversation: str) -> Snapshot: ...

    @abstractmethod
    async def conversation_of(self, node: str) -> str: ...

    @abstractmethod
    async def path_to(self, node: str) -> tuple[str, tuple[Node, ...]]:
        """(system prompt, the messages from the first down to `node`)."""

    @abstractmethod
    async def subtree(self, node: str) -> tuple[str, ...]:
        """`node` and all live nodes below it."""

    @abstractmethod
    async def update(self, conversation: str, changes: dict[str, Any], revision: int | None = None) -> Snapshot:
        """`changes` may hold title, pinned, trashed, system_prompt and leaf (any node: its newest leaf is taken)."""

    @abstractmethod
    async def purge(self, conversation: str) -> None:
        """Remove for good, with the images that only it refers to. Conflict unless it is in the trash."""

    @abstractmethod
    async def keep_image(self, name: str, data: bytes) -> None:
        """Keep an image under its name (`store_images.name_of`) for a message that is about to refer to it."""

    @abstractmethod
    async def image(self, name: str) -> bytes | None:
        """None where it is gone, or never was."""

    @abstractmethod
    async def drop_images(self) -> int:
        """Remove images that were uploaded and that no message came to refer to; how many."""

    @abstractmethod
    async def add_message(
        self,
        conversation: str,
        text: str,
        *,
        client_id: str,
        generation: str,
        parent: str | None = None,
        revision: int | None = None,
        branch: bool = False,
    ) -> Change:
        """A user's message below `parent` (default: the leaf), and below it an empty assistant node for `generation`.

        A revision that is not current is a Conflict, unless `parent` still is the leaf (the message goes where its
        writer saw it go) or `branch` is set; with `branch` a parent that was deleted is replaced by its nearest live ancestor.
        """

    @abstractmethod
    async def add_answer(self, node: str, *, client_id: str, generation: str) -> Change:
        """A new version beside an assistant node, or the next answer below a user node."""

    @abstractmethod
    async def reopen(self, node: str, *, client_id: str, generation: str) -> Change:
        """Set an assistant node to be continued by `generation`."""

    @abstractmethod
    async def add_version(self, node: str, text: str, *, client_id: str, generation: str | None = None) -> Change:
        """A new text beside a node. With `generation`: an answer below a user's text, or the assistant's text goes on."""

    @abstractmethod
    async def checkpoint(self, node: str, generation: str, text: str) -> bool:
        """Save the text so far; False when the node no longer belongs to this generation."""

    @abstractmethod
    async def finish(
        self,
        node: str,
        generation: str,
        *,
        text: str,
        status: Status,
        model: str | None = None,
        loader: str | None = None,
        receipt: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> bool:
        """The end of a generation; False when the node no longer belongs to it."""

    @abstractmethod
    async def stop_elsewhere(self, node: str) -> None:
        """Ask the other servers, where there are any, to stop writing this node."""

    @abstractmethod
    async def delete(self, node: str) -> tuple[Snapshot, str]:
        """Hide a node and all below it; the token brings them back. Deleting again gives the same token."""

    @abstractmethod
    async def undo(self, token: str) -> Snapshot: ...

    @abstractmethod
    async def export(self, conversation: str) -> NewConversation:
        """The whole tree, deleted nodes left out."""

    @abstractmethod
    async def add_conversation(self, conversation: NewConversation) -> Snapshot: ...

    @abstractmethod
    async def backup(self) -> str | None:
        """Make a backup if anything changed since the newest; its file name, or None when there was nothing to do."""

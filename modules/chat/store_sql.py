"""The store's calls as SQL actions: what SQLite and PostgreSQL have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from modules.chat import store_tree
from modules.chat.store import Change, ChatStore, NewConversation, Node, Notice, Snapshot, Status, Summary

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from modules.chat.database import Database
    from modules.chat.store_actions import Actions
    from modules.chat.store_search import Search

T = TypeVar("T")


class SqlChatStore(ChatStore):
    """A database says how a transaction is run; everything else is here."""

    @abstractmethod
    async def _read(self, query: Callable[[Database], T]) -> T:
        """In one transaction, off the event loop."""

    @abstractmethod
    async def _write(self, action: Callable[[Actions], T]) -> T:
        """In one transaction, off the event loop; on disk when it returns. A lost connection may run the action twice."""

    async def _write_once(self, action: Callable[[Actions], T]) -> T:
        """The same for an action that must not be done twice."""
        return await self._write(action)

    @abstractmethod
    def search_index(self) -> Search: ...

    @abstractmethod
    def alone(self) -> AbstractContextManager[Database]:
        """One transaction on the whole store, in the caller's thread. Raises StoreLocked while another server uses the store."""

    # -- reading

    async def conversations(self, query: str = "", trashed: bool = False, limit: int = 1000) -> list[Summary]:
        return await self._read(lambda db: self.search_index().find(db, query, trashed, limit))

    async def snapshot(self, conversation: str) -> Snapshot:
        return await self._read(lambda db: store_tree.snapshot(db, conversation))

    async def conversation_of(self, node: str) -> str:
        return str(await self._read(lambda db: store_tree.node_row(db, node)["conversation"]))

    async def path_to(self, node: str) -> tuple[str, tuple[Node, ...]]:
        return await self._read(lambda db: store_tree.path_to(db, node))

    async def subtree(self, node: str) -> tuple[str, ...]:
        return await self._read(lambda db: store_tree.subtree(db, node))

    async def export(self, conversation: str) -> NewConversation:
        return await self._read(lambda db: store_tree.whole(db, conversation))

    async def image(self, name: str) -> bytes | None:
        return await self._read(lambda db: db.image(name))

    # -- writing

    async def create(self, title: str = "", system_prompt: str = "") -> Snapshot:
        return await self._write_once(lambda do: do.create(title, system_prompt))

    async def update(self, conversation: str, changes: dict[str, Any], revision: int | None = None) -> Snapshot:
        return await self._write_once(lambda do: do.update(conversation, changes, revision))

    async def purge(self, conversation: str) -> None:
        await self._write_once(lambda do: do.purge(conversation))

    async def keep_image(self, name: str, data: bytes) -> None:
        await self._write(lambda do: do.keep_image(name, data))

    async def drop_images(self) -> int:
        return await self._write(lambda do: do.drop_images())

    async def add_conversation(self, conversation: NewConversation) -> Snapshot:
        return await self._write_once(lambda do: do.add_conversation(conversation))

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
        return await self._write(lambda do: do.add_message(conversation, text, client_id, generation, parent, revision, branch))

    async def add_answer(self, node: str, *, client_id: str, generation: str) -> Change:
        return await self._write(lambda do: do.add_answer(node, client_id, generation))

    async def reopen(self, node: str, *, client_id: str, generation: str) -> Change:
        return await self._write(lambda do: do.reopen(node, client_id, generation))

    async def add_version(self, node: str, text: str, *, client_id: str, generation: str | None = None) -> Change:
        return await self._write(lambda do: do.add_version(node, text, client_id, generation))

    async def checkpoint(self, node: str, generation: str, text: str) -> bool:
        return await self._write(lambda do: do.checkpoint(node, generation, text))

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
        return await self._write(lambda do: do.finish(node, generation, text, status, model, loader, receipt, error))

    async def delete(self, node: str) -> tuple[Snapshot, str]:
        return await self._write(lambda do: do.delete(node))

    async def undo(self, token: str) -> Snapshot:
        return await self._write(lambda do: do.undo(token))


def cut_off(count: int) -> Notice:
    """What the page says of answers whose server ended."""
    many = "answers were" if count > 1 else "answer was"
    return Notice("info", f"{count} {many} cut off by the end of the server; what had come is kept.")

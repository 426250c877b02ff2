"""The rows that actions write: conversations, nodes, and the counters that say that something changed."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from modules.chat import store_images

if TYPE_CHECKING:
    from modules.chat.database import Database
    from modules.chat.store import Role, Status
    from modules.chat.store_search import Search

TITLE_CHARS = 60
DEFAULT_TITLE = "New chat"


def new_id() -> str:
    return uuid.uuid4().hex


def auto_title(text: str) -> str:
    """The first line of the first message, cut at a word."""
    line = next((" ".join(part.split()) for part in text.splitlines() if part.strip()), "").lstrip("#>*- ")
    if len(line) <= TITLE_CHARS:
        return line or DEFAULT_TITLE
    cut = line[:TITLE_CHARS]
    return (cut[: cut.rfind(" ")] if " " in cut[TITLE_CHARS // 2 :] else cut).rstrip(" ,.;:") + "…"


class Writes:
    """What the actions share.

    `owner` goes before each generation's name where several servers write, so that it can be told whose it is. `changed` is the
    conversation that the action changed, for those who look at it from elsewhere; `generation` the one it has begun.
    """

    def __init__(self, db: Database, search: Search, owner: str = "") -> None:
        self._db = db
        self._search = search
        self._owner = owner
        self.changed: str | None = None
        self.generation: str | None = None

    def _insert_conversation(self, title: str, is_auto: bool, system_prompt: str, pinned: bool, created_at: float) -> str:
        conversation = new_id()
        self._db.run(
            "INSERT INTO conversations (id, title, title_is_auto, pinned, created_at, updated_at, touched, system_prompt) "
            "VALUES (:id, :title, :is_auto, :pinned, :created_at, :now, :touched, :system_prompt)",
            id=conversation, title=title, is_auto=int(is_auto), pinned=int(pinned), created_at=created_at, now=time.time(),
            touched=self._db.count_change(), system_prompt=system_prompt,
        )  # fmt: skip
        self.changed = conversation
        return conversation

    def _insert_node(
        self,
        conversation: str,
        parent: str | None,
        role: Role,
        text: str,
        status: Status,
        *,
        generation: str | None = None,
        model: str | None = None,
        loader: str | None = None,
    ) -> str:
        owned = None if generation is None else self._begun(generation)
        values = node_values(conversation, parent, role, text, status, generation=owned, model=model, loader=loader)
        self._insert_nodes([values])
        return str(values["id"])

    def _begun(self, generation: str) -> str:
        self.generation = self._owner + generation
        return self.generation

    def _insert_nodes(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            names = ", ".join(rows[0])
            self._db.many(f"INSERT INTO nodes ({names}) VALUES (:{names.replace(', ', ', :')})", rows)
            store_images.referred(self._db, [row["text"] for row in rows])
        self._search.add(self._db, [row["id"] for row in rows if row["status"] != "generating"])

    def _touch(self, conversation: str, moved: bool = True) -> None:
        self._db.run("UPDATE conversations SET revision = revision + 1 WHERE id = :id", id=conversation)
        self.changed = conversation
        if moved:
            self._moved(conversation)
        else:
            self._db.count_change()  # a backup is due all the same

    def _moved(self, conversation: str) -> None:
        """A counter, not the clock, orders the list and tells a backup that something changed."""
        self.changed = conversation
        self._db.run(
            "UPDATE conversations SET touched = :touched, updated_at = :now WHERE id = :id",
            touched=self._db.count_change(), now=time.time(), id=conversation,
        )  # fmt: skip


def node_values(
    conversation: str,
    parent: str | None,
    role: Role,
    text: str,
    status: Status,
    *,
    id: str | None = None,
    created_at: float | None = None,
    generation: str | None = None,
    model: str | None = None,
    loader: str | None = None,
    receipt: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A new row of `nodes`, by column."""
    return {
        "id": id or new_id(),
        "conversation": conversation,
        "parent": parent,
        "role": role,
        "text": text,
        "status": status,
        "created_at": created_at or time.time(),
        "generation": generation,
        "model": model,
        "loader": loader,
        "receipt": dump(receipt),
        "error": dump(error),
    }


def dump(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=True, default=str)

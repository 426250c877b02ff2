"""Every change to a conversation, as functions inside one SQLite transaction."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from modules.chat.store import Change, NewConversation, Role, Snapshot, Status
from modules.chat.store_tree import Outline, conversation_row, node_row, snapshot
from modules.errors import Conflict, InvalidParameter, NotFound

if TYPE_CHECKING:
    import sqlite3

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


class Actions:
    """The SQL of each action. The caller opens and commits the transaction."""

    def __init__(self, connection: sqlite3.Connection, search: Search) -> None:
        self._db = connection
        self._search = search

    # -- conversations

    def create(self, title: str, system_prompt: str) -> Snapshot:
        conversation = self._insert_conversation(title or DEFAULT_TITLE, not title, system_prompt, False, time.time())
        return snapshot(self._db, conversation)

    def update(self, conversation: str, changes: dict[str, Any], revision: int | None) -> Snapshot:
        row = conversation_row(self._db, conversation)
        if revision is not None and revision != row["revision"]:
            raise self._conflict(conversation)
        columns: dict[str, Any] = {}
        for name, value in changes.items():
            if name == "title":
                columns |= {"title": value or DEFAULT_TITLE, "title_is_auto": 0}
            elif name in ("pinned", "trashed"):
                columns[name] = int(value)
            elif name == "system_prompt":
                columns[name] = value
            elif name == "leaf":
                columns[name] = self._leaf_through(conversation, value)
            else:
                raise InvalidParameter(f"A conversation has no {name} to change.", param=name)
        if columns:
            assignments = ", ".join(f"{name} = :{name}" for name in columns)
            self._db.execute(f"UPDATE conversations SET {assignments} WHERE id = :id", {**columns, "id": conversation})
            # Looking at another branch or pinning is no news: the list keeps its order.
            self._touch(conversation, moved=bool(columns.keys() - {"leaf", "pinned", "trashed"}))
        return snapshot(self._db, conversation)

    def purge(self, conversation: str) -> None:
        if not conversation_row(self._db, conversation)["trashed"]:
            raise Conflict("Only a conversation in the trash can be removed for good.", hint="Move it to the trash first.")
        self._search.forget(self._db, conversation)
        self._db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
        self._count_change()

    def add_conversation(self, new: NewConversation) -> Snapshot:
        conversation = self._insert_conversation(
            new.title or auto_title(next((node.text for node in new.nodes if node.role == "user"), "")),
            not new.title,
            new.system_prompt,
            new.pinned,
            new.created_at or time.time(),
        )
        ids = {node.key: new_id() for node in new.nodes}
        if len(ids) != len(new.nodes):
            raise InvalidParameter("Two of its messages have the same id.", param="nodes")
        seen: set[str] = set()
        leaf = None
        for node in new.nodes:
            if node.parent is not None and node.parent not in seen:
                raise InvalidParameter("A message comes before the one it answers.", param="nodes")
            seen.add(node.key)
            leaf = ids[node.key]
            parent = ids[node.parent] if node.parent is not None else None
            self._insert_node(
                conversation, parent, node.role, node.text, node.status,
                id=leaf, created_at=node.created_at, model=node.model, loader=node.loader, receipt=node.receipt, error=node.error,
            )  # fmt: skip
        if new.leaf is not None and new.leaf in ids:
            leaf = ids[new.leaf]
        self._db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (leaf, conversation))
        return snapshot(self._db, conversation)

    # -- turns

    def add_message(
        self,
        conversation: str,
        text: str,
        client_id: str,
        generation: str,
        parent: str | None,
        revision: int | None,
        branch: bool,
    ) -> Change:
        if again := self._seen(client_id, "message"):
            return again
        row = conversation_row(self._db, conversation)
        self._require_active(row)
        outline = Outline(self._db, conversation)
        shown = outline.shown(row["leaf"])
        leaf = shown[-1] if shown else None
        stale = revision is not None and revision != row["revision"]
        if stale and not branch and (parent is None or parent != leaf):
            raise self._conflict(conversation)
        if parent is None:
            parent = leaf
        elif parent not in outline.parent:
            if not branch:
                raise self._conflict(conversation)
            parent = self._live_ancestor(conversation, parent)
        if any(outline.status[node] == "generating" for node in outline.path(parent)):
            detail = _detail(snapshot(self._db, conversation))
            raise Conflict("An answer is still being written here.", hint="Wait for it, or stop it.", detail=detail)
        if row["title_is_auto"] and row["title"] == DEFAULT_TITLE:
            self._db.execute("UPDATE conversations SET title = ? WHERE id = ?", (auto_title(text), conversation))
        question = self._insert_node(conversation, parent, "user", text, "complete")
        answer = self._insert_node(conversation, question, "assistant", "", "generating", generation=generation)
        return self._acted(client_id, "message", conversation, answer)

    def add_answer(self, node: str, client_id: str, generation: str) -> Change:
        if again := self._seen(client_id, "answer"):
            return again
        row = node_row(self._db, node)
        self._require_active(conversation_row(self._db, row["conversation"]))
        question = row["parent"] if row["role"] == "assistant" else node
        if row["role"] == "assistant" and question is None:
            raise InvalidParameter("This message answers nothing, so it can't be written again.", param="message")
        busy = self._db.execute(
            "SELECT id FROM nodes WHERE parent = ? AND status = 'generating' AND deleted IS NULL", (question,)
        ).fetchone()
        if busy is not None:  # a second click: the new version is already on its way
            return Change(snapshot(self._db, row["conversation"]), busy["id"], fresh=False)
        answer = self._insert_node(row["conversation"], question, "assistant", "", "generating", generation=generation)
        return self._acted(client_id, "answer", row["conversation"], answer)

    def reopen(self, node: str, client_id: str, generation: str) -> Change:
        if again := self._seen(client_id, "continue"):
            return again
        row = node_row(self._db, node)
        self._require_active(conversation_row(self._db, row["conversation"]))
        if row["role"] != "assistant":
            raise InvalidParameter("Only an answer can be continued.", param="message")
        if row["status"] == "generating":
            return Change(snapshot(self._db, row["conversation"]), node, fresh=False)
        outline = Outline(self._db, row["conversation"])
        if outline.children.get(node):
            raise Conflict("The conversation has gone on after this answer.", hint="Write it again or edit it instead.")
        self._db.execute(
            "UPDATE nodes SET status = 'generating', generation = ?, error = NULL, indexed = 0 WHERE id = ?", (generation, node)
        )
        change = self._acted(client_id, "continue", row["conversation"], node)
        return dataclasses.replace(change, prefix=row["text"])

    def add_version(self, node: str, text: str, client_id: str, generation: str | None) -> Change:
        if again := self._seen(client_id, "version"):
            return again
        row = node_row(self._db, node)
        conversation, parent, role = row["conversation"], row["parent"], row["role"]
        self._require_active(conversation_row(self._db, conversation))
        if row["status"] == "generating":
            raise Conflict("This answer is still being written.", hint="Stop it first.")
        if role == "assistant" and generation is not None:
            version = self._insert_node(
                conversation, parent, role, text, "generating", generation=generation, model=row["model"], loader=row["loader"]
            )
            return dataclasses.replace(self._acted(client_id, "version", conversation, version), prefix=text)
        version = self._insert_node(conversation, parent, role, text, "complete", model=row["model"], loader=row["loader"])
        if role != "user" or generation is None:
            return dataclasses.replace(self._acted(client_id, "version", conversation, version), node=None)
        answer = self._insert_node(conversation, version, "assistant", "", "generating", generation=generation)
        return self._acted(client_id, "version", conversation, answer)

    # -- a generation's own writes: no revision, the node is theirs while `generation` matches

    def checkpoint(self, node: str, generation: str, text: str) -> bool:
        cursor = self._db.execute(
            "UPDATE nodes SET text = ? WHERE id = ? AND generation = ? AND status = 'generating'", (text, node, generation)
        )
        return cursor.rowcount == 1

    def finish(
        self,
        node: str,
        generation: str,
        text: str,
        status: Status,
        model: str | None,
        loader: str | None,
        receipt: dict[str, Any] | None,
        error: dict[str, Any] | None,
    ) -> bool:
        row = self._db.execute(
            "SELECT seq, conversation FROM nodes WHERE id = ? AND generation = ?", (node, generation)
        ).fetchone()
        if row is None:
            return False
        self._db.execute(
            "UPDATE nodes SET text = ?, status = ?, model = COALESCE(?, model), loader = COALESCE(?, loader), receipt = ?, "
            "error = ?, generation = NULL, indexed = 0 WHERE id = ?",
            (text, status, model, loader, _dump(receipt), _dump(error), node),
        )
        self._search.add(self._db, [row["seq"]])
        touched = self._count_change()
        self._db.execute(
            "UPDATE conversations SET touched = ?, updated_at = ? WHERE id = ?", (touched, time.time(), row["conversation"])
        )
        return True

    def interrupt_all(self) -> int:
        """At the start: no generation of an earlier process lives on."""
        cursor = self._db.execute("UPDATE nodes SET status = 'interrupted', generation = NULL WHERE status = 'generating'")
        return cursor.rowcount

    # -- delete and undo

    def delete(self, node: str) -> tuple[Snapshot, str]:
        row = node_row(self._db, node, deleted=True)
        conversation = row["conversation"]
        if row["deleted"] is not None:
            return snapshot(self._db, conversation), row["deleted"]
        outline = Outline(self._db, conversation)
        path = outline.shown(conversation_row(self._db, conversation)["leaf"])
        shown = path[-1] if path else None
        doomed = outline.below(node)
        token = new_id()
        for item in doomed:
            self._db.execute("UPDATE nodes SET deleted = ? WHERE id = ?", (token, item))
        self._db.execute(
            "INSERT INTO undo (token, conversation, node, leaf, created_at) VALUES (?, ?, ?, ?, ?)",
            (token, conversation, node, shown, time.time()),
        )
        if shown in doomed:
            versions = [s for s in outline.children[row["parent"]] if s != node]
            older = [s for s in versions if outline.order[s] < row["seq"]] or versions
            leaf = outline.newest_leaf(older[-1]) if older else row["parent"]
            self._db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (leaf, conversation))
        self._touch(conversation)
        return snapshot(self._db, conversation), token

    def undo(self, token: str) -> Snapshot:
        row = self._db.execute("SELECT * FROM undo WHERE token = ?", (token,)).fetchone()
        if row is None:
            raise NotFound("There is nothing to undo any more.")
        conversation = row["conversation"]
        if row["undone"]:
            return snapshot(self._db, conversation)
        parent = node_row(self._db, row["node"], deleted=True)["parent"]
        if parent is not None and node_row(self._db, parent, deleted=True)["deleted"] is not None:
            raise Conflict("The message above it was deleted too.", hint="Bring that one back first.")
        self._db.execute("UPDATE nodes SET deleted = NULL WHERE deleted = ?", (token,))
        self._db.execute("UPDATE undo SET undone = 1 WHERE token = ?", (token,))
        if row["leaf"] in Outline(self._db, conversation).parent:
            self._db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (row["leaf"], conversation))
        self._touch(conversation)
        return snapshot(self._db, conversation)

    # -- helpers

    def _insert_conversation(self, title: str, is_auto: bool, system_prompt: str, pinned: bool, created_at: float) -> str:
        conversation = new_id()
        self._db.execute(
            "INSERT INTO conversations (id, title, title_is_auto, pinned, created_at, updated_at, touched, system_prompt) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (conversation, title, int(is_auto), int(pinned), created_at, time.time(), self._count_change(), system_prompt),
        )
        return conversation

    def _insert_node(
        self,
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
    ) -> str:
        node = id or new_id()
        cursor = self._db.execute(
            "INSERT INTO nodes "
            "(id, conversation, parent, role, text, status, created_at, generation, model, loader, receipt, error) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                node, conversation, parent, role, text, status, created_at or time.time(), generation, model, loader,
                _dump(receipt), _dump(error),
            ),
        )  # fmt: skip
        if status != "generating" and cursor.lastrowid is not None:
            self._search.add(self._db, [cursor.lastrowid])
        return node

    def _acted(self, client_id: str, kind: str, conversation: str, node: str) -> Change:
        """The end of an action: the path leads to its node, the action is remembered, the revision counts on."""
        self._db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (node, conversation))
        self._db.execute(
            "INSERT INTO actions (client_id, kind, conversation, node, created_at) VALUES (?, ?, ?, ?, ?)",
            (client_id, kind, conversation, node, time.time()),
        )
        self._touch(conversation)
        return Change(snapshot(self._db, conversation), node)

    def _seen(self, client_id: str, kind: str) -> Change | None:
        row = self._db.execute("SELECT kind, conversation, node FROM actions WHERE client_id = ?", (client_id,)).fetchone()
        if row is None:
            return None
        if row["kind"] != kind:
            raise InvalidParameter("This client_id was used for another action.", param="client_id")
        return Change(snapshot(self._db, row["conversation"]), row["node"], fresh=False)

    def _touch(self, conversation: str, moved: bool = True) -> None:
        touched = self._count_change()
        self._db.execute("UPDATE conversations SET revision = revision + 1 WHERE id = ?", (conversation,))
        if moved:
            self._db.execute(
                "UPDATE conversations SET touched = ?, updated_at = ? WHERE id = ?", (touched, time.time(), conversation)
            )

    def _count_change(self) -> int:
        """A counter, not the clock, orders the list and tells a backup that something changed."""
        self._db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'touched'")
        return int(self._db.execute("SELECT value FROM meta WHERE key = 'touched'").fetchone()[0])

    def _leaf_through(self, conversation: str, node: Any) -> str:
        outline = Outline(self._db, conversation)
        if not isinstance(node, str) or node not in outline.parent:
            raise NotFound("There is no such message in this conversation.", param="leaf")
        return outline.newest_leaf(node)

    def _live_ancestor(self, conversation: str, node: str) -> str | None:
        current: str | None = node
        while current is not None:
            row = self._db.execute("SELECT * FROM nodes WHERE id = ? AND conversation = ?", (current, conversation)).fetchone()
            if row is None:
                raise NotFound("There is no such message in this conversation.", param="parent")
            if row["deleted"] is None:
                return current
            current = row["parent"]
        return None

    def _require_active(self, row: sqlite3.Row) -> None:
        if row["trashed"]:
            raise Conflict("This conversation is in the trash.", hint="Restore it first.")

    def _conflict(self, conversation: str) -> Conflict:
        return Conflict(
            "The conversation has changed in another tab.",
            hint="Reload it, or keep both as a branch.",
            detail=_detail(snapshot(self._db, conversation)),
        )


def _detail(current: Snapshot) -> dict[str, Any]:
    return {"snapshot": current}


def _dump(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=True, default=str)

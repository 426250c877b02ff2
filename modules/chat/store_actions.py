"""Every change to a conversation, as functions inside one transaction."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from modules.chat import store_images
from modules.chat.store import Change, NewConversation, Snapshot, Status
from modules.chat.store_rows import DEFAULT_TITLE, Writes, auto_title, dump, new_id, node_values
from modules.chat.store_tree import Outline, conversation_row, node_row, snapshot
from modules.errors import Conflict, InvalidParameter, NotFound

if TYPE_CHECKING:
    from modules.chat.database import Row

_OF_CONVERSATION = "SELECT * FROM nodes WHERE id = :id AND conversation = :conversation"


class Actions(Writes):
    """The SQL of each action. The caller opens and commits the transaction."""

    # -- conversations

    def create(self, title: str, system_prompt: str) -> Snapshot:
        conversation = self._insert_conversation(title or DEFAULT_TITLE, not title, system_prompt, False, time.time())
        return snapshot(self._db, conversation)

    def update(self, conversation: str, changes: dict[str, Any], revision: int | None) -> Snapshot:
        self._db.hold(conversation)
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
            self._db.run(f"UPDATE conversations SET {assignments} WHERE id = :id", **columns, id=conversation)
            # Looking at another branch or pinning is no news: the list keeps its order.
            self._touch(conversation, moved=bool(columns.keys() - {"leaf", "pinned", "trashed"}))
        return snapshot(self._db, conversation)

    def purge(self, conversation: str) -> None:
        self._db.hold(conversation)
        if not conversation_row(self._db, conversation)["trashed"]:
            raise Conflict("Only a conversation in the trash can be removed for good.", hint="Move it to the trash first.")
        self._search.forget(self._db, conversation)
        self._db.run("DELETE FROM conversations WHERE id = :id", id=conversation)
        self._db.count_change()
        self.changed = conversation
        store_images.drop_unused(self._db)

    def keep_image(self, name: str, data: bytes) -> None:
        self._db.put_image(name, data, time.time())

    def drop_images(self) -> int:
        return len(store_images.drop_unused(self._db))

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
        rows = []
        for node in new.nodes:
            if node.parent is not None and node.parent not in seen:
                raise InvalidParameter("A message comes before the one it answers.", param="nodes")
            seen.add(node.key)
            parent = ids[node.parent] if node.parent is not None else None
            rows.append(
                node_values(
                    conversation, parent, node.role, node.text, node.status,
                    id=ids[node.key], created_at=node.created_at, model=node.model, loader=node.loader, receipt=node.receipt,
                    error=node.error,
                )
            )  # fmt: skip
        self._insert_nodes(rows)
        leaf = rows[-1]["id"] if rows else None
        if new.leaf is not None and new.leaf in ids:
            leaf = ids[new.leaf]
        self._db.run("UPDATE conversations SET leaf = :leaf WHERE id = :id", leaf=leaf, id=conversation)
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
        self._db.hold(conversation)
        if again := self._seen(client_id, "message", generation):
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
            self._db.run("UPDATE conversations SET title = :title WHERE id = :id", title=auto_title(text), id=conversation)
        question = self._insert_node(conversation, parent, "user", text, "complete")
        answer = self._insert_node(conversation, question, "assistant", "", "generating", generation=generation)
        return self._acted(client_id, "message", conversation, answer)

    def add_answer(self, node: str, client_id: str, generation: str) -> Change:
        self._db.hold_of(node)
        if again := self._seen(client_id, "answer", generation):
            return again
        row = node_row(self._db, node)
        self._require_active(conversation_row(self._db, row["conversation"]))
        question = row["parent"] if row["role"] == "assistant" else node
        if row["role"] == "assistant" and question is None:
            raise InvalidParameter("This message answers nothing, so it can't be written again.", param="message")
        busy = self._db.one(
            "SELECT id FROM nodes WHERE parent = :parent AND status = 'generating' AND deleted IS NULL", parent=question
        )
        if busy is not None:  # a second click: the new version is already on its way
            return Change(snapshot(self._db, row["conversation"]), busy["id"], fresh=False)
        answer = self._insert_node(row["conversation"], question, "assistant", "", "generating", generation=generation)
        return self._acted(client_id, "answer", row["conversation"], answer)

    def reopen(self, node: str, client_id: str, generation: str) -> Change:
        self._db.hold_of(node)
        if again := self._seen(client_id, "continue", generation):
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
        self._db.run(
            "UPDATE nodes SET status = 'generating', generation = :generation, error = NULL, indexed = 0 WHERE id = :id",
            generation=self._begun(generation),
            id=node,
        )
        change = self._acted(client_id, "continue", row["conversation"], node)
        return dataclasses.replace(change, prefix=row["text"])

    def add_version(self, node: str, text: str, client_id: str, generation: str | None) -> Change:
        self._db.hold_of(node)
        if again := self._seen(client_id, "version", generation):
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
        # Another server may have taken this one for dead, and have marked its answers: here it shows that it lives.
        done = self._db.run(
            "UPDATE nodes SET text = :text, status = 'generating' "
            "WHERE id = :id AND generation = :generation AND status IN ('generating', 'interrupted')",
            text=text,
            id=node,
            generation=self._owner + generation,
        )
        if done:
            row = self._db.one("SELECT conversation FROM nodes WHERE id = :id", id=node)
            self.changed = row["conversation"] if row is not None else None
        return done == 1

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
        mine = {"id": node, "generation": self._owner + generation}
        self._db.hold_of(node)
        row = self._db.one("SELECT conversation FROM nodes WHERE id = :id AND generation = :generation", **mine)
        if row is None:
            return False
        self._db.run(
            "UPDATE nodes SET text = :text, status = :status, model = COALESCE(:model, model), "
            "loader = COALESCE(:loader, loader), receipt = :receipt, error = :error, generation = NULL, indexed = 0 "
            "WHERE id = :id",
            text=text, status=status, model=model, loader=loader, receipt=dump(receipt), error=dump(error), id=node,
        )  # fmt: skip
        self._search.add(self._db, [node])
        self._moved(row["conversation"])
        return True

    # -- delete and undo

    def delete(self, node: str) -> tuple[Snapshot, str]:
        self._db.hold_of(node)
        row = node_row(self._db, node, deleted=True)
        conversation = row["conversation"]
        if row["deleted"] is not None:
            return snapshot(self._db, conversation), row["deleted"]
        outline = Outline(self._db, conversation)
        path = outline.shown(conversation_row(self._db, conversation)["leaf"])
        shown = path[-1] if path else None
        doomed = outline.below(node)
        token = new_id()
        self._db.many("UPDATE nodes SET deleted = :token WHERE id = :id", [{"token": token, "id": item} for item in doomed])
        self._db.run(
            "INSERT INTO undo (token, conversation, node, leaf, created_at) VALUES (:token, :conversation, :node, :leaf, :now)",
            token=token, conversation=conversation, node=node, leaf=shown, now=time.time(),
        )  # fmt: skip
        if shown in doomed:
            versions = [s for s in outline.children[row["parent"]] if s != node]
            older = [s for s in versions if outline.order[s] < row["seq"]] or versions
            leaf = outline.newest_leaf(older[-1]) if older else row["parent"]
            self._db.run("UPDATE conversations SET leaf = :leaf WHERE id = :id", leaf=leaf, id=conversation)
        self._touch(conversation)
        return snapshot(self._db, conversation), token

    def undo(self, token: str) -> Snapshot:
        row = self._db.one("SELECT * FROM undo WHERE token = :token", token=token)
        if row is None:
            raise NotFound("There is nothing to undo any more.")
        conversation = row["conversation"]
        self._db.hold(conversation)
        if self._db.one("SELECT token FROM undo WHERE token = :token AND undone = 1", token=token):
            return snapshot(self._db, conversation)
        parent = node_row(self._db, row["node"], deleted=True)["parent"]
        if parent is not None and node_row(self._db, parent, deleted=True)["deleted"] is not None:
            raise Conflict("The message above it was deleted too.", hint="Bring that one back first.")
        self._db.run("UPDATE nodes SET deleted = NULL WHERE deleted = :token", token=token)
        self._db.run("UPDATE undo SET undone = 1 WHERE token = :token", token=token)
        if row["leaf"] in Outline(self._db, conversation).parent:
            self._db.run("UPDATE conversations SET leaf = :leaf WHERE id = :id", leaf=row["leaf"], id=conversation)
        self._touch(conversation)
        return snapshot(self._db, conversation)

    # -- helpers

    def _acted(self, client_id: str, kind: str, conversation: str, node: str) -> Change:
        """The end of an action: the path leads to its node, the action is remembered, the revision counts on."""
        self._db.run("UPDATE conversations SET leaf = :leaf WHERE id = :id", leaf=node, id=conversation)
        self._db.run(
            "INSERT INTO actions (client_id, kind, conversation, node, created_at) "
            "VALUES (:client_id, :kind, :conversation, :node, :now)",
            client_id=client_id, kind=kind, conversation=conversation, node=node, now=time.time(),
        )  # fmt: skip
        self._touch(conversation)
        return Change(snapshot(self._db, conversation), node)

    def _seen(self, client_id: str, kind: str, generation: str | None) -> Change | None:
        row = self._db.one(
            "SELECT a.kind, a.conversation, a.node, n.generation, n.text FROM actions a LEFT JOIN nodes n ON n.id = a.node "
            "WHERE a.client_id = :client_id",
            client_id=client_id,
        )
        if row is None:
            return None
        if row["kind"] != kind:
            raise InvalidParameter("This client_id was used for another action.", param="client_id")
        # The same generation too: it is our own first try, whose commit went through while the connection broke.
        fresh = generation is not None and row["generation"] == self._owner + generation
        return Change(snapshot(self._db, row["conversation"]), row["node"], fresh, prefix=row["text"] if fresh else "")

    def _leaf_through(self, conversation: str, node: Any) -> str:
        outline = Outline(self._db, conversation)
        if not isinstance(node, str) or node not in outline.parent:
            raise NotFound("There is no such message in this conversation.", param="leaf")
        return outline.newest_leaf(node)

    def _live_ancestor(self, conversation: str, node: str) -> str | None:
        current: str | None = node
        while current is not None:
            row = self._db.one(_OF_CONVERSATION, id=current, conversation=conversation)
            if row is None:
                raise NotFound("There is no such message in this conversation.", param="parent")
            if row["deleted"] is None:
                return current
            current = row["parent"]
        return None

    def _require_active(self, row: Row) -> None:
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

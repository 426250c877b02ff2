"""Reading conversations out of the database: paths, siblings, snapshots."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from modules.chat.store import NewConversation, NewNode, Node, Snapshot
from modules.errors import NotFound

if TYPE_CHECKING:
    from modules.chat.database import Database, Row

_NODE_COLUMNS = "id, parent, role, text, created_at, status, model, loader, receipt, error"


def conversation_row(db: Database, conversation: str) -> Row:
    row = db.one("SELECT * FROM conversations WHERE id = :id", id=conversation)
    if row is None:
        raise NotFound("There is no such conversation.", hint="It may have been deleted.", param="conversation")
    return row


def node_row(db: Database, node: str, *, deleted: bool = False) -> Row:
    """The node's row; a deleted one counts as missing unless `deleted`."""
    row = db.one("SELECT * FROM nodes WHERE id = :id", id=node)
    if row is None or (row["deleted"] is not None and not deleted):
        raise NotFound("There is no such message.", hint="It may have been deleted; reload the conversation.", param="message")
    return row


class Outline:
    """The shape of one conversation's live tree, without its texts."""

    def __init__(self, db: Database, conversation: str) -> None:
        self.parent: dict[str, str | None] = {}
        self.children: dict[str | None, list[str]] = defaultdict(list)
        self.order: dict[str, int] = {}
        self.status: dict[str, str] = {}
        rows = db.all(
            "SELECT seq, id, parent, status FROM nodes WHERE conversation = :id AND deleted IS NULL ORDER BY seq", id=conversation
        )
        for row in rows:
            node = row["id"]
            self.parent[node] = row["parent"]
            self.children[row["parent"]].append(node)
            self.order[node] = row["seq"]
            self.status[node] = row["status"]

    def path(self, leaf: str | None) -> list[str]:
        """From the first message to `leaf`. Empty for None or a node that is gone."""
        path: list[str] = []
        node = leaf
        while node is not None and node in self.parent:
            path.append(node)
            node = self.parent[node]
        return path[::-1] if node is None else []

    def shown(self, leaf: str | None) -> list[str]:
        """The path on screen: to the stored leaf, or to the newest end where that is gone."""
        return self.path(leaf) or self.path(self.newest_end())

    def below(self, node: str) -> list[str]:
        """`node` and everything under it."""
        found = [node]
        for current in found:
            found.extend(self.children.get(current, ()))
        return found

    def newest_leaf(self, node: str) -> str:
        """Of all ends below `node`, the one written last."""
        ends = [n for n in self.below(node) if not self.children.get(n)]
        return max(ends, key=self.order.__getitem__)

    def newest_end(self) -> str | None:
        """The leaf to show when the stored one is gone."""
        roots = self.children.get(None)
        return self.newest_leaf(roots[-1]) if roots else None


def read_nodes(db: Database, outline: Outline, ids: list[str]) -> tuple[Node, ...]:
    rows = {row["id"]: row for row in db.pick(f"SELECT {_NODE_COLUMNS} FROM nodes", "id", ids)}
    return tuple(_node(rows[i], tuple(outline.children[outline.parent[i]])) for i in ids)


def snapshot(db: Database, conversation: str) -> Snapshot:
    row = conversation_row(db, conversation)
    outline = Outline(db, conversation)
    path = outline.shown(row["leaf"])
    return Snapshot(
        id=row["id"],
        title=row["title"],
        pinned=bool(row["pinned"]),
        trashed=bool(row["trashed"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        revision=row["revision"],
        system_prompt=row["system_prompt"],
        leaf=path[-1] if path else None,
        messages=read_nodes(db, outline, path),
    )


def path_to(db: Database, node: str) -> tuple[str, tuple[Node, ...]]:
    conversation = node_row(db, node)["conversation"]
    outline = Outline(db, conversation)
    system_prompt = conversation_row(db, conversation)["system_prompt"]
    return system_prompt, read_nodes(db, outline, outline.path(node))


def subtree(db: Database, node: str) -> tuple[str, ...]:
    return tuple(Outline(db, node_row(db, node)["conversation"]).below(node))


def whole(db: Database, conversation: str) -> NewConversation:
    """The live tree as it would be imported; the store's ids serve as keys."""
    row = conversation_row(db, conversation)
    outline = Outline(db, conversation)
    nodes = read_nodes(db, outline, list(outline.parent))
    shown = outline.shown(row["leaf"])
    return NewConversation(
        title=row["title"],
        system_prompt=row["system_prompt"],
        pinned=bool(row["pinned"]),
        created_at=row["created_at"],
        leaf=shown[-1] if shown else None,
        nodes=tuple(
            NewNode(
                key=n.id,
                parent=n.parent,
                role=n.role,
                text=n.text,
                created_at=n.created_at,
                status="interrupted" if n.status == "generating" else n.status,
                model=n.model,
                loader=n.loader,
                receipt=n.receipt,
                error=n.error,
            )
            for n in nodes
        ),
    )


def _node(row: Row, siblings: tuple[str, ...]) -> Node:
    return Node(
        id=row["id"],
        parent=row["parent"],
        role=row["role"],
        text=row["text"],
        created_at=row["created_at"],
        status=row["status"],
        siblings=siblings,
        model=row["model"],
        loader=row["loader"],
        receipt=_json(row["receipt"]),
        error=_json(row["error"]),
    )


def _json(text: str | None) -> dict[str, Any] | None:
    value = json.loads(text) if text else None
    return value if isinstance(value, dict) else None

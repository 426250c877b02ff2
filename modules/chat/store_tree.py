"""Reading conversations out of SQLite: paths, siblings, snapshots."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from typing import Any

from modules.chat.store import NewConversation, NewNode, Node, Snapshot
from modules.errors import NotFound

_NODE_COLUMNS = "id, parent, role, text, created_at, status, model, loader, receipt, error"


def conversation_row(connection: sqlite3.Connection, conversation: str) -> sqlite3.Row:
    row = connection.execute("SELECT * FROM conversations WHERE id = ?", (conversation,)).fetchone()
    if row is None:
        raise NotFound("There is no such conversation.", hint="It may have been deleted.", param="conversation")
    assert isinstance(row, sqlite3.Row)
    return row


def node_row(connection: sqlite3.Connection, node: str, *, deleted: bool = False) -> sqlite3.Row:
    """The node's row; a deleted one counts as missing unless `deleted`."""
    row = connection.execute("SELECT * FROM nodes WHERE id = ?", (node,)).fetchone()
    if row is None or (row["deleted"] is not None and not deleted):
        raise NotFound("There is no such message.", hint="It may have been deleted; reload the conversation.", param="message")
    assert isinstance(row, sqlite3.Row)
    return row


class Outline:
    """The shape of one conversation's live tree, without its texts."""

    def __init__(self, connection: sqlite3.Connection, conversation: str) -> None:
        self.parent: dict[str, str | None] = {}
        self.children: dict[str | None, list[str]] = defaultdict(list)
        self.order: dict[str, int] = {}
        self.status: dict[str, str] = {}
        rows = connection.execute(
            "SELECT seq, id, parent, status FROM nodes WHERE conversation = ? AND deleted IS NULL ORDER BY seq", (conversation,)
        )
        for seq, node, parent, status in rows:
            self.parent[node] = parent
            self.children[parent].append(node)
            self.order[node] = seq
            self.status[node] = status

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


def read_nodes(connection: sqlite3.Connection, outline: Outline, ids: list[str]) -> tuple[Node, ...]:
    rows: dict[str, sqlite3.Row] = {}
    for begin in range(0, len(ids), 500):  # SQLite's limit on parameters is 999 in old builds
        part = ids[begin : begin + 500]
        marks = ",".join("?" * len(part))
        for row in connection.execute(f"SELECT {_NODE_COLUMNS} FROM nodes WHERE id IN ({marks})", part):
            rows[row["id"]] = row
    return tuple(_node(rows[i], tuple(outline.children[outline.parent[i]])) for i in ids)


def snapshot(connection: sqlite3.Connection, conversation: str) -> Snapshot:
    row = conversation_row(connection, conversation)
    outline = Outline(connection, conversation)
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
        messages=read_nodes(connection, outline, path),
    )


def path_to(connection: sqlite3.Connection, node: str) -> tuple[str, tuple[Node, ...]]:
    conversation = node_row(connection, node)["conversation"]
    outline = Outline(connection, conversation)
    system_prompt = conversation_row(connection, conversation)["system_prompt"]
    return system_prompt, read_nodes(connection, outline, outline.path(node))


def subtree(connection: sqlite3.Connection, node: str) -> tuple[str, ...]:
    return tuple(Outline(connection, node_row(connection, node)["conversation"]).below(node))


def whole(connection: sqlite3.Connection, conversation: str) -> NewConversation:
    """The live tree as it would be imported; the store's ids serve as keys."""
    row = conversation_row(connection, conversation)
    outline = Outline(connection, conversation)
    nodes = read_nodes(connection, outline, list(outline.parent))
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


def _node(row: sqlite3.Row, siblings: tuple[str, ...]) -> Node:
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

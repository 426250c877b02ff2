"""Finding conversations: an index over trigrams where the database has one, a scan where it has not.

All answer alike: every word of the query must occur, as a piece of text and whatever its case, in the title or
together in one message. The index is kept by the store's own writes, not by triggers, so a SQLite file that was indexed by
one build still opens in another; nodes the index does not know yet are marked `indexed = 0`.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modules.chat.store import Summary

if TYPE_CHECKING:
    from modules.chat.database import Database, Row

_SNIPPET = 160
_EVERYTHING = 1 << 30


class Search(ABC):
    """The index of one database."""

    @abstractmethod
    def prepare(self, db: Database) -> None:
        """Inside a transaction: make the index and bring it up to date."""

    @abstractmethod
    def add(self, db: Database, nodes: Sequence[str]) -> None:
        """(Re)index these nodes, by id; not those whose text still grows. Without an index they stay marked for later."""

    @abstractmethod
    def forget(self, db: Database, conversation: str) -> None: ...

    @abstractmethod
    def matches(self, db: Database, words: list[str]) -> dict[str, int]:
        """conversation -> the newest node (its `seq`) that holds every word; the words are case folded."""

    def find(self, db: Database, query: str, trashed: bool, limit: int) -> list[Summary]:
        """The lines of the list, at most `limit`; snippets are around the match."""
        words = query.casefold().split()[:16]
        asked: dict[str, Any] = {"trashed": int(trashed), "snippet": _SNIPPET}
        if not words:
            return [_summary(row, row["newest"] or "", []) for row in db.all(_LIST, limit=limit, **asked)]
        hits = self.matches(db, words)
        rows = [
            row
            for row in db.all(_LIST, limit=_EVERYTHING, **asked)
            if row["id"] in hits or all(word in row["title"].casefold() for word in words)
        ][:limit]
        shown = [hits[row["id"]] for row in rows if row["id"] in hits]
        texts = {row["seq"]: row["text"] for row in db.pick("SELECT seq, text FROM nodes", "seq", shown)}
        return [
            _summary(row, texts[hits[row["id"]]], words) if row["id"] in hits else _summary(row, row["newest"] or "", [])
            for row in rows
        ]


class SqliteSearch(Search):
    """FTS5's trigrams. `full_text` False forces the scan (and is what a build without FTS5 gets)."""

    def __init__(self, connection: sqlite3.Connection, full_text: bool | None = None) -> None:
        self.full_text = has_full_text(connection) if full_text is None else full_text
        connection.create_function("fold", 1, lambda text: (text or "").casefold(), deterministic=True)

    def prepare(self, db: Database) -> None:
        if self.full_text:
            db.run("CREATE VIRTUAL TABLE IF NOT EXISTS nodes_text USING fts5(text, tokenize = 'trigram')")
            self.add(db, [row["id"] for row in db.all("SELECT id FROM nodes WHERE indexed = 0")])

    def add(self, db: Database, nodes: Sequence[str]) -> None:
        if self.full_text:
            which = [{"id": node} for node in nodes]
            of = "WHERE id = :id AND status <> 'generating'"
            db.many(f"INSERT OR REPLACE INTO nodes_text (rowid, text) SELECT seq, text FROM nodes {of}", which)
            db.many(f"UPDATE nodes SET indexed = 1 {of}", which)

    def forget(self, db: Database, conversation: str) -> None:
        if self.full_text:
            db.run("DELETE FROM nodes_text WHERE rowid IN (SELECT seq FROM nodes WHERE conversation = :id)", id=conversation)

    def matches(self, db: Database, words: list[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        unindexed = ""
        if self.full_text and all(len(word) >= 3 for word in words):
            phrase = " AND ".join('"' + word.replace('"', '""') + '"' for word in words)
            found.update((row["conversation"], row["seq"]) for row in db.all(_BY_INDEX, phrase=phrase))
            unindexed = " AND indexed = 0"
        values = {f"w{n}": word for n, word in enumerate(words)}
        scan = "".join(f" AND instr(fold(text), :{name})" for name in values)
        of = f"FROM nodes WHERE deleted IS NULL{scan}{unindexed} GROUP BY conversation"
        for row in db.all(f"SELECT conversation, max(seq) AS seq {of}", **values):
            found[row["conversation"]] = max(row["seq"], found.get(row["conversation"], 0))
        return found


def has_full_text(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("CREATE VIRTUAL TABLE temp.probe USING fts5(text, tokenize = 'trigram')")
        connection.execute("DROP TABLE temp.probe")
    except sqlite3.OperationalError:
        return False
    return True


_LIST = """
SELECT c.*, substr(COALESCE(NULLIF(n.text, ''), p.text), 1, :snippet) AS newest,
    EXISTS (SELECT 1 FROM nodes g WHERE g.conversation = c.id AND g.status = 'generating' AND g.deleted IS NULL) AS generating
FROM conversations c LEFT JOIN nodes n ON n.id = c.leaf LEFT JOIN nodes p ON p.id = n.parent
WHERE c.trashed = :trashed ORDER BY c.pinned DESC, c.touched DESC LIMIT :limit
"""
# Without the texts: they lie on pages of their own, and a common word has thousands.
_BY_INDEX = """
SELECT n.conversation AS conversation, max(n.seq) AS seq FROM nodes_text t JOIN nodes n ON n.seq = t.rowid
WHERE nodes_text MATCH :phrase AND n.deleted IS NULL GROUP BY n.conversation
"""


def _summary(row: Row, text: str, words: list[str]) -> Summary:
    return Summary(
        id=row["id"],
        title=row["title"],
        pinned=bool(row["pinned"]),
        trashed=bool(row["trashed"]),
        updated_at=row["updated_at"],
        snippet=excerpt(text, words),
        generating=bool(row["generating"]),
    )


def excerpt(text: str, words: list[str]) -> str:
    """One line around the first of the words."""
    places = [place for word in words if (place := text.casefold().find(word)) >= 0]
    begin = max(0, min(places, default=0) - _SNIPPET // 4)
    piece = " ".join(text[begin : begin + _SNIPPET].split())
    return ("…" if begin else "") + piece + ("…" if begin + _SNIPPET < len(text) else "")

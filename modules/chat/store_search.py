"""Finding conversations: SQLite's full-text index over trigrams where the build has it, a scan where it has not.

Both answer alike: every word of the query must occur, as a piece of text and whatever its case, in the title or
together in one message. The index is kept by the store's own writes, not by triggers, so a file that was indexed by one
build still opens in another; nodes the index does not know yet are marked `indexed = 0`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from modules.chat.store import Summary

_SNIPPET = 160


def has_full_text(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("CREATE VIRTUAL TABLE temp.probe USING fts5(text, tokenize = 'trigram')")
        connection.execute("DROP TABLE temp.probe")
    except sqlite3.OperationalError:
        return False
    return True


class Search:
    """`full_text` False forces the scan (and is what a build without FTS5 gets)."""

    def __init__(self, connection: sqlite3.Connection, full_text: bool | None = None) -> None:
        self.full_text = has_full_text(connection) if full_text is None else full_text
        connection.create_function("fold", 1, lambda text: (text or "").casefold(), deterministic=True)

    def prepare(self, connection: sqlite3.Connection) -> None:
        """Inside a transaction: make the index and bring it up to date."""
        if not self.full_text:
            return
        connection.execute("CREATE VIRTUAL TABLE IF NOT EXISTS nodes_text USING fts5(text, tokenize = 'trigram')")
        self.add(connection, [seq for (seq,) in connection.execute("SELECT seq FROM nodes WHERE indexed = 0").fetchall()])

    def add(self, connection: sqlite3.Connection, seqs: Iterable[int]) -> None:
        """(Re)index these nodes. Without an index they stay marked for the next build that has one."""
        if not self.full_text:
            return
        for seq in seqs:
            text, status = connection.execute("SELECT text, status FROM nodes WHERE seq = ?", (seq,)).fetchone()
            if status == "generating":
                continue  # its text still grows; `finish` comes
            connection.execute("INSERT OR REPLACE INTO nodes_text (rowid, text) VALUES (?, ?)", (seq, text))
            connection.execute("UPDATE nodes SET indexed = 1 WHERE seq = ?", (seq,))

    def forget(self, connection: sqlite3.Connection, conversation: str) -> None:
        if self.full_text:
            connection.execute(
                "DELETE FROM nodes_text WHERE rowid IN (SELECT seq FROM nodes WHERE conversation = ?)", (conversation,)
            )

    def find(self, connection: sqlite3.Connection, query: str, trashed: bool, limit: int) -> list[Summary]:
        words = query.casefold().split()[:16]
        if not words:
            rows = connection.execute(_LIST, {"trashed": int(trashed), "limit": limit, "snippet": _SNIPPET}).fetchall()
            return [_summary(row, row["newest"] or "", []) for row in rows]
        hits = self._texts(connection, words)
        rows = connection.execute(_LIST, {"trashed": int(trashed), "limit": -1, "snippet": _SNIPPET}).fetchall()
        found: list[Summary] = []
        for row in rows:
            if row["id"] in hits:
                found.append(_summary(row, hits[row["id"]], words))
            elif all(word in row["title"].casefold() for word in words):
                found.append(_summary(row, row["newest"] or "", []))
            if len(found) == limit:
                break
        return found

    def _texts(self, connection: sqlite3.Connection, words: list[str]) -> dict[str, str]:
        """conversation -> the newest text that holds every word."""
        found: dict[str, int] = {}
        if self.full_text and all(len(word) >= 3 for word in words):
            phrase = " AND ".join('"' + word.replace('"', '""') + '"' for word in words)
            found.update(connection.execute(_BY_INDEX, (phrase,)))
            scan = _scan(words) + " AND indexed = 0"
        else:
            scan = _scan(words)
        for conversation, seq in connection.execute(scan + " GROUP BY conversation", words):
            found[conversation] = max(seq, found.get(conversation, 0))
        texts: dict[str, str] = {}
        for conversation, seq in found.items():
            texts[conversation] = connection.execute("SELECT text FROM nodes WHERE seq = ?", (seq,)).fetchone()[0]
        return texts


_LIST = """
SELECT c.*, substr(COALESCE(NULLIF(n.text, ''), p.text), 1, :snippet) AS newest,
    EXISTS (SELECT 1 FROM nodes g WHERE g.conversation = c.id AND g.status = 'generating' AND g.deleted IS NULL) AS generating
FROM conversations c LEFT JOIN nodes n ON n.id = c.leaf LEFT JOIN nodes p ON p.id = n.parent
WHERE c.trashed = :trashed ORDER BY c.pinned DESC, c.touched DESC LIMIT :limit
"""
# Without the texts: they lie on pages of their own, and a common word has thousands.
_BY_INDEX = """
SELECT n.conversation, max(n.seq) FROM nodes_text t JOIN nodes n ON n.seq = t.rowid
WHERE nodes_text MATCH ? AND n.deleted IS NULL GROUP BY n.conversation
"""


def _scan(words: list[str]) -> str:
    return "SELECT conversation, max(seq) FROM nodes WHERE deleted IS NULL" + " AND instr(fold(text), ?)" * len(words)


def _summary(row: sqlite3.Row, text: str, words: list[str]) -> Summary:
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

"""One open transaction, on SQLite or on PostgreSQL, as the store's SQL sees it.

The SQL is written once, with `:name` parameters and the words both databases know. What they do differently has a method here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from modules.chat.store_images import ImageFolder


class Row(Protocol):
    """A row: its columns by name."""

    def __getitem__(self, column: str, /) -> Any: ...


class Database(Protocol):
    def all(self, sql: str, **values: Any) -> Sequence[Row]: ...

    def one(self, sql: str, **values: Any) -> Row | None:
        """The first row."""

    def run(self, sql: str, **values: Any) -> int:
        """How many rows were changed."""

    def many(self, sql: str, values: Sequence[dict[str, Any]]) -> None:
        """Run it once for each."""

    def pick(self, select: str, column: str, values: Sequence[str] | Sequence[int]) -> Sequence[Row]:
        """The rows of `select` whose `column` is among `values`, in any order."""

    def hold(self, conversation: str) -> None:
        """Until the end of the transaction, let no other one change this conversation's tree."""

    def hold_of(self, node: str) -> None:
        """The same for the conversation of a node."""

    def count_change(self) -> int:
        """The next number of a counter that orders the list of conversations."""

    def count_from(self, touched: int, seq: int) -> None:
        """After a copy: let that counter, and the one of the nodes, go on after these."""

    def image(self, name: str) -> bytes | None:
        """None where it is gone."""

    def put_image(self, name: str, data: bytes, now: float) -> None:
        """Keep an image, or know that it has come once more. Raises StorageError."""

    def hold_images(self, names: Sequence[str]) -> None:
        """Until the end of the transaction, let no other one upload, refer to or drop these."""

    def drop_images(self, names: Sequence[str]) -> None:
        """Forget them, and with the end of the transaction their bytes."""


class SqliteDatabase:
    """The caller has begun the transaction; while it writes, SQLite lets nobody else write. `dropped` are the images whose
    files the caller removes after the commit."""

    def __init__(self, connection: sqlite3.Connection, images: ImageFolder) -> None:
        self._connection = connection
        self._images = images
        self.dropped: list[str] = []

    def all(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, **values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
        return row

    def run(self, sql: str, **values: Any) -> int:
        return self._connection.execute(sql, values).rowcount

    def many(self, sql: str, values: Sequence[dict[str, Any]]) -> None:
        self._connection.executemany(sql, values)

    def pick(self, select: str, column: str, values: Sequence[str] | Sequence[int]) -> list[sqlite3.Row]:
        rows: list[sqlite3.Row] = []
        for begin in range(0, len(values), 500):  # SQLite's limit on parameters is 999 in old builds
            part = values[begin : begin + 500]
            rows += self._connection.execute(f"{select} WHERE {column} IN ({','.join('?' * len(part))})", part)
        return rows

    def hold(self, conversation: str) -> None:
        """Held already: a writer has the whole file."""

    def hold_of(self, node: str) -> None:
        """Likewise."""

    def count_change(self) -> int:
        self.run("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'touched'")
        row = self.one("SELECT value FROM meta WHERE key = 'touched'")
        assert row is not None
        return int(row["value"])

    def count_from(self, touched: int, seq: int) -> None:
        """SQLite itself has counted the nodes."""
        self.run("UPDATE meta SET value = :touched WHERE key = 'touched'", touched=str(touched))

    def image(self, name: str) -> bytes | None:
        return self._images.read(name)

    def put_image(self, name: str, data: bytes, now: float) -> None:
        self.run(
            "INSERT INTO images (name, uploads, touched) VALUES (:name, 1, :now) "
            "ON CONFLICT (name) DO UPDATE SET uploads = uploads + 1, touched = excluded.touched",
            name=name,
            now=now,
        )
        self._images.write(name, data)

    def hold_images(self, names: Sequence[str]) -> None:
        """Held already."""

    def drop_images(self, names: Sequence[str]) -> None:
        self.many("DELETE FROM images WHERE name = :name", [{"name": name} for name in names])
        self.dropped += names

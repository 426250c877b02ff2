"""server.py chats copy FROM TO: every chat from a data folder to a database, or back; or from one of a kind to another.

One transaction of the target: all of it or nothing, so a copy that was cut off is simply begun again. Versions, deleted messages,
undo tokens, images and the order of the list go with it. What has arrived is read back and compared before it is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.chat.places import is_url, open_place
from modules.errors import AppError, StorageError, StoreCorrupt

if TYPE_CHECKING:
    import argparse

    from modules.chat.database import Database, Row
    from modules.chat.store_sql import SqlChatStore
    from modules.config import Config

_BATCH = 500
# Each table with its key, then its other columns; those that others refer to come first. Not copied: what the index knows.
_TABLES = {
    "conversations": "id title title_is_auto pinned trashed created_at updated_at touched revision system_prompt leaf",
    "nodes": "seq id conversation parent role text status created_at generation model loader receipt error deleted",
    "actions": "client_id kind conversation node created_at",
    "undo": "token conversation node leaf undone created_at",
}


@dataclass
class Count:
    """What was seen of a store; equal when the stores hold the same, in whatever order."""

    rows: dict[str, int] = field(default_factory=dict)
    digest: int = 0
    touched: int = 0
    seq: int = 0

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.rows[table] = self.rows.get(table, 0) + 1
        whole = repr((table, *row.values())).encode("utf-8", "surrogatepass")
        self.digest = (self.digest + int.from_bytes(hashlib.sha256(whole).digest(), "big")) % (1 << 256)
        self.touched = max(self.touched, row.get("touched", 0))
        self.seq = max(self.seq, row.get("seq", 0))


def copy(source: SqlChatStore, target: SqlChatStore) -> dict[str, int]:
    """Copy between two open stores that nobody else uses; how many rows of each table, how many "images", how many of those
    were "lost". Raises StoreLocked, StorageError for a target that is not empty, StoreCorrupt when what arrived differs."""
    with source.alone() as read, target.alone() as write:
        held = write.one("SELECT count(*) AS count FROM conversations")
        if held is not None and held["count"]:
            raise StorageError(
                f"The target holds {held['count']} chats already.",
                hint="Choose an empty database or data folder; nothing is merged.",
            )
        sent, arrived = Count(), Count()
        for table, columns in _TABLES.items():
            names = columns.split()
            insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES (:{', :'.join(names)})"
            for rows in _batches(read, table, names):
                write.many(insert, rows)
                for row in rows:
                    sent.add(table, row)
        images, lost = _copy_images(read, write)
        write.count_from(sent.touched, sent.seq)
        for table, columns in _TABLES.items():
            for rows in _batches(write, table, columns.split()):
                for row in rows:
                    arrived.add(table, row)
        if sent != arrived:
            raise StoreCorrupt(
                "What arrived differs from what was sent: nothing was kept.", hint="Try again; report it if it stays."
            )
        target.search_index().prepare(write)
    return {**{table: sent.rows.get(table, 0) for table in _TABLES}, "images": images, "lost": lost}


def _copy_images(read: Database, write: Database) -> tuple[int, int]:
    """(how many were copied and compared, how many were gone in the source)."""
    copied = lost = 0
    for row in read.all("SELECT name, uploads FROM images ORDER BY name"):
        name = row["name"]
        data = read.image(name)
        if data is None:
            lost += 1
            continue
        write.put_image(name, data, time.time())
        write.run("UPDATE images SET uploads = :uploads WHERE name = :name", uploads=row["uploads"], name=name)
        if write.image(name) != data:
            raise StoreCorrupt(f"The image {name} did not arrive as it was: nothing was kept.", hint="Try again.")
        copied += 1
    return copied, lost


def _batches(db: Database, table: str, names: list[str]) -> Iterator[list[dict[str, Any]]]:
    """By key, so that no store has to hold a large answer."""
    key = names[0]
    select = f"SELECT {', '.join(names)} FROM {table}"
    rows = db.all(f"{select} ORDER BY {key} LIMIT {_BATCH}")
    while rows:
        yield [_plain(row, names) for row in rows]
        rows = db.all(f"{select} WHERE {key} > :last ORDER BY {key} LIMIT {_BATCH}", last=rows[-1][key])


def _plain(row: Row, names: list[str]) -> dict[str, Any]:
    """PostgreSQL's text has no NUL."""
    return {name: value.replace("\0", "") if isinstance(value := row[name], str) else value for name in names}


# --- the command -----------------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `chats` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chats",
        help="copy all chats to another place",
        description="Copy every chat, with its images, its trash and what can be undone, between a data folder (SQLite) and a "
        "database (postgresql://user@host/database, or @FILE that holds such a line), in either direction. The target must be "
        "empty, and no server may use either place meanwhile. All of it or nothing; what arrived is compared before it is kept.",
    )
    parser.add_argument("action", choices=("copy",), help="copy all chats")
    parser.add_argument("source", metavar="FROM", help="a data folder or a database URL")
    parser.add_argument("target", metavar="TO", help="a data folder or a database URL")
    return parser


def run(arguments: argparse.Namespace, _config: Config) -> int:
    """Exit status: 0 copied, 1 refused."""
    try:
        copied = asyncio.run(_copy(arguments.source, arguments.target))
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    images = f", {copied['images']} images" if copied["images"] else ""
    print(f"Copied and compared: {copied['conversations']} chats with {copied['nodes']} messages{images}.")
    if copied["lost"]:
        print(f"Gone at the source already: {copied['lost']} images.")
    return 0


async def _copy(source: str, target: str) -> dict[str, int]:
    if not is_url(source) and not (Path(source) / "chats.sqlite").is_file():
        raise StorageError(f"There is no chats.sqlite in {source}.", hint="Name a data folder, or a database URL.")
    stores = []
    try:
        for place in (source, target):
            store = open_place(place if is_url(place) else Path(place).expanduser(), None)
            await store.open()
            stores.append(store)
        return await asyncio.to_thread(copy, *stores)
    finally:
        for store in stores:
            await store.close()

"""A copy of the chat database in memory, for while the disk takes nothing, and the way back."""

from __future__ import annotations

import sqlite3

# A larger database than this is not copied: then a message is refused while the disk refuses.
LIMIT_BYTES = 256 * 1024 * 1024


def copy_to_memory(source: sqlite3.Connection) -> sqlite3.Connection:
    """Raises sqlite3.Error when the source can't be read, or is too large."""
    pages, size = (int(source.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "page_size"))
    if pages * size > LIMIT_BYTES:
        raise sqlite3.OperationalError("the database is too large for memory")
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        source.backup(memory)
    except sqlite3.Error:
        memory.close()
        raise
    memory.row_factory = sqlite3.Row
    memory.execute("PRAGMA foreign_keys = ON")
    return memory


def write_back(memory: sqlite3.Connection, disk: sqlite3.Connection) -> None:
    """All of it or nothing. Raises sqlite3.Error when the disk still refuses."""
    # A small write first: a disk that refuses is then found out without copying everything.
    disk.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('probe', '1')")
    memory.backup(disk)

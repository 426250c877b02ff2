"""The chat store's tables, and how an older file becomes a newer one.

A conversation is a tree: a node's siblings (same parent, in order of `seq`) are versions of one another, and `leaf` says
which path is on screen. Deleting marks a subtree with an undo token; nothing leaves the file before it is purged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

# "SYCS": tells our file from another program's database.
APPLICATION_ID = 0x53594353

_VERSION_1 = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE conversations (
    id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    title_is_auto INTEGER NOT NULL DEFAULT 1,
    pinned INTEGER NOT NULL DEFAULT 0,
    trashed INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    touched INTEGER NOT NULL,
    revision INTEGER NOT NULL DEFAULT 1,
    system_prompt TEXT NOT NULL DEFAULT '',
    leaf TEXT
);
CREATE INDEX conversations_order ON conversations (trashed, pinned DESC, touched DESC);
CREATE TABLE nodes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent TEXT,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant', 'system')),
    text TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('complete', 'generating', 'interrupted', 'failed')),
    created_at REAL NOT NULL,
    generation TEXT,
    model TEXT,
    loader TEXT,
    receipt TEXT,
    error TEXT,
    deleted TEXT,
    indexed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX nodes_of_conversation ON nodes (conversation, seq);
CREATE INDEX nodes_generating ON nodes (conversation) WHERE status = 'generating';
CREATE INDEX nodes_unindexed ON nodes (seq) WHERE indexed = 0;
CREATE INDEX nodes_deleted ON nodes (deleted) WHERE deleted IS NOT NULL;
CREATE TABLE actions (
    client_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    node TEXT,
    created_at REAL NOT NULL
);
CREATE INDEX actions_of_conversation ON actions (conversation);
CREATE TABLE undo (
    token TEXT PRIMARY KEY,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    node TEXT NOT NULL,
    leaf TEXT,
    undone INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL
);
CREATE INDEX undo_of_conversation ON undo (conversation);
INSERT INTO meta (key, value) VALUES ('touched', '0');
"""

Migration = Callable[[sqlite3.Connection], None]


def _script(sql: str) -> Migration:
    def run(connection: sqlite3.Connection) -> None:
        # Not executescript: that commits first, and a migration must be one transaction.
        for statement in sql.split(";\n"):
            if statement.strip():
                connection.execute(statement)

    return run


# The n-th entry turns schema n into schema n + 1. Never edit a released entry: add one.
MIGRATIONS: tuple[Migration, ...] = (_script(_VERSION_1),)


def version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, migrations: tuple[Migration, ...] = MIGRATIONS) -> int:
    """Bring the file to the newest schema in one transaction; returns the version it had before."""
    before = version_of(connection)
    if before == len(migrations):
        return before
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in migrations[before:]:
            step(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return before

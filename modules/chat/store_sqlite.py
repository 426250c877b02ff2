"""The chat store on SQLite: one file, one thread that touches it, every save a transaction that is on disk when it returns."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from modules.chat.database import Database, SqliteDatabase
from modules.chat.schema_sql import MIGRATIONS, Migration, add_images, migrate, version_of
from modules.chat.store import Notice
from modules.chat.store_actions import Actions
from modules.chat.store_files import (
    EMPTY,
    Backups,
    DataDirLock,
    connect,
    mark_closed,
    problem_of,
    quarantine,
    read_only,
    storage_error,
)
from modules.chat.store_images import ImageFolder, adopt
from modules.chat.store_memory import copy_to_memory, write_back
from modules.chat.store_search import SqliteSearch
from modules.chat.store_sql import SqlChatStore, cut_off
from modules.errors import StorageError, StorageReadOnly, StoreCorrupt

T = TypeVar("T")


class SqliteChatStore(SqlChatStore):
    """`folder` is the data folder; the database is `chats.sqlite` in it."""

    def __init__(
        self,
        folder: Path,
        *,
        migrations: tuple[Migration, ...] = MIGRATIONS,
        full_text: bool | None = None,
    ) -> None:
        self.path = folder / "chats.sqlite"
        self.backups = Backups(self.path)
        self._images = ImageFolder(folder / "attachments")
        self.notices = []
        self.memory_only = None
        self._folder = folder
        self._lock = DataDirLock(folder)
        self._migrations = migrations
        self._full_text = full_text
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-store")
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-backup")
        self._connection: sqlite3.Connection | None = None
        self._search: SqliteSearch | None = None
        self._inode: tuple[int, int] | None = None

    # -- life

    async def open(self) -> list[Notice]:
        self.notices = await self._in_thread(self._open)
        return self.notices

    async def close(self) -> None:
        await self._in_thread(self._close)
        self._thread.shutdown(wait=False)
        self._copier.shutdown(wait=False)

    async def backup(self) -> str | None:
        def make() -> str | None:
            try:
                made = self.backups.make()
            except sqlite3.Error as error:
                raise storage_error(error) from error
            except OSError as error:
                raise StorageError(f"A backup could not be made: {error.strerror or error}.") from error
            return made.name if made else None

        return await asyncio.get_running_loop().run_in_executor(self._copier, make)

    def _open(self) -> list[Notice]:
        self._lock.acquire()
        try:
            notices = self._repair()
            self._connect()
            return notices + self._prepare()
        except sqlite3.Error as error:
            self._close()
            raise storage_error(error) from error
        except OSError as error:
            self._close()
            raise read_only(self._folder, error) from error
        except BaseException:
            self._close()
            raise

    def _repair(self) -> list[Notice]:
        problem = problem_of(self.path, len(self._migrations))
        backups = self.backups.newest_first()
        if problem is None:
            if backups and not self.path.exists():
                where = f"There are backups in {backups[0].parent}."
                return [Notice("warning", f"chats.sqlite is missing, so a new one was made. {where}")]
            return []
        if problem == EMPTY and not backups:
            return []  # the first start was cut off before it made its tables
        moved = quarantine(self.path)
        restored = self.backups.restore()
        what = f"The newest good backup ({restored.name}) was taken." if restored else "There is no backup: a new one was begun."
        return [Notice("error", f"The chat database could not be read ({problem}). It was kept as {moved.name}. {what}")]

    def _connect(self) -> None:
        connection = connect(self.path)
        try:
            # A network folder may refuse WAL; the older journal is as safe, only slower.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            self._search = SqliteSearch(connection, self._full_text)
            status = self.path.stat()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._inode = (status.st_dev, status.st_ino)

    def _prepare(self) -> list[Notice]:
        connection = self._connection
        assert connection is not None and self._search is not None
        if 0 < version_of(connection) < len(self._migrations):
            self.backups.make(only_if_changed=False)  # the way back if the new version disappoints
        migrate(connection, self._migrations)
        with _transaction(connection):
            add_images(connection)
            db = SqliteDatabase(connection, self._images)
            adopt(db, self._images)
            # No generation of an earlier process lives on.
            interrupted = db.run("UPDATE nodes SET status = 'interrupted', generation = NULL WHERE status = 'generating'")
            self._search.prepare(db)
            mark_closed(connection, False)
        return [cut_off(interrupted)] if interrupted else []

    async def stop_elsewhere(self, node: str) -> None:
        """There is nobody else."""

    async def save_again(self) -> bool:
        return await self._in_thread(self._save_again)

    def _close(self) -> None:
        if self.memory_only is not None and not self._save_again():
            assert self._connection is not None
            self._connection.close()  # the page has said so from the first moment
            self._connection = None
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # a full disk, or a start that failed: then the next start checks it all
                mark_closed(self._connection, True)
            self._connection.close()
            self._connection = None
        self._lock.release()

    # -- the thread

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _write(self, action: Callable[[Actions], T]) -> T:
        def run() -> T:
            if self.memory_only is None:
                try:
                    return self._transact(action)
                except StorageReadOnly as failure:
                    self._go_to_memory(failure)
            return self._transact(action)

        return await self._in_thread(run)

    def _transact(self, action: Callable[[Actions], T]) -> T:
        connection, search = self._ready()
        try:
            db = SqliteDatabase(connection, self._images)
            with _transaction(connection):
                result = action(Actions(db, search))
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if self.memory_only is None:
            self._images.remove(db.dropped)  # in the thread of every write: nobody can have uploaded one meanwhile
        return result

    async def _read(self, query: Callable[[Database], T]) -> T:
        def run() -> T:
            connection, _ = self._ready(writing=False)
            try:
                return query(SqliteDatabase(connection, self._images))
            except sqlite3.Error as error:
                raise self._failed(error) from error

        return await self._in_thread(run)

    def _ready(self, writing: bool = True) -> tuple[sqlite3.Connection, SqliteSearch]:
        if self._inode is None:
            raise StorageError("The chat store is not open.")
        if self.memory_only is None and (writing or self._connection is None) and not self._in_place():
            raise StorageReadOnly(
                "The data folder was moved or removed while the server runs: nothing more can be saved.",
                hint="Put it back.",
            )
        if self._connection is None:
            try:
                self._connect()
            except (sqlite3.Error, OSError) as error:
                raise StorageReadOnly("The chat database can't be opened any more.", hint="Check the disk.") from error
        assert self._connection is not None and self._search is not None
        return self._connection, self._search

    def search_index(self) -> SqliteSearch:
        assert self._search is not None
        return self._search

    @contextlib.contextmanager
    def alone(self) -> Iterator[Database]:
        connection, _ = self._ready()
        try:
            with _transaction(connection):
                yield SqliteDatabase(connection, self._images)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    # -- a disk that takes nothing any more

    def _go_to_memory(self, failure: StorageReadOnly) -> None:
        """Go on with a copy in memory, of what was saved last. Raises `failure` where even that can't be read."""
        try:
            source = self._connection or connect(self.path, read_only_mode=True)
            memory = copy_to_memory(source)
        except (sqlite3.Error, OSError):
            raise failure from None
        source.close()
        self._connection, self._search = memory, SqliteSearch(memory, self._full_text)
        self.memory_only = failure

    def _save_again(self) -> bool:
        """Write the whole copy as one transaction, through a connection that has failed at nothing yet."""
        if self.memory_only is None:
            return True
        memory = self._connection
        assert memory is not None
        try:
            if not self._in_place():
                return False
            self._connect()
            assert self._connection is not None
            write_back(memory, self._connection)
        except (sqlite3.Error, OSError):
            if self._connection is not memory and self._connection is not None:
                self._connection.close()
            self._connection, self._search = memory, SqliteSearch(memory, self._full_text)
            return False
        memory.close()
        self.memory_only = None
        return True

    def _in_place(self) -> bool:
        """Writes to a removed file succeed on POSIX, and are lost."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def _failed(self, error: sqlite3.Error) -> StorageError:
        failure = storage_error(error)
        if "disk I/O" in str(error) or isinstance(failure, StoreCorrupt):
            # After a failed fsync nobody knows what this connection's pages are worth: the next call begins a new one.
            if self._connection is not None:
                self._connection.close()
            self._connection = None
        return failure


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE … COMMIT; anything raised inside, or by the commit itself, leaves the file as it was."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself after the worst errors
            connection.execute("ROLLBACK")
        raise

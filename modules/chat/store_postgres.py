"""The chat store on PostgreSQL, which any number of servers share.

A change holds its conversation by a row lock, so that what one process does in turn many processes do in turn. Each commit is
notified to the other servers. Where the connection breaks, a transaction that can't have been committed is run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from modules.chat import postgres
from modules.chat.presence import CHANNEL, Presence
from modules.chat.schema_sql import POSTGRESQL_MIGRATIONS, Migration
from modules.chat.store_actions import Actions
from modules.chat.store_files import DataDirLock
from modules.chat.store_images import ImageFolder, adopt
from modules.chat.store_sql import SqlChatStore, cut_off
from modules.errors import StorageError, StorageUnreachable, StoreLocked

if TYPE_CHECKING:
    from pathlib import Path

    from modules.chat.database import Database
    from modules.chat.store import Notice

log = logging.getLogger(__name__)
T = TypeVar("T")
TRIES = 8
_STOP = "stop:"


class PostgresChatStore(SqlChatStore):
    """`folder` is this server's own data folder (settings, logs), which stays one server's; the chats are in the database.
    None: no server, a command that uses the database only."""

    def __init__(self, url: str, folder: Path | None, *, migrations: tuple[Migration, ...] = POSTGRESQL_MIGRATIONS) -> None:
        self.notices: list[Notice] = []
        self.memory_only = None
        self._engine = postgres.connect_engine(postgres.parse_url(url))
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._migrations = migrations
        self._lock = DataDirLock(folder) if folder is not None else None
        self._images = ImageFolder(folder / "attachments") if folder is not None else None
        self._search = postgres.PostgresSearch()
        self._threads = ThreadPoolExecutor(max_workers=postgres.CONNECTIONS, thread_name_prefix="chat-store")
        self._presence: Presence | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orphans: set[str] = set()  # generations that may be in the database, and that nobody runs

    # -- life

    async def open(self) -> list[Notice]:
        self._loop = asyncio.get_running_loop()
        self.notices = await self._in_thread(self._open)
        return self.notices

    async def close(self) -> None:
        await self._in_thread(self._close)
        self._threads.shutdown(wait=False)

    async def save_again(self) -> bool:
        return True

    async def stop_elsewhere(self, node: str) -> None:
        def ask() -> None:
            with self._engine.begin() as connection:
                _notify(postgres.PostgresDatabase(connection), self._owner[:-1], f"{_STOP}{node}")

        await self._in_thread(lambda: self._trying(ask))

    async def backup(self) -> str | None:
        """The database has its own (pg_dump, archiving)."""
        return None

    def _open(self) -> list[Notice]:
        if self._lock is not None:
            self._lock.acquire()
        try:
            postgres.migrate(self._engine, self._migrations)
            slow = postgres.index_trigrams(self._engine)
            if slow is not None:
                log.info("searching many chats is slow without PostgreSQL's pg_trgm: %s", slow)
            self._presence = Presence(self._engine, self._heard, self._look)
            self._presence.connect()
            interrupted = self._interrupt_dead()
            with self._engine.begin() as connection:
                db = postgres.PostgresDatabase(connection)
                self._search.prepare(db)
                if self._images is not None:
                    adopt(db, self._images)  # an older version kept them with each server
            self._presence.start()
        except DBAPIError as error:
            self._close()
            raise postgres.storage_error(error) from None  # SQLAlchemy's own words hold the statement
        except BaseException:
            self._close()
            raise
        return [cut_off(interrupted)] if interrupted else []

    def _close(self) -> None:
        if self._presence is not None:
            self._presence.close()
            self._presence = None
        self._engine.dispose()
        if self._lock is not None:
            self._lock.release()

    # -- the others

    @property
    def _owner(self) -> str:
        if self._presence is None:
            raise StorageError("The chat store is not open.")
        return f"{self._presence.number}/"

    def _heard(self, payload: str | None) -> None:
        """In the presence's thread: "<server> <conversation>" or "<server> stop:<node>"; None: something may have been missed."""
        sender, _, what = (payload or "").partition(" ")
        if self._presence is not None and sender == str(self._presence.number):
            return
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._tell, what or None)

    def _tell(self, what: str | None) -> None:
        if what is not None and what.startswith(_STOP):
            if self.on_stop is not None:
                self.on_stop(what[len(_STOP) :])
        elif self.on_change is not None:
            self.on_change(what)

    def _look(self) -> None:
        self._interrupt_dead()
        if self._orphans:
            orphans = list(self._orphans)
            with self._engine.begin() as connection:
                db = postgres.PostgresDatabase(connection)
                for row in postgres.interrupt(db, orphans):
                    _notify(db, "0", row["conversation"])
            self._orphans.difference_update(orphans)

    def _interrupt_dead(self) -> int:
        """Answers whose server has ended; every page hears of them, our own too."""
        with self._engine.begin() as connection:
            db = postgres.PostgresDatabase(connection)
            rows = postgres.interrupt_dead(db)
            for conversation in {row["conversation"] for row in rows}:
                _notify(db, "0", conversation)
        return len(rows)

    # -- transactions

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _read(self, query: Callable[[Database], T]) -> T:
        def run() -> T:
            with self._reader.connect() as connection:
                return query(postgres.PostgresDatabase(connection))

        return await self._in_thread(lambda: self._trying(run))

    async def _write(self, action: Callable[[Actions], T]) -> T:
        return await self._in_thread(lambda: self._trying(lambda: self._transact(action)))

    async def _write_once(self, action: Callable[[Actions], T]) -> T:
        return await self._in_thread(lambda: self._trying(lambda: self._transact(action), repeat_commit=False))

    def search_index(self) -> postgres.PostgresSearch:
        return self._search

    @contextlib.contextmanager
    def alone(self) -> Iterator[Database]:
        try:
            with self._engine.execution_options(isolation_level="REPEATABLE READ").begin() as connection:
                db = postgres.PostgresDatabase(connection)
                self._refuse_others(db)
                yield db
                self._refuse_others(db)
        except DBAPIError as error:
            raise postgres.storage_error(error) from None

    def _refuse_others(self, db: Database) -> None:
        others = postgres.living(db) - {int(self._owner[:-1])}
        if others:
            raise StoreLocked(f"{len(others)} servers use the database.", hint="Stop them first.")

    def _transact(self, action: Callable[[Actions], T]) -> T:
        with self._engine.connect() as connection:
            db = postgres.PostgresDatabase(connection)
            do = Actions(db, self._search, self._owner)
            result = action(do)
            if do.changed is not None:
                _notify(db, self._owner[:-1], do.changed)
            try:
                connection.commit()
            except DBAPIError as error:
                raise _CommitLost(error, do.generation) from error
            return result

    def _trying(self, run: Callable[[], T], repeat_commit: bool = True) -> T:
        """Run it until it is through, or can't be. A connection that broke is tried anew once; a commit whose answer was lost is
        repeated only where the action then finds what it did."""
        lost = 0
        unsure: str | None = None
        for attempt in range(TRIES):
            try:
                return run()
            except _CommitLost as error:
                failure, again = error.cause, repeat_commit or postgres.is_passing(error.cause)
                if error.generation is not None:
                    unsure = error.generation
            except PoolTimeout:
                raise StorageUnreachable("The database is too busy.", hint="Try again in a moment.") from None
            except DBAPIError as error:
                failure, again = error, True
            lost += postgres.is_lost(failure)
            if not again or lost > 1 or attempt == TRIES - 1 or not (postgres.is_lost(failure) or postgres.is_passing(failure)):
                if unsure is not None:
                    self._orphans.add(unsure)
                raise postgres.storage_error(failure) from None
        raise AssertionError("the last attempt returns or raises")


class _CommitLost(Exception):
    """A commit that failed: perhaps it went through, and only its answer was lost."""

    def __init__(self, cause: DBAPIError, generation: str | None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.generation = generation


def _notify(db: Database, sender: str, what: str) -> None:
    db.one("SELECT pg_notify(:channel, :payload)", channel=CHANNEL, payload=f"{sender} {what}")

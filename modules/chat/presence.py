"""One server's session with PostgreSQL: it says that the server lives, and hears what the others change.

The session holds an advisory lock on the server's number. When the process ends, however it does, the database lets the lock go,
and any other server can see that the answers of this number will never be finished. A session that breaks is opened again.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from modules.chat.schema_sql import APPLICATION_ID

if TYPE_CHECKING:
    import sqlalchemy

log = logging.getLogger(__name__)

CHANNEL = "switchyard"
LOOK_S = 5.0
"""Seconds between two looks for servers that have ended."""
RETRY_S = 1.0


class Presence:
    """`heard(payload)` gets what other servers notify, and None after every (re)connection, since something may have been missed.
    `look()` is called every LOOK_S. Both run in this thread; neither may raise anything but database errors."""

    def __init__(self, engine: sqlalchemy.Engine, heard: Callable[[str | None], None], look: Callable[[], None]) -> None:
        self.number = 0
        self._engine = engine
        self._heard = heard
        self._look = look
        self._ending = False
        self._held = False
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="chat-presence", daemon=True)
        self._connection: sqlalchemy.Connection | None = None

    def connect(self) -> None:
        """Take a number; from now on this server lives. Raises SQLAlchemyError."""
        self._connect()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ending = True
        with contextlib.suppress(OSError):
            self._waker.send(b"x")
        if self._thread.ident is not None:
            self._thread.join()
        self._disconnect()
        self._waker.close()
        self._woken.close()

    def _connect(self) -> None:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            if not self.number:
                self.number = int(connection.exec_driver_sql("SELECT nextval('servers')").scalar_one())
            connection.exec_driver_sql(f"LISTEN {CHANNEL}")
            self._held = self._hold(connection)
        except BaseException:
            connection.close()
            raise
        connection.detach()  # never back to the pool: its lock and its ears are this session's
        self._connection = connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError, psycopg.Error):
                if self._ending:  # at once, not when the database notices that the session is over
                    self._connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
            with contextlib.suppress(SQLAlchemyError, psycopg.Error):
                self._connection.close()
            self._connection = None

    def _run(self) -> None:
        while not self._ending:
            try:
                if self._connection is None:
                    self._connect()
                    self._heard(None)
                self._listen()
            except (SQLAlchemyError, psycopg.Error, OSError, ValueError) as error:  # the last two: of a socket that is gone
                log.debug("the database session ended: %s", type(error).__name__)
                self._disconnect()
                self._wait(None, RETRY_S)

    def _hold(self, connection: sqlalchemy.Connection) -> bool:
        """Whether the lock is this session's. After a broken connection the database may keep it for the old one for a while."""
        return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({APPLICATION_ID}, {self.number})").scalar_one())

    def _listen(self) -> None:
        assert self._connection is not None
        driver: Any = self._connection.connection.dbapi_connection
        due = 0.0
        while not self._ending:
            if time.monotonic() >= due:
                self._held = self._held or self._hold(self._connection)
                self._look()
                due = time.monotonic() + LOOK_S
            for notice in driver.notifies(timeout=0):
                self._heard(notice.payload)
            self._wait(driver.fileno(), max(0.0, due - time.monotonic()))

    def _wait(self, descriptor: int | None, seconds: float) -> None:
        """Until the descriptor can be read, the time is over, or `close` was called."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if descriptor is not None:
                selector.register(descriptor, selectors.EVENT_READ)
            selector.select(seconds)

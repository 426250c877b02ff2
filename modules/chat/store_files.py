"""The files around the chat database: the lock, the backups, and what is done with a file that can't be read."""

from __future__ import annotations

import contextlib
import datetime
import os
import sqlite3
import sys
from pathlib import Path
from typing import IO

from modules.chat.schema_sql import APPLICATION_ID, MIGRATIONS, version_of
from modules.errors import StorageError, StorageFull, StorageReadOnly, StoreCorrupt, StoreLocked

KEEP_BACKUPS = 5
# Up to this size a file is checked page by page at every start; a larger one only after an end that was no orderly one (the
# backup made of it is always checked).
FULL_CHECK_BYTES = 64 * 1024 * 1024
EMPTY = "it is empty"


class DataDirLock:
    """One server per data folder. The operating system drops the lock with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "server.lock"
        self._folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises StoreLocked naming the holder, or StorageReadOnly when the folder can't be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "a+", encoding="ascii", errors="replace")  # noqa: SIM115 - held until release()
        except OSError as error:
            raise read_only(self._folder, error) from error
        try:
            _lock(file)
        except OSError:
            holder = _read_pid(file)
            file.close()
            raise StoreLocked(
                f"Another server{f' (process {holder})' if holder else ''} is using the data folder {self._folder}.",
                hint="Stop it, or give this one a folder of its own with --user-data-dir.",
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the pid is for the message only, the lock is held
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                self._file.close()
            self._file = None


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(1 << 30)  # far from the pid: a locked range can't be read by others
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read_pid(file: IO[str]) -> str:
    with contextlib.suppress(OSError):
        file.seek(0)
        return "".join(c for c in file.read(32) if c.isdigit())
    return ""


def read_only(folder: Path, error: OSError) -> StorageReadOnly:
    return StorageReadOnly(
        f"The data folder {folder} can't be written: {error.strerror or error}.",
        hint="Give yourself write access to it, or choose another one with --user-data-dir.",
    )


def stamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")


def unused(path: Path) -> Path:
    """`path`, or `path` with a number where that is taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def connect(path: Path, *, read_only_mode: bool = False) -> sqlite3.Connection:
    # as_uri quotes spaces, "?" and non-ASCII letters of the path.
    mode = "ro" if read_only_mode else "rwc"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=5, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    return connection


def storage_error(error: sqlite3.Error) -> StorageError:
    """SQLite's failure as the product's. By its text: Python 3.10 does not give the result code."""
    text = str(error)
    if "is full" in text:
        return StorageFull("The disk is full: the chat could not be saved.", hint="Free some space, then try again.")
    if "readonly" in text or "read-only" in text or "unable to open database" in text:
        return StorageReadOnly(
            "The data folder can't be written: the chat could not be saved.", hint="Check that its disk is there and writable."
        )
    if "malformed" in text or "not a database" in text or "corrupt" in text:
        return StoreCorrupt("The chat database is damaged.", hint="Start again: the newest good backup will be taken.")
    if "disk I/O" in text:
        return StorageReadOnly("The disk reported an error: the chat could not be saved.", hint="Check the disk.")
    return StorageError(f"The chat could not be saved: {text}.")


def problem_of(path: Path, newest_schema: int = len(MIGRATIONS)) -> str | None:
    """Why the file is not a readable chat database, None when it is one (or is new). Raises StorageError for a newer schema."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        return EMPTY
    if head != b"SQLite format 3\0":
        return "it is no SQLite database"
    connection = connect(path)
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = version_of(connection)
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION_ID:
            return "it is another program's database"
        if application == APPLICATION_ID and version > newest_schema:
            raise StorageError(
                f"{path.name} was written by a newer version (schema {version}, this one knows {newest_schema}) "
                "and was left alone.",
                hint="Update, or choose another data folder with --user-data-dir.",
            )
        if path.stat().st_size <= FULL_CHECK_BYTES or not _closed_well(connection):
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                return str(verdict)
        if not tables:
            return EMPTY
        if version == 0:
            return "it has no schema version"
        connection.execute("SELECT count(*) FROM conversations").fetchone()  # the schema reads
    except sqlite3.DatabaseError as error:
        failure = storage_error(error)
        if isinstance(failure, (StorageFull, StorageReadOnly)):
            raise failure from error
        return str(error)
    finally:
        connection.close()
    return None


def _closed_well(connection: sqlite3.Connection) -> bool:
    row = connection.execute("SELECT value FROM meta WHERE key = 'closed'").fetchone()
    return row is not None and row[0] == "1"


def mark_closed(connection: sqlite3.Connection, closed: bool) -> None:
    """Said at an orderly end, taken back at the start."""
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('closed', ?)", (str(int(closed)),))


def quarantine(path: Path) -> Path:
    """Move the file and its companions aside; nothing is overwritten. Returns the new place."""
    target = unused(path.with_name(f"{path.name}.corrupt-{stamp()}"))
    for suffix in ("-wal", "-shm", ""):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(target.with_name(target.name + suffix))
    return target


class Backups:
    """The newest copies of one database, in the folder `backups` beside it."""

    def __init__(self, database: Path, keep: int = KEEP_BACKUPS) -> None:
        self._database = database
        self._folder = database.parent / "backups"
        self._keep = keep

    def newest_first(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(self._folder.glob(f"{self._database.stem}-*.sqlite"), key=_age_key, reverse=True)

    def make(self, only_if_changed: bool = True) -> Path | None:
        """A copy made by SQLite's backup API, checked before it gets its name. None when nothing changed since the newest.

        Opens the database a second time and only reads, so it may run beside the store's own thread.
        """
        source = connect(self._database, read_only_mode=True)
        try:
            mark = _mark(source)
            existing = self.newest_first()
            if only_if_changed and existing and _mark_of(existing[0]) == mark:
                return None
            self._folder.mkdir(exist_ok=True)
            target = unused(self._folder / f"{self._database.stem}-{stamp()}.sqlite")
            part = target.with_suffix(".part")
            part.unlink(missing_ok=True)
            try:
                self._copy(source, part)
                part.replace(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        finally:
            source.close()
        for old in self.newest_first()[self._keep :]:
            old.unlink(missing_ok=True)
        return target

    def restore(self) -> Path | None:
        """Copy the newest backup that reads well to the database's place; None when there is none."""
        for backup in self.newest_first():
            if problem_of(backup) is not None:
                continue
            part = self._database.with_name(self._database.name + ".part")
            part.unlink(missing_ok=True)
            source = connect(backup)
            try:
                self._copy(source, part)
            finally:
                source.close()
            part.replace(self._database)
            return backup
        return None

    @staticmethod
    def _copy(source: sqlite3.Connection, target: Path) -> None:
        copy = connect(target)
        try:
            copy.execute("PRAGMA synchronous = FULL")
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, without companions
            verdict = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            copy.close()
        if verdict != "ok":
            raise StoreCorrupt(f"A backup could not be made: {verdict}.")
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def _age_key(path: Path) -> tuple[float, str]:
    return (path.stat().st_mtime, path.name)


def _mark(connection: sqlite3.Connection) -> str:
    """Changes with every save that matters."""
    return str(connection.execute("SELECT value FROM meta WHERE key = 'touched'").fetchone()[0])


def _mark_of(path: Path) -> str | None:
    try:
        connection = connect(path, read_only_mode=True)
    except sqlite3.Error:
        return None
    try:
        return _mark(connection)
    except (sqlite3.Error, TypeError):
        return None  # not readable: then a new backup is due
    finally:
        connection.close()

"""The images that messages show: which are referred to, and which are needed no more.

A message's text holds a reference, `![name](cid:SHA256.kind)`. SQLite keeps the bytes as files of the data folder, PostgreSQL in
a table that all servers share; what is said of them is in the table `images` of both. An image goes when no message refers to it,
hidden ones that can be undone included, and nobody has just uploaded it: an upload counts until a message refers to it, or for
KEEP_S where none comes. What the database never knew of, a folder's other files, is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modules.chat.schema_sql import SHOWS_IMAGES
from modules.errors import StorageError, StorageFull

if TYPE_CHECKING:
    from pathlib import Path

    from modules.chat.database import Database

NAME = r"[0-9a-f]{64}\.(?:png|jpeg|webp|gif)"
_REFERENCE = re.compile(rf"\]\(cid:({NAME})\)")
KEEP_S = 3600.0


def name_of(data: bytes, kind: str) -> str:
    """What an image is called: the same one is kept once."""
    return f"{hashlib.sha256(data).hexdigest()}.{kind}"


def is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None


def names_in(texts: Iterable[str]) -> list[str]:
    """The images that texts refer to, each once, in order."""
    return list(dict.fromkeys(name for text in texts for name in _REFERENCE.findall(text)))


# --- in a transaction ----------------------------------------------------------------------------------------------


def referred(db: Database, texts: Iterable[str]) -> None:
    """A message with one of these texts is being saved: its images are waited for no more."""
    _taken(db, names_in(texts))


def _taken(db: Database, names: list[str]) -> None:
    if names:
        db.hold_images(names)
        taken = "UPDATE images SET uploads = uploads - 1 WHERE name = :name AND uploads > 0"
        db.many(taken, [{"name": name} for name in names])


def drop_unused(db: Database) -> list[str]:
    """Drop every image that nothing refers to and nobody waits for; their names."""
    limit = time.time() - KEEP_S
    free = "SELECT name FROM images WHERE uploads = 0 OR touched < :limit"
    unused = {row["name"] for row in db.all(free, limit=limit)} - _shown(db)
    if not unused:
        return []
    db.hold_images(sorted(unused))  # now nobody can come to refer to them; perhaps somebody has, until now
    unused = {row["name"] for row in db.all(free, limit=limit) if row["name"] in unused} - _shown(db)
    db.drop_images(sorted(unused))
    return sorted(unused)


def adopt(db: Database, folder: ImageFolder) -> None:
    """Take in the files that messages refer to and the database does not know: those of an older version."""
    known = {row["name"] for row in db.all("SELECT name FROM images")}
    for name in sorted(_shown(db) - known):
        data = folder.read(name)
        if data is not None:
            db.put_image(name, data, time.time())
            _taken(db, [name])


def _shown(db: Database) -> set[str]:
    return set(names_in(row["text"] for row in db.all(f"SELECT text FROM nodes WHERE {SHOWS_IMAGES}")))


# --- SQLite's --------------------------------------------------------------------------------------------------------


class ImageFolder:
    """The files. All methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """None where it can't be read."""
        try:
            return (self._folder / name).read_bytes() if is_name(name) else None
        except OSError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """On disk, whole, when it returns. Raises StorageError."""
        path = self._folder / name
        if path.is_file():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(suffix=".part", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
                raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StorageFull("The disk is full: the image was not kept.", hint="Make room, then try again.") from error
            raise StorageError(f"The image could not be kept: {error.strerror}.", hint="Check the data folder.") from error

    def remove(self, names: Iterable[str]) -> None:
        """A file that can't be removed stays: nothing refers to it."""
        for name in names:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()

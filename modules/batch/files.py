"""A batch's two files: the input as numbered lines, and an output that a kill leaves whole but for its last line.

The output is only ever appended to, and every write reaches the disk before the line counts as done. What a kill tore is cut off
at the next start; what is there is not asked for again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modules.batch.lines import Line, dumps, failed, parse_line, tokens_of
from modules.errors import Conflict, InvalidParameter, NotFound, StorageError, StorageFull, StorageReadOnly

_TAIL_BYTES = 1 << 20


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a batch file, in order; empty lines are left out but counted. A custom_id that comes twice is an error of
    the later line. Raises NotFound."""
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                line = parse_line(raw, number)
                if line.error is None and line.custom_id in seen:
                    error = InvalidParameter(f"custom_id {line.custom_id!r} is used by an earlier line.", param="custom_id")
                    line = Line(number, line.custom_id, error=error)
                seen.add(line.custom_id or "")
                yield line
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"There is no batch file {path.name}.") from None


class Output:
    """The output file, open for appending. `done` maps input line numbers to whether that line failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[int, bool] = {}
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._ids: dict[int, str | None] = {}
        self._unnumbered: dict[str, bool] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            self._repair()
            self._read()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise storage_error(error, path) from error
            raise

    def _repair(self) -> None:
        """Cut off a last line that was not finished."""
        size = self._file.seek(0, os.SEEK_END)
        keep = size
        while keep:
            start = max(0, keep - _TAIL_BYTES)
            self._file.seek(start)
            at = self._file.read(keep - start).rfind(b"\n")
            if at >= 0:
                keep = start + at + 1
                break
            keep = start
        if keep < size:
            self._file.truncate(keep)
            self._sync()

    def _read(self) -> None:
        self._file.seek(0)
        for at, raw in enumerate(self._file, 1):
            try:
                record = json.loads(raw)
                if not isinstance(record, dict) or "custom_id" not in record or "response" not in record:
                    raise ValueError
            except ValueError:
                raise Conflict(
                    f"Line {at} of {self.path.name} is no batch result, so it can't be gone on with.",
                    hint="Name another output file, or pass --overwrite.",
                ) from None
            number = record.get("line")
            if isinstance(number, int):
                self._ids[number] = record["custom_id"]
            self._count(number if isinstance(number, int) else None, record)

    def _count(self, number: int | None, record: dict[str, Any]) -> None:
        bad = failed(record)
        prompt, completion = tokens_of(record)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if number is not None:
            self.done[number] = bad
        elif record["custom_id"] is not None:  # written by another program
            self._unnumbered[str(record["custom_id"])] = bad

    def has(self, line: Line) -> bool:
        """Whether this line is answered already. Raises Conflict when the output is of another input."""
        if line.number in self.done:
            there = self._ids.get(line.number, line.custom_id)
            if there != line.custom_id:
                raise Conflict(
                    f"{self.path.name} holds the results of another input: line {line.number} is {there!r} there.",
                    hint="Name another output file, or pass --overwrite.",
                )
            return True
        if line.custom_id is not None and line.error is None and line.custom_id in self._unnumbered:
            self.done[line.number] = self._unnumbered[line.custom_id]
            return True
        return False

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write results and wait until they are on the disk. Raises StorageError; what was written of them is cut off again."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write("".join(dumps(record) + "\n" for record in records).encode("utf-8", "replace"))
            self._sync()
        except OSError as error:
            self._undo(start)
            raise storage_error(error, self.path) from error
        for record in records:
            self._ids[record["line"]] = record["custom_id"]
            self._count(record["line"], record)

    def _undo(self, start: int) -> None:
        with contextlib.suppress(OSError):  # the buffer can't be flushed: that is what is being undone
            self._file.close()
        self._file = self.path.open("a+b")
        self._file.truncate(start)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @property
    def failures(self) -> int:
        return sum(self.done.values())


def storage_error(error: OSError, path: Path) -> StorageError:
    """What the disk refused, as the product's error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"The disk is full: {path.name} can't be written.", hint="Free some space, then go on.")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageReadOnly(f"{path.name} can't be written here.", hint="Name a folder that can be written.")
    return StorageError(f"{path.name} can't be written: {error.strerror}.", hint="Name another output file.")


def refuse_same(source: Path, target: Path) -> None:
    """Raise Conflict when a batch would write over its own input."""
    if source.resolve() == target.resolve():
        raise Conflict("The output would be written over the input.", hint="Name another output file.")

"""One file from the hub to disk: resumed, checked against size and hash, renamed only when it is right.

A thread reads, writes and hashes (hashing in a second one), so that neither a slow disk nor a fast line stops the server. The
hash is taken of the bytes as they are written; what was on disk before is read and hashed first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from modules.detect.sniff import kind_of
from modules.download.wire import Retry, Stopped, Wire
from modules.errors import AppError, DownloadError, StorageFull, StorageReadOnly

if TYPE_CHECKING:
    import http.client

    from modules.download.hub import Hub
    from modules.download.plan import RepoFile

CHUNK = 1 << 20
AHEAD = 8  # blocks that may wait to be hashed
ATTEMPTS = 6
MIN_RATE = 200  # bytes per second
REPORT_S = 0.1
SYNC_EACH = 64 << 20
_RANGE = re.compile(r"bytes (\d+)-\d*/(\d+|\*)")
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
OnBytes = Callable[[int], None]


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Mismatch(Exception):
    """What arrives is not the file; the part is worth nothing."""


class _Disk(Exception):
    """An OSError of the part's file, told from those of the network."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def part_path(target: Path, file: RepoFile) -> Path:
    """The unfinished file. Its name holds the content's hash, so that a part of another version is never continued."""
    identity = (file.sha256 or file.git_sha1 or f"{file.size:x}")[:12]
    return target.with_name(f".{target.name}.{identity}.part")


async def fetch_file(
    hub: Hub, url: str, file: RepoFile, target: Path, on_bytes: OnBytes, *, stall_s: float = 30.0, backoff_s: float = 1.0
) -> None:
    """Bring `file` to `target`. `on_bytes` is told the bytes on disk so far, in the event loop's thread.

    Raises DownloadError, StorageFull or StorageReadOnly. The part stays for the next try unless it is wrong; cancelling keeps it,
    and nothing is written to it any more once the cancellation has gone on.
    """
    loop = asyncio.get_running_loop()
    part = part_path(target, file)

    def report(at: int) -> None:
        loop.call_soon_threadsafe(on_bytes, at)

    fetch = _Fetch(hub, url, file, part, stall_s, report)
    failures = wrong = 0
    while True:
        before = _size(part)
        try:
            await _in_thread(fetch)
            await asyncio.to_thread(_publish, part, target)
            return
        except _Mismatch as mismatch:
            part.unlink(missing_ok=True)
            wrong += 1
            if wrong > 1:
                raise DownloadError(
                    f"{file.path} arrived twice with the wrong content ({mismatch}); it was deleted.",
                    hint="Something on the way changes or cuts it: try another network or mirror (--hub-endpoint).",
                ) from mismatch
        except Retry as trouble:
            # Progress makes the count start again: a slow line that drops every gigabyte still gets there.
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{file.path}: {trouble}, {ATTEMPTS} times in a row.",
                    hint="Check the network and start the download again: it goes on where it stopped.",
                ) from trouble
            named = trouble.wait_s
            await asyncio.sleep(min(60.0, named if named is not None else backoff_s * 2 ** (failures - 1)))
        except _Disk as trouble:
            raise _storage_error(trouble.error, file) from trouble.error
        except OSError as error:
            raise _storage_error(error, file) from error


async def _in_thread(fetch: _Fetch) -> None:
    """One attempt. A cancellation cuts the connection and waits until the thread has put down its pen.

    A thread that is still looking for the server has not taken it up: it ends by itself, and a server that ends meanwhile need
    not wait for it, which is why it is a daemon.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.cancelled():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def work() -> None:
        error: BaseException | None = None
        try:
            fetch.attempt()
        except BaseException as trouble:
            error = trouble
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=work, name="download", daemon=True).start()
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        if fetch.cut():
            await asyncio.wait([ended])
        if ended.done():
            ended.exception()  # looked at: it is the cut
        else:
            ended.cancel()
        raise


class _Fetch:
    """The attempts at one file; all but `cut` run in a thread. The hash goes on from one attempt to the next."""

    def __init__(self, hub: Hub, url: str, file: RepoFile, part: Path, stall_s: float, on_bytes: OnBytes) -> None:
        self._wire = Wire(hub, stall_s)
        self._url, self._file, self._part, self._on_bytes = url, file, part, on_bytes
        self._stall_s = stall_s
        self._digest, self._hashed = _new_hash(file), 0
        self._reported = 0.0
        self._pen = threading.Lock()
        self._writing = False

    def cut(self) -> bool:
        """End the attempt; whether its thread may still be writing."""
        with self._pen:
            self._wire.cut()
            return self._writing

    def attempt(self) -> None:
        """Raises Retry, Stopped, _Mismatch, _Disk, DownloadError."""
        try:
            have = self._what_is_there()
            if have < self._file.size or not self._part.exists():
                try:
                    self._fetch_rest(have)
                finally:
                    self._wire.close()
            self._check()
        except OSError as error:
            raise _Disk(error) from error

    def _what_is_there(self) -> int:
        have = _size(self._part)
        if have > self._file.size:
            self._part.unlink()
            have = 0
        if have != self._hashed:
            self._digest, self._hashed = _new_hash(self._file), 0
            if have:
                self._hash_part()
        self._report(have, now=True)
        return have

    def _hash_part(self) -> None:
        with self._part.open("rb") as source:
            while chunk := source.read(CHUNK):
                if self._wire.stopped:
                    raise Stopped
                self._digest.update(chunk)
                self._hashed += len(chunk)

    def _fetch_rest(self, have: int) -> None:
        response = self._wire.get(self._url, have)
        start = self._start(response, have)
        if start == 0:
            self._digest, self._hashed = _new_hash(self._file), 0
        with self._pen:
            if self._wire.stopped:
                raise Stopped
            self._writing = True
        try:
            with self._part.open("r+b" if start else "wb", buffering=0) as out:
                out.seek(start)
                out.truncate()
                with ThreadPoolExecutor(1, thread_name_prefix="download-hash") as hasher:
                    self._copy(response, out, start, hasher)
        finally:
            self._writing = False

    def _start(self, response: http.client.HTTPResponse, have: int) -> int:
        """Where in the file the response's body begins. Raises for every answer that is not the file."""
        path, status = self._file.path, response.status
        if status == 416:
            # The part is longer than the server's file, or the server can't do ranges: the next attempt starts over.
            raise _Mismatch("the server has no such range")
        if status in _RETRY_STATUS:
            raise Retry(f"the server is busy (HTTP {status})", _seconds(response.getheader("Retry-After")))
        if status in (401, 403):
            raise DownloadError(
                f"{path}: the hub refuses access (HTTP {status}).",
                hint="Accept the model's terms on its page, then give a token of that account (HF_TOKEN, or Models → Hub).",
                detail={"gated": True},
            )
        if status not in (200, 206):
            raise DownloadError(f"{path}: the hub answers HTTP {status}.", hint="Check the repository and try again.")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise DownloadError(f"{path}: the server compresses the file.", hint="Try another mirror (--hub-endpoint).")
        if "text/html" in response.getheader("Content-Type", "") and not path.endswith((".html", ".htm")):
            raise DownloadError(
                f"{path}: a web page was sent instead of the file.",
                hint="A login page or proxy answers for the hub: open the hub in a browser on this machine, then try again.",
            )
        if status == 200:
            return 0
        match = _RANGE.fullmatch(response.getheader("Content-Range", ""))
        if not match or int(match[1]) != have or match[2] not in ("*", str(self._file.size)):
            raise _Mismatch("the server continued at another place")
        return have

    def _copy(self, response: http.client.HTTPResponse, out: BinaryIO, at: int, hasher: ThreadPoolExecutor) -> None:
        """Each block is written here while the ones before it are hashed; what arrived before a cut is kept."""
        hashing: deque[Future[None]] = deque()
        pace = _Pace(self._stall_s)
        try:
            while block := self._wire.read(response, CHUNK):
                self._look_at(block, at)
                _write_all(out, block)
                hashing.append(hasher.submit(self._digest.update, block))
                if at // SYNC_EACH != (at + len(block)) // SYNC_EACH:
                    hashing.append(hasher.submit(os.fsync, out.fileno()))  # so that little is left to wait for at the end
                if len(hashing) > AHEAD:
                    hashing.popleft().result()
                at += len(block)
                self._report(at)
                pace.count(len(block))
            for work in hashing:
                work.result()
        finally:
            self._hashed = at
            self._report(at, now=True)
        if at < self._file.size:
            raise Retry(f"the connection ended at {at:,} of {self._file.size:,} bytes")

    def _look_at(self, block: bytes, at: int) -> None:
        if at == 0 and self._file.sha256 and kind_of(block[:512]) == "lfs":
            raise DownloadError(
                f"{self._file.path}: the mirror sent a Git LFS pointer instead of the file.",
                hint="Use a mirror that holds the files (--hub-endpoint).",
            )
        if at + len(block) > self._file.size:
            raise _Mismatch(f"more than the {self._file.size:,} bytes announced")

    def _report(self, at: int, *, now: bool = False) -> None:
        clock = time.monotonic()
        if now or clock - self._reported >= REPORT_S:
            self._reported = clock
            self._on_bytes(at)

    def _check(self) -> None:
        size = _size(self._part)
        if size != self._file.size or self._hashed != size:
            raise _Mismatch(f"{size:,} instead of {self._file.size:,} bytes")
        _compare(self._digest, self._file)


def _write_all(out: BinaryIO, block: bytes) -> None:
    """An unbuffered file may take less than it is given."""
    done = out.write(block)
    while done < len(block):
        done += out.write(memoryview(block)[done:])


class _Pace:
    """A server that sends a byte now and then has stalled, whatever its socket says."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.began = time.monotonic()
        self.seen = 0

    def count(self, count: int) -> None:
        self.seen += count
        passed = time.monotonic() - self.began
        if passed < self.window_s:
            return
        if self.seen < MIN_RATE * passed:
            raise Retry("the server sends almost nothing")
        self.began, self.seen = time.monotonic(), 0


def _new_hash(file: RepoFile) -> _Hash:
    """The hash the hub names for this file; git's is of a header and the content."""
    if file.sha256 or not file.git_sha1:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def _compare(digest: _Hash, file: RepoFile) -> None:
    named = file.sha256 or file.git_sha1
    if named is not None and digest.hexdigest() != named:
        raise _Mismatch("its hash is not the one the hub names")


def matches(path: Path, file: RepoFile) -> bool:
    """Whether the finished file at `path` is `file`, by size and hash."""
    digest = _new_hash(file)
    try:
        if _size(path) != file.size:
            return False
        with path.open("rb") as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
        _compare(digest, file)
    except (_Mismatch, OSError):
        return False
    return True


def _publish(part: Path, target: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _seconds(value: str | None) -> float | None:
    return float(value) if value and value.isdigit() else None


def _storage_error(error: OSError, file: RepoFile) -> AppError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            f"The disk is full: {file.path} needs {file.size:,} bytes in all.",
            hint="Free some space and start again: it goes on where it stopped.",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageReadOnly(
            "The model folder can't be written.", hint="Choose another folder with --out, or change its permissions."
        )
    return DownloadError(f"{file.path} can't be written: {error.strerror or error}.", hint="Check the disk.")

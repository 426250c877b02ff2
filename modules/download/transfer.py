"""One file from the hub to disk: resumed, checked against size and hash, renamed only when it is right."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import urljoin

import httpx

from modules.detect.sniff import kind_of
from modules.errors import AppError, DownloadError, StorageFull, StorageReadOnly

if TYPE_CHECKING:
    from modules.download.hub import Hub
    from modules.download.plan import RepoFile

CHUNK = 1 << 20
MAX_REDIRECTS = 5
ATTEMPTS = 6
MIN_RATE = 200  # bytes per second
_RANGE = re.compile(r"bytes (\d+)-\d*/(\d+|\*)")
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
OnBytes = Callable[[int], None]


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class Retry(Exception):
    """This attempt failed in a way the next one may not; `wait_s` when the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def part_path(target: Path, file: RepoFile) -> Path:
    """The unfinished file. Its name holds the content's hash, so that a part of another version is never continued."""
    identity = (file.sha256 or file.git_sha1 or f"{file.size:x}")[:12]
    return target.with_name(f".{target.name}.{identity}.part")


async def fetch_file(
    client: httpx.AsyncClient, hub: Hub, url: str, file: RepoFile, target: Path, on_bytes: OnBytes, *, backoff_s: float = 1.0
) -> None:
    """Bring `file` to `target`. `on_bytes` is told the bytes on disk so far.

    Raises DownloadError, StorageFull or StorageReadOnly. The part stays for the next try unless it is wrong; cancelling keeps it.
    """
    part = part_path(target, file)
    failures = wrong = 0
    while True:
        before = _size(part)
        try:
            await _attempt(client, hub, url, file, part, on_bytes)
            await asyncio.to_thread(_check, part, file)
            await asyncio.to_thread(_publish, part, target)
            return
        except _Mismatch as mismatch:
            part.unlink(missing_ok=True)
            wrong += 1
            if wrong > 1:
                raise DownloadError(
                    f"{file.path} arrived twice with the wrong content ({mismatch}); it was deleted.",
                    hint="Something on the way changes or cuts it: try another network or mirror (HF_ENDPOINT).",
                ) from mismatch
        except (Retry, httpx.TransportError) as trouble:
            # Progress makes the count start again: a slow line that drops every gigabyte still gets there.
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{file.path}: {_reason(trouble)}, {ATTEMPTS} times in a row.",
                    hint="Check the network and start the download again: it goes on where it stopped.",
                ) from trouble
            named = trouble.wait_s if isinstance(trouble, Retry) else None
            await asyncio.sleep(min(60.0, named if named is not None else backoff_s * 2 ** (failures - 1)))
        except OSError as error:
            raise _storage_error(error, file) from error


class _Mismatch(Exception):
    pass


async def _attempt(client: httpx.AsyncClient, hub: Hub, url: str, file: RepoFile, part: Path, on_bytes: OnBytes) -> None:
    have = _size(part)
    if have > file.size:
        part.unlink()
        have = 0
    on_bytes(have)
    if have == file.size and part.exists():
        return
    async with contextlib.AsyncExitStack() as stack:
        response = await _open(stack, client, hub, url, have)
        start = await _start(response, have, file)
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            out.truncate()
            await _copy(response, out, start, file, on_bytes)


async def _open(stack: contextlib.AsyncExitStack, client: httpx.AsyncClient, hub: Hub, url: str, have: int) -> httpx.Response:
    """Send the request, following redirects by our rules: each target is checked, the token stays at the hub."""
    for _ in range(MAX_REDIRECTS + 1):
        headers = hub.headers_for(url)
        if have:
            headers["Range"] = f"bytes={have}-"
        response = await stack.enter_async_context(client.stream("GET", url, headers=headers, follow_redirects=False))
        if response.status_code not in (301, 302, 303, 307, 308):
            return response
        url = urljoin(url, response.headers.get("location", ""))
        await hub.check_redirect(url)
    raise DownloadError("The hub redirects in a circle.", hint="Check HF_ENDPOINT; try another mirror.")


async def _start(response: httpx.Response, have: int, file: RepoFile) -> int:
    """Where in the file the response's body begins. Raises for every answer that is not the file."""
    status = response.status_code
    if status == 416:
        # The part is longer than the server's file, or the server can't do ranges: the next attempt starts over.
        raise _Mismatch("the server has no such range")
    if status in _RETRY_STATUS:
        raise Retry(f"the server is busy (HTTP {status})", _seconds(response.headers.get("retry-after")))
    if status in (401, 403):
        raise DownloadError(
            f"{file.path}: the hub refuses access (HTTP {status}).",
            hint="Accept the model's terms on its page, then set HF_TOKEN to a token of that account.",
        )
    if status not in (200, 206):
        raise DownloadError(f"{file.path}: the hub answers HTTP {status}.", hint="Check the repository and try again.")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise DownloadError(f"{file.path}: the server compresses the file.", hint="Try another mirror (HF_ENDPOINT).")
    if "text/html" in response.headers.get("content-type", "") and not file.path.endswith((".html", ".htm")):
        raise DownloadError(
            f"{file.path}: a web page was sent instead of the file.",
            hint="A login page or proxy answers for the hub: open the hub in a browser on this machine, then try again.",
        )
    if status == 200:
        return 0
    match = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if not match or int(match[1]) != have or match[2] not in ("*", str(file.size)):
        raise _Mismatch("the server continued at another place")
    return have


async def _copy(response: httpx.Response, out: BinaryIO, at: int, file: RepoFile, on_bytes: OnBytes) -> None:
    waiting = bytearray()
    pace = _Pace(response.request.extensions.get("timeout", {}).get("read") or 30.0)
    first = at == 0
    try:
        async for piece in response.aiter_raw():
            if first and kind_of(piece[:512]) == "lfs" and file.sha256:
                raise DownloadError(
                    f"{file.path}: the mirror sent a Git LFS pointer instead of the file.",
                    hint="Use a mirror that holds the files (HF_ENDPOINT).",
                )
            first = False
            if at + len(waiting) + len(piece) > file.size:
                raise _Mismatch(f"more than the {file.size:,} bytes announced")
            waiting += piece
            pace.count(len(piece))
            if len(waiting) >= CHUNK:
                block = bytes(waiting)
                waiting.clear()
                at += len(block)
                await _write(out, block)
                on_bytes(at)
    finally:
        # What arrived before a cut or a cancellation is kept.
        out.write(waiting)
        at += len(waiting)
    on_bytes(at)
    if at < file.size:
        raise Retry(f"the connection ended at {at:,} of {file.size:,} bytes")


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


async def _write(out: BinaryIO, block: bytes) -> None:
    """Write in a thread, so that a slow disk does not stop the server. A cancelled write ends before the file is closed."""
    writing = asyncio.ensure_future(asyncio.to_thread(out.write, block))
    try:
        await asyncio.shield(writing)
    finally:
        if not writing.done():
            await asyncio.wait([writing])


def _check(part: Path, file: RepoFile) -> None:
    """Size and hash of the whole part, read from the disk: what is there counts, not what passed through."""
    size = _size(part)
    if size != file.size:
        raise _Mismatch(f"{size:,} instead of {file.size:,} bytes")
    if file.sha256 is None and file.git_sha1 is None:
        return
    if file.sha256:
        digest: _Hash = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with part.open("rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != (file.sha256 or file.git_sha1):
        raise _Mismatch("its hash is not the one the hub names")


def matches(path: Path, file: RepoFile) -> bool:
    """Whether the finished file at `path` is `file`, by size and hash."""
    try:
        _check(path, file)
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


def _reason(trouble: Exception) -> str:
    if isinstance(trouble, Retry):
        return str(trouble)
    if isinstance(trouble, httpx.TimeoutException):
        return "the server sent nothing for too long"
    return "the connection failed"


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

"""A whole repository into a folder of its own: planned, space asked first, one file after the other, checked at the end."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.detect import inspect
from modules.download.hub import Hub, check_names, folder_of, list_repository
from modules.download.plan import DownloadPlan, RepoFile, choose_files, names_projector
from modules.download.transfer import fetch_file, matches, part_path
from modules.errors import Conflict, StorageFull, StorageReadOnly

if TYPE_CHECKING:
    from modules.schema import ModelFiles

RECORD = ".download.json"
LOCK = ".download.lock"
_MARGIN = 64_000_000


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """`folder` None: OWNER_NAME in the model folder. `stall_s`: how long the server may send nothing. `reserved_bytes`: what
    other downloads still need of the same disk. `with_projector`: a GGUF's projector comes along."""

    repo: str
    model_dir: Path
    revision: str | None = None
    include: tuple[str, ...] = ()
    folder: Path | None = None
    stall_s: float = 30.0
    reserved_bytes: int = 0
    with_projector: bool = True

    def target(self) -> Path:
        check_names(self.repo, self.revision)
        return self.folder or self.model_dir / folder_of(self.repo)


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """`done_bytes` counts what was on disk before; `speed` is bytes per second over the last seconds, None at first; `finished`
    is the file that has just got its name."""

    file: str
    done_bytes: int
    total_bytes: int
    files_done: int
    files_total: int
    speed: float | None = None
    finished: str | None = None

    @property
    def fraction(self) -> float:
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


@dataclass(frozen=True, slots=True)
class Downloaded:
    """`model` is what detection says about the result; its `problem` is None when a loader can take it."""

    folder: Path
    plan: DownloadPlan
    model: ModelFiles


OnProgress = Callable[[DownloadProgress], None]


async def plan_download(request: DownloadRequest, hub: Hub | None = None) -> DownloadPlan:
    """What would be fetched. Raises DownloadError, InvalidParameter, UnsafeModel."""
    check_names(request.repo, request.revision)
    if hub is None:
        hub = await asyncio.to_thread(Hub.from_environment)
    commit, files = await list_repository(hub, request.repo, request.revision)
    return choose_files(request.repo, commit, files, request.include, with_projector=request.with_projector)


async def download(
    request: DownloadRequest,
    on_progress: OnProgress,
    *,
    hub: Hub | None = None,
    plan: DownloadPlan | None = None,
    backoff_s: float = 1.0,
) -> Downloaded:
    """Fetch a model. Cancelling the task stops at once; what arrived stays as hidden parts, and the next call goes on from there.

    Raises DownloadError, InvalidParameter, UnsafeModel, StorageFull (before anything is fetched when the disk has no room),
    StorageReadOnly, Conflict when another process fetches into the same folder.
    """
    folder = request.target()
    if hub is None:
        hub = await asyncio.to_thread(Hub.from_environment)
    plan = plan or await plan_download(request, hub)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageReadOnly("The model folder can't be written.", hint="Choose another folder with --out.") from error
    with _lock(folder):
        record = _read_record(folder)
        missing = [file for file in plan.files if not await asyncio.to_thread(_have, folder, file, record)]
        _ask_for_space(folder, missing, request.reserved_bytes)
        _remove_old_parts(folder, plan.files)
        meter = _Meter(plan, missing, on_progress)
        for file in missing:
            target = folder.joinpath(*file.path.split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            url = hub.file_url(plan.repo, plan.commit, file.path)
            await fetch_file(hub, url, file, target, meter.at(file), stall_s=request.stall_s, backoff_s=backoff_s)
            _write_record(folder, plan, file)
            meter.finished(file)
    return Downloaded(folder, plan, await asyncio.to_thread(inspect, _model_path(folder, plan)))


def _model_path(folder: Path, plan: DownloadPlan) -> Path:
    ggufs = [file.path for file in plan.files if file.path.endswith(".gguf")]
    if ggufs and not any(file.path.endswith(".safetensors") for file in plan.files):
        return folder.joinpath(*min(ggufs, key=names_projector).split("/"))
    return folder


class _Meter:
    """Bytes of all files together, and the speed over the last seconds."""

    def __init__(self, plan: DownloadPlan, missing: list[RepoFile], on_progress: OnProgress) -> None:
        self.on_progress = on_progress
        self.total = plan.total_bytes
        self.count = len(plan.files)
        self.files_done = len(plan.files) - len(missing)
        self.base = self.total - sum(file.size for file in missing)
        self.samples: list[tuple[float, int]] = []

    def at(self, file: RepoFile) -> Callable[[int], None]:
        self.samples.clear()

        def on_bytes(done: int) -> None:
            now = time.monotonic()
            if self.samples and done < self.samples[-1][1]:
                self.samples.clear()  # started over
            self.samples = [(at, seen) for at, seen in self.samples if now - at < 5.0] + [(now, done)]
            (first_at, first), (last_at, last) = self.samples[0], self.samples[-1]
            speed = (last - first) / (last_at - first_at) if last_at > first_at else None
            self.on_progress(DownloadProgress(file.path, self.base + done, self.total, self.files_done, self.count, speed))

        return on_bytes

    def finished(self, file: RepoFile) -> None:
        self.base += file.size
        self.files_done += 1
        self.on_progress(DownloadProgress(file.path, self.base, self.total, self.files_done, self.count, finished=file.path))


def _have(folder: Path, file: RepoFile, record: dict[str, Any]) -> bool:
    """Whether the file is there already: by the record when neither size nor time changed, else by its hash."""
    path = folder.joinpath(*file.path.split("/"))
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    known = record.get(file.path)
    identity = file.sha256 or file.git_sha1
    if identity and known == [identity, path.stat().st_mtime_ns]:
        return True
    return identity is not None and matches(path, file)


def remove_unfinished(folder: Path, paths: Iterable[str]) -> None:
    """Delete every part below `folder`, and those of its finished files that `paths` names; then the folders that are empty.

    Raises Conflict when the folder is being downloaded into.
    """
    if not folder.is_dir():
        return
    with _lock(folder):
        files = _read_record(folder)
        for path in paths:
            folder.joinpath(*path.split("/")).unlink(missing_ok=True)
            files.pop(path, None)
        for part in folder.rglob(".*.part"):
            part.unlink(missing_ok=True)
        if not files:
            (folder / RECORD).unlink(missing_ok=True)
    for inner in sorted((path for path in (folder, *folder.rglob("*")) if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # something of the user's own is in it
            inner.rmdir()


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("files")
    except (OSError, ValueError, AttributeError):
        return {}  # without it the files are hashed again
    return files if isinstance(files, dict) else {}


def _write_record(folder: Path, plan: DownloadPlan, file: RepoFile) -> None:
    files = _read_record(folder)
    path = folder.joinpath(*file.path.split("/"))
    files[file.path] = [file.sha256 or file.git_sha1, path.stat().st_mtime_ns]
    text = json.dumps({"repository": plan.repo, "commit": plan.commit, "files": files}, indent=1)
    part = folder / (RECORD + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, folder / RECORD)


def _ask_for_space(folder: Path, missing: list[RepoFile], reserved: int) -> None:
    needed = reserved
    for file in missing:
        part = part_path(folder.joinpath(*file.path.split("/")), file)
        needed += file.size - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if missing and needed + _MARGIN > free:
        raise StorageFull(
            f"The download needs {(needed - reserved) / 1e9:,.2f} GB more, the disk has {free / 1e9:,.2f} GB free"
            + (f" and other downloads need {reserved / 1e9:,.2f} GB of it." if reserved else "."),
            hint="Free some space, choose a smaller quantization with --include, or a folder on another disk with --out.",
        )


def _remove_old_parts(folder: Path, files: tuple[RepoFile, ...]) -> None:
    """Parts of another version of these files, which will never be continued."""
    for file in files:
        target = folder.joinpath(*file.path.split("/"))
        current = part_path(target, file)
        if target.parent.is_dir():
            for old in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
                if old != current:
                    old.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One download per folder at a time, across processes; the system lets go of it when a process dies."""
    try:
        handle = (folder / LOCK).open("a+b")
    except OSError as error:
        raise StorageReadOnly("The model folder can't be written.", hint="Choose another folder with --out.") from error
    with handle:
        try:
            _lock_handle(handle.fileno())
        except OSError as error:
            raise Conflict("This model is being downloaded already.", hint="Wait for that download, or stop it.") from error
        yield
    with contextlib.suppress(OSError):  # Windows keeps it while another process waits on it
        (folder / LOCK).unlink()


def _lock_handle(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""Downloads of the running server: several at once in the background, paused, resumed, cancelled, taken up again after a restart.

What was asked for is kept in user_data/downloads.json until it is taken off the list; the bytes themselves are hidden parts
beside the result (transfer.py), so a kill at any moment loses nothing. A job keeps to the commit it began with, whatever its
branch does meanwhile. Every change is a `download` event, the job as `Job.shown` gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import glob
import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modules.download.fetch import Downloaded, DownloadRequest, download, plan_download, remove_unfinished
from modules.download.hub import check_names, folder_of
from modules.errors import AppError, Conflict, NotFound
from modules.events import EventBus, revision
from modules.overlays import read_json, write_json
from modules.paths import confine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modules.download.account import HubAccount
    from modules.download.fetch import DownloadProgress
    from modules.download.plan import DownloadPlan

log = logging.getLogger(__name__)

State = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
SLOTS = 3
KEPT = 100
PUBLISH_S = 0.25


@dataclasses.dataclass
class Job:
    """One download. `branch` is a branch, tag or commit; `files` are the paths asked for, empty for the usual choice; `fetched`
    those that this job brought.

    `speed` is bytes per second, `eta_s` seconds, both None while unknown. `model` is the id it is listed under once it is there,
    `problem` why no backend can take it.
    """

    id: str
    repository: str
    branch: str | None
    files: list[str]
    folder: str
    commit: str | None = None
    state: State = "queued"
    created: float = 0.0
    file: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    files_done: int = 0
    files_total: int = 0
    speed: float | None = None
    eta_s: float | None = None
    fetched: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    error: dict[str, Any] | None = None
    model: str | None = None
    problem: str | None = None

    @property
    def over(self) -> bool:
        return self.state in ("done", "cancelled")

    def shown(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"revision": revision()}


class Downloads:
    """Belongs to the server's event loop. `start_up` when it runs, `close` before it ends."""

    def __init__(
        self,
        account: HubAccount,
        model_dir: Path,
        events: EventBus,
        record: Path,
        *,
        stall_s: float = 30.0,
        backoff_s: float = 1.0,
    ) -> None:
        self._account = account
        self._model_dir = model_dir
        self._events = events
        self._record = record
        self._stall_s, self._backoff_s = stall_s, backoff_s
        self._jobs: dict[str, Job] = {job.id: job for job in self._remembered()}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._published: dict[str, float] = {}
        self._closed = False

    def start_up(self) -> None:
        """Go on with what a kill or an end of the server cut off."""
        self._pump()

    def jobs(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [job.shown() for job in sorted(self._jobs.values(), key=lambda job: -job.created)]

    def job(self, job_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._job(job_id).shown()

    def busy(self, folder: Path) -> bool:
        """Whether something is being downloaded, or waits to be, into this folder or one around or below it."""
        places = [self._path(job) for job in self._jobs.values() if job.state in ("queued", "running", "paused")]
        return any(place.is_relative_to(folder) or folder.is_relative_to(place) for place in places)

    async def start(
        self, repository: str, branch: str | None, files: Sequence[str] = (), *, commit: str | None = None, name: str = ""
    ) -> dict[str, Any]:
        """Queue one; the same one asked for twice is one. Raises InvalidParameter and Conflict."""
        check_names(repository, branch)
        check_names(repository, commit)
        folder = name or folder_of(repository)
        confine(self._model_dir, folder)
        wanted = sorted(set(files))
        for job in self._jobs.values():
            same = job.repository == repository and job.files == wanted and job.folder == folder
            if same and job.state in ("queued", "running"):
                return job.shown()
            if same and job.state in ("paused", "failed", "cancelled"):
                job.branch, job.commit = branch, commit or (job.commit if branch == job.branch else None)
                return self.resume(job.id)
        job = Job(secrets.token_hex(6), repository, branch, wanted, folder, commit, created=time.time())
        self._jobs[job.id] = job
        self._change(job, state="queued")
        self._pump()
        return job.shown()

    async def pause(self, job_id: str) -> dict[str, Any]:
        """Stop it and keep what is there. Raises Conflict for one that is over."""
        job = self._job(job_id)
        if job.state not in ("queued", "running"):
            raise Conflict("This download is not at work.")
        self._change(job, state="paused", speed=None, eta_s=None)
        await self._stop(job)
        return job.shown()

    def resume(self, job_id: str) -> dict[str, Any]:
        """Go on with a paused, failed or cancelled one."""
        job = self._job(job_id)
        if job.state not in ("paused", "failed", "cancelled"):
            raise Conflict("This download is not stopped.")
        self._change(job, state="queued", error=None)
        self._pump()
        return job.shown()

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop it and delete what it brought, unless it is done. What was in the folder before stays."""
        job = self._job(job_id)
        if job.over:
            raise Conflict("This download is over.")
        self._change(job, state="cancelled", speed=None, eta_s=None)
        await self._stop(job)
        await asyncio.to_thread(remove_unfinished, self._path(job), job.fetched)
        self._change(job, fetched=[], done_bytes=0, files_done=0, file="")
        return job.shown()

    def forget(self, job_id: str) -> None:
        """Take an ended one off the list; the model it brought stays. Raises Conflict for one that may go on."""
        job = self._job(job_id)
        if not job.over and (job.state != "failed" or job.fetched or job.done_bytes):
            raise Conflict("This download is not over.", hint="Cancel it first, which deletes what has arrived.")
        del self._jobs[job_id]
        self._remember()
        self._events.publish("download", {"id": job_id, "state": "forgotten", "revision": revision()})

    async def close(self) -> None:
        """Stop at once; `start_up` of the next server goes on."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- at work --------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start what may start: the oldest first, `SLOTS` at once, one for each folder."""
        busy = {self._jobs[job_id].folder for job_id in self._tasks}
        for job in sorted(self._jobs.values(), key=lambda job: job.created):
            if self._closed or len(self._tasks) >= SLOTS:
                return
            if job.state in ("queued", "running") and job.id not in self._tasks and job.folder not in busy:
                busy.add(job.folder)
                task = asyncio.get_running_loop().create_task(self._one(job), name=f"download {job.id}")
                self._tasks[job.id] = task
                task.add_done_callback(functools.partial(self._ended, job.id))

    def _ended(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self._tasks[job_id]
        self._pump()

    async def _stop(self, job: Job) -> None:
        task = self._tasks.get(job.id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _one(self, job: Job) -> None:
        try:
            self._change(job, state="running", error=None)
            done = await self._fetch(job)
        except asyncio.CancelledError:
            raise  # whoever stopped it has said so; a server that ends leaves it running, for the next one
        except AppError as error:
            wire = error.to_wire()
            self._change(job, state="failed", speed=None, eta_s=None, error=wire)
        except Exception as error:
            log.exception("downloading %s", job.repository)
            failed = AppError(f"The download failed: {error}.", hint="See the log.").to_wire()
            self._change(job, state="failed", speed=None, eta_s=None, error=failed)
        else:
            size = done.plan.total_bytes
            self._change(
                job,
                state="done",
                file="",
                speed=None,
                eta_s=None,
                done_bytes=size,
                files_done=job.files_total,
                model=self._listed_as(done),
                problem=done.model.problem,
            )

    async def _fetch(self, job: Job) -> Downloaded:
        hub = await asyncio.to_thread(self._account.hub)
        request = DownloadRequest(
            job.repository,
            self._model_dir,
            job.commit or job.branch,
            tuple(glob.escape(path) for path in job.files),
            self._path(job),
            self._stall_s,
            with_projector=not job.files,  # whoever names the files has chosen
        )
        plan = await plan_download(request, hub)
        self._change(
            job,
            commit=plan.commit,
            skipped=plan.skipped,
            total_bytes=plan.total_bytes,
            files_total=len(plan.files),
        )
        request = dataclasses.replace(request, reserved_bytes=self._reserved(job))
        return await download(request, lambda news: self._heard(job, plan, news), hub=hub, plan=plan, backoff_s=self._backoff_s)

    def _reserved(self, job: Job) -> int:
        """What the other downloads at work still need."""
        others = (self._jobs[job_id] for job_id in self._tasks if job_id != job.id)
        return sum(max(0, other.total_bytes - other.done_bytes) for other in others if other.state == "running")

    def _heard(self, job: Job, plan: DownloadPlan, news: DownloadProgress) -> None:
        if job.state != "running":
            return  # stopped meanwhile
        if news.finished is not None:
            job.fetched.append(news.finished)
        left = news.total_bytes - news.done_bytes
        self._change(
            job,
            kept=news.finished is not None,
            file=news.file,
            done_bytes=news.done_bytes,
            files_done=news.files_done,
            speed=news.speed,
            eta_s=left / news.speed if news.speed else None,
        )

    def _change(self, job: Job, *, kept: bool = True, **values: Any) -> None:
        for name, value in values.items():
            setattr(job, name, value)
        now = time.monotonic()
        if kept:
            self._remember()
        elif now - self._published.get(job.id, 0.0) < PUBLISH_S:
            return
        self._published[job.id] = now
        self._events.publish("download", job.shown(), key=job.id)

    def _path(self, job: Job) -> Path:
        return self._model_dir / job.folder

    def _listed_as(self, done: Downloaded) -> str:
        with contextlib.suppress(ValueError):
            return Path(done.model.path).relative_to(self._model_dir).as_posix()
        return os.path.basename(done.model.path)

    def _job(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("There is no such download.", param="id") from None

    # --- what outlives the server -----------------------------------------------------------------------------------

    def _remember(self) -> None:
        live = [job for job in self._jobs.values() if not job.over]
        ended = sorted((job for job in self._jobs.values() if job.over), key=lambda job: -job.created)[:KEPT]
        try:
            write_json(self._record, {"jobs": [dataclasses.asdict(job) for job in (*live, *ended)]})
        except OSError as error:
            log.warning("the list of downloads was not kept: %s", error)

    def _remembered(self) -> list[Job]:
        names = {field.name for field in dataclasses.fields(Job)}
        found = []
        for entry in read_json(self._record).get("jobs", []):
            try:
                job = Job(**{key: value for key, value in entry.items() if key in names})
                confine(self._model_dir, job.folder)
            except (TypeError, AttributeError, AppError):
                continue  # of another version, or edited: its parts are found again when it is asked for again
            found.append(dataclasses.replace(job, speed=None, eta_s=None))
        return found

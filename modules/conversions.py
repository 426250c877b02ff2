"""Conversions of the running server: a model as a GGUF of another type, one at a time, in the background.

Each is modules.convert.gguf.convert with its child processes. An end of the server stops them and leaves nothing that looks like
a model, so nothing is kept over a restart. Every change is a `conversion` event, the job as `Job.shown` gives it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modules.convert.gguf import AUTO, ConvertJob, convert, default_output
from modules.convert.gguf_types import gguf_type
from modules.errors import Conflict, NotFound
from modules.events import EventBus, revision
from modules.job_queue import JobQueue, failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modules.library import Library
    from modules.overlays import Overlays
    from modules.schema import LoadProgress

    Run = Callable[..., Awaitable[Any]]

State = Literal["queued", "running", "done", "failed", "cancelled"]
KEPT = 50


@dataclasses.dataclass
class Job:
    """One conversion to `type`; `name` is the file that it makes, `result` its model id and size in bytes."""

    id: str
    model: str
    type: str
    name: str
    state: State = "queued"
    created: float = 0.0
    stage: str = ""
    fraction: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    requantize: bool = False

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")

    def shown(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"revision": revision()}


class Conversions:
    """Belongs to the server's event loop. `close` before the loop ends."""

    def __init__(self, library: Library, model_dir: Path, overlays: Overlays, events: EventBus, *, run: Run = convert) -> None:
        self._library = library
        self._model_dir = model_dir
        self._overlays = overlays
        self._events = events
        self._run = run
        self._jobs: dict[str, Job] = {}
        self._queue = JobQueue(self._one, "conversions")

    def jobs(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [job.shown() for job in sorted(self._jobs.values(), key=lambda job: -job.created)]

    def job(self, job_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._job(job_id).shown()

    def busy(self, model: str) -> bool:
        """Whether this model is being read, or waits to be."""
        return any(job.model == model and not job.over for job in self._jobs.values())

    async def start(self, model: str, kind: str, *, requantize: bool = False) -> dict[str, Any]:
        """Queue one; "auto" holds the model without a loss. Raises AppError for what can't be, Conflict for what is there."""
        wanted = AUTO if kind == AUTO else gguf_type(kind)
        files = await asyncio.to_thread(self._library.find, model)
        out = self._out(Path(files.path), "F16" if wanted == AUTO else wanted)
        if out.exists() and wanted != AUTO:
            raise Conflict(f"{out.name} exists already.", hint="Delete or rename that one first.")
        for job in self._jobs.values():
            if not job.over and job.model == files.id and job.type == wanted:
                return job.shown()
        job = Job(secrets.token_hex(6), files.id, wanted, out.name, created=time.time(), requantize=requantize)
        self._jobs[job.id] = job
        for old in [old for old in self._jobs.values() if old.over][:-KEPT]:
            del self._jobs[old.id]
        self._change(job, stage="waiting")
        self._queue.add(job.id)
        return job.shown()

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a queued or running one; nothing of it stays."""
        job = self._job(job_id)
        if self._queue.withdraw(job_id):
            self._change(job, state="cancelled", stage="")
        elif job.state == "running":
            await self._queue.stop()
        return job.shown()

    def forget(self, job_id: str) -> None:
        """Take an ended one off the list; the file that it made stays."""
        if not self._job(job_id).over:
            raise Conflict("This one is at work.", hint="Stop it first.")
        del self._jobs[job_id]
        self._events.publish("conversion", {"id": job_id, "state": "forgotten", "revision": revision()})

    async def close(self) -> None:
        await self._queue.close()

    # --- at work --------------------------------------------------------------------------------------------------

    async def _one(self, job_id: str) -> None:
        job = self._jobs[job_id]
        self._change(job, state="running", stage="starting")
        try:
            files = await asyncio.to_thread(self._library.find, job.model)
            source = Path(files.path)
            out = None if job.type == AUTO else self._out(source, job.type)
            task = ConvertJob(source, job.type, out, requantize=job.requantize)
            done = await self._run(task, lambda news: self._heard(job, news), self._overlays)
        except asyncio.CancelledError:
            self._change(job, state="cancelled", stage="")
            raise
        except Exception as error:
            self._change(job, state="failed", stage="", error=failure(error, f"Converting {job.model}"))
        else:
            result = {"model": self._listed_as(done.path), "size_bytes": done.size_bytes, "seconds": done.seconds}
            notes = list(done.notes)
            self._change(
                job, state="done", stage="", fraction=1.0, type=done.type, name=done.path.name, notes=notes, result=result
            )

    def _heard(self, job: Job, news: LoadProgress) -> None:
        self._change(job, stage=news.stage, fraction=news.fraction)

    def _change(self, job: Job, **values: Any) -> None:
        for name, value in values.items():
            setattr(job, name, value)
        self._events.publish("conversion", job.shown(), key=job.id)

    def _out(self, source: Path, kind: str) -> Path:
        """Beside the model; beside the other models when it lies outside the user's folder."""
        out = default_output(source, kind)
        return out if out.is_relative_to(self._model_dir) else self._model_dir / out.name

    def _listed_as(self, path: Path) -> str:
        return path.relative_to(self._model_dir).as_posix() if path.is_relative_to(self._model_dir) else path.name

    def _job(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("There is no such conversion.", param="id") from None

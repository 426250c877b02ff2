"""Quantisations of the running server: one at a time, in the background, taken up again after a restart.

Each is a child process (modules.quantize.process). What a user asked for is kept in user_data/quantizations.json until it has
ended, so that a run that a kill or a crash cut off can be resumed: its finished blocks are beside the result. Every change is
a `quantization` event, the job as `Job.shown` gives it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modules.errors import Conflict, InvalidParameter, NotFound
from modules.events import EventBus, revision
from modules.job_queue import JobQueue, failure
from modules.overlays import read_json, write_json
from modules.paths import confine
from modules.quantize.process import QuantizeJob, check_source, default_out, quantize
from modules.quantize.settings import QuantizeSettings, check_settings, complete_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modules.library import Library
    from modules.overlays import Overlays

    Run = Callable[..., Awaitable[Any]]

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
KEPT_LOSSES = 20_000


@dataclasses.dataclass
class Job:
    """One quantisation. `losses` are [block, layer, relative squared error], as they come."""

    id: str
    model: str
    out: str
    settings: dict[str, Any]
    device: str = "auto"
    state: State = "queued"
    created: float = 0.0
    stage: str = ""
    fraction: float = 0.0
    eta_s: float | None = None
    block: int = 0
    blocks: int = 0
    losses: list[list[Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    overwrite: bool = False

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")

    def shown(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"revision": revision()}


class Quantizations:
    """Belongs to the server's event loop. `close` before the loop ends."""

    def __init__(
        self, library: Library, model_dir: Path, overlays: Overlays, events: EventBus, record: Path, *, run: Run = quantize
    ) -> None:
        self._library = library
        self._model_dir = model_dir
        self._overlays = overlays
        self._events = events
        self._record = record
        self._run = run
        self._jobs: dict[str, Job] = {job.id: job for job in self._remembered()}
        self._queue = JobQueue(self._one, "quantizations")

    def jobs(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [job.shown() for job in sorted(self._jobs.values(), key=lambda job: -job.created)]

    def job(self, job_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._job(job_id).shown()

    async def start(
        self, model: str, settings: dict[str, Any], *, device: str = "auto", name: str = "", overwrite: bool = False
    ) -> dict[str, Any]:
        """Queue one. Raises AppError for a model or settings that can't be, and Conflict for a result that is there."""
        files = await asyncio.to_thread(self._library.find, model)
        check_source(files)
        made = settings_of(settings)
        base = Path(files.path)
        out = confine(self._model_dir, name) if name else default_out(base, made, self._model_dir)
        if out.exists() and not overwrite:
            raise Conflict(f"{out.name} exists already.", hint="Give another name, or replace it.")
        if any(not job.over and job.out == str(out) for job in self._jobs.values()):
            raise Conflict(f"{out.name} is being made.", hint="Wait for it, or give another name.")
        job = Job(secrets.token_hex(6), files.id, str(out), made.to_dict(), device, created=time.time(), overwrite=overwrite)
        return self._add(job)

    def resume(self, job_id: str) -> dict[str, Any]:
        """Go on after the last finished block."""
        job = self._job(job_id)
        if not job.over or job.state == "done":
            raise Conflict("This one is not stopped.", hint="Start a new one.")
        job.error, job.losses, job.notes = None, [], []
        return self._add(job)

    async def cancel(self, job_id: str) -> None:
        """Stop a queued or running one. The finished blocks stay for `resume`."""
        job = self._job(job_id)
        if self._queue.withdraw(job_id):
            self._change(job, state="cancelled", stage="")
        elif job.state == "running":
            await self._queue.stop()

    def forget(self, job_id: str) -> None:
        """Take an ended one off the list; the checkpoint it made stays, an unfinished one's work folder goes."""
        job = self._job(job_id)
        if not job.over:
            raise Conflict("This one is at work.", hint="Stop it first.")
        del self._jobs[job_id]
        if job.state != "done":
            _remove_work(Path(job.out))
        self._remember()
        self._events.publish("quantization", {"id": job_id, "state": "forgotten"})

    async def close(self) -> None:
        await self._queue.close()

    # --- at work --------------------------------------------------------------------------------------------------

    def _add(self, job: Job) -> dict[str, Any]:
        self._jobs[job.id] = job
        self._change(job, state="queued", stage="waiting")
        self._queue.add(job.id)
        return job.shown()

    async def _one(self, job_id: str) -> None:
        job = self._jobs[job_id]
        self._change(job, state="running", stage="starting", fraction=0.0)
        try:
            files = await asyncio.to_thread(self._library.find, job.model)
            task = QuantizeJob(Path(files.path), Path(job.out), settings_of(job.settings), job.device, overwrite=job.overwrite)
            done = await self._run(task, lambda event: self._heard(job, event), self._overlays)
        except asyncio.CancelledError:
            self._change(job, state="cancelled", stage="", eta_s=None)
            raise
        except Exception as error:
            self._change(job, state="failed", stage="", eta_s=None, error=failure(error, f"Quantising {job.model}"))
        else:
            result = {
                "model": Path(done.path).name,
                "size_bytes": done.size_bytes,
                "seconds": done.seconds,
                "mean_loss": done.mean_loss,
                "layers": done.layers,
            }
            self._change(job, state="done", stage="", fraction=1.0, eta_s=None, result=result)

    def _heard(self, job: Job, event: dict[str, Any]) -> None:
        if "layer" in event:
            job.losses.append([event["block"], event["layer"], event["loss"]])
            del job.losses[:-KEPT_LOSSES]
            values = {key: event[key] for key in ("block", "blocks", "fraction", "eta_s")}
            self._change(job, stage=str(event["layer"]), kept=False, **values)
        elif "note" in event:
            job.notes.append(str(event["note"]))
            self._change(job, kept=False)
        elif "stage" in event:
            self._change(job, kept=False, stage=str(event["stage"]), fraction=float(event.get("fraction") or job.fraction))

    def _change(self, job: Job, *, kept: bool = True, **values: Any) -> None:
        for name, value in values.items():
            setattr(job, name, value)
        if kept:
            self._remember()
        # Only the newest loss: a page that missed one asks for the whole list.
        light = job.shown() | {"losses": job.losses[-1:], "count": len(job.losses)}
        self._events.publish("quantization", light, key=f"{job.id}:{len(job.losses)}")

    # --- what outlives the server -----------------------------------------------------------------------------------

    def _remember(self) -> None:
        kept = sorted(self._jobs.values(), key=lambda job: -job.created)[:50]
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._record, {"jobs": [dataclasses.asdict(job) for job in kept]})
        except OSError as error:
            log.warning("the list of quantisations was not kept: %s", error)

    def _remembered(self) -> list[Job]:
        names = {f.name for f in dataclasses.fields(Job)}
        found = []
        for entry in read_json(self._record).get("jobs", []):
            try:
                job = Job(**{k: v for k, v in entry.items() if k in names})
            except TypeError:
                continue  # of another version: its checkpoint, if any, is in the model folder all the same
            if not job.over:
                job.state, job.stage = "interrupted", ""
            found.append(job)
        return found

    def _job(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("There is no such quantisation.", param="id") from None


def settings_of(values: dict[str, Any]) -> QuantizeSettings:
    """Settings from JSON. Raises InvalidParameter for an unknown name or a value of another kind."""
    known = {f.name: f.default for f in dataclasses.fields(QuantizeSettings)}
    for name, value in values.items():
        if name not in known:
            raise InvalidParameter(f"There is no setting {name[:64]!r}.", param="settings")
        default = known[name]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, kinds):
            raise InvalidParameter(f"{name} is of the wrong kind.", param=name)
    settings = complete_settings(values)
    check_settings(settings)
    return settings


def _remove_work(out: Path) -> None:
    import shutil

    shutil.rmtree(out.with_name(f".{out.name}.part"), ignore_errors=True)

"""Installs while the server runs: one job at a time, progress on the event bus, cancellable, taken up again after a restart.

The first start sets up only what the first chat needs. `resume` queues the rest of the default backends, plus what a user
asked for and did not get yet. A job is a process of its own (modules.install_job) at low priority; its log is in
installer_files/logs. Every change is an `install` event: {overlay, title, stage, fraction, line, state}, state being queued,
running, done or failed; with failed, `stage` is the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil

from modules import llamacpp_build
from modules.environments import Installer
from modules.errors import InstallFailed
from modules.install_job import BUILD_TARGET
from modules.job_queue import JobQueue
from modules.overlays import env_specs, installer_dir, read_json, start_script, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modules.events import EventBus
    from modules.overlays import Overlays

log = logging.getLogger(__name__)

DEFAULT_TARGETS = ("transformers", BUILD_TARGET)
State = Literal["queued", "running", "done", "failed"]


@dataclass
class Job:
    """One installation. `overlay` is an environment, or llama-cpp-python for the compiled part of the llamacpp one."""

    overlay: str
    title: str
    state: State = "queued"
    stage: str = "waiting"
    fraction: float | None = None
    line: str = ""


class InstallManager:
    """Belongs to the server's event loop. `close` before the loop ends."""

    def __init__(
        self, overlays: Overlays, events: EventBus, *, torch: str = "auto", job: Sequence[str] = ("-m", "modules.install_job")
    ) -> None:
        self._job = tuple(job)
        self._overlays = overlays
        self._events = events
        self._torch = torch
        self._jobs: dict[str, Job] = {}
        self._queue = JobQueue(self._one, "installs")
        self._process: asyncio.subprocess.Process | None = None
        self._cancelled: set[str] = set()
        self._memory = installer_dir(overlays.root) / "install_queue.json"

    @property
    def managed(self) -> bool:
        """Whether this set was made by the start scripts; a developer's set is left alone."""
        return (self._overlays.set_dir / "set.json").is_file()

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of this run, for a page that has just been opened."""
        return [asdict(job) for job in self._jobs.values()]

    def resume(self) -> list[str]:
        """Queue the default backends that are missing and what was asked for before a restart; their names."""
        if not self.managed:
            return []
        asked = read_json(self._memory)
        stopped = set(asked.get("stopped", []))
        wanted = [target for target in DEFAULT_TARGETS if target not in stopped] + list(asked.get("queued", []))
        missing = [target for target in dict.fromkeys(wanted) if self._missing(target)]
        for target in missing:
            self._add(target)
        return missing

    def _missing(self, target: str) -> bool:
        installer = Installer(self._overlays, _silent, torch=self._torch)
        if target == BUILD_TARGET:
            return not llamacpp_build.build_state(installer) and llamacpp_build.find_compiler() is not None
        return target in installer.specs and not installer.ready(target)

    def install(self, overlay: str) -> dict[str, Any]:
        """Queue one installation that a user asked for; one that is queued or running already is that one."""
        if not self.managed:
            raise InstallFailed(f"These environments are not managed by {start_script()}.", hint="Unset SWITCHYARD_SET.")
        if overlay != BUILD_TARGET and overlay not in env_specs(self._overlays.root):
            raise InstallFailed(f"There is nothing to install for {overlay!r} yet.")
        spec = env_specs(self._overlays.root).get(overlay)
        problem = spec.problem() if spec else None
        if spec and problem:
            raise InstallFailed(f"{spec.title} {problem}")
        job = self._jobs.get(overlay)
        if job is None or job.state in ("done", "failed"):
            self._forget_stop(overlay)
            job = self._add(overlay)
        return asdict(job)

    def _add(self, target: str) -> Job:
        job = self._jobs[target] = Job(target, self._title(target))
        self._cancelled.discard(target)
        self._remember()
        self._publish(job)
        self._queue.add(target)
        return job

    def _title(self, target: str) -> str:
        spec = env_specs(self._overlays.root).get(target)
        return spec.title if spec else target

    async def cancel(self, overlay: str) -> None:
        """Stop a queued or running job; it is not taken up again until someone asks."""
        job = self._jobs.get(overlay)
        if job is None or job.state in ("done", "failed"):
            return
        self._cancelled.add(overlay)
        self._remember()
        if self._queue.withdraw(overlay):
            self._finish(job, "failed", "Stopped.")
        else:
            await self._kill()

    async def close(self) -> None:
        """Stop the running job; it goes on after the next start."""
        await self._queue.close()
        await self._kill()

    # -- at work

    async def _one(self, overlay: str) -> None:
        job = self._jobs[overlay]
        job.state, job.stage = "running", "starting"
        self._publish(job)
        try:
            reason = await self._run(job)
        except OSError as error:
            reason = f"the installer could not be started: {error}"
        if overlay in self._cancelled:
            reason = "Stopped."
        if reason:
            log.warning("Installing %s failed: %s", overlay, reason)
        self._finish(job, "failed" if reason else "done", reason or "installed")

    async def _run(self, job: Job) -> str | None:
        """None when it is installed, else the reason in one line."""
        command = [sys.executable, *self._job, str(self._overlays.set_dir), job.overlay, "--torch", self._torch]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self._overlays.root,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=sys.platform != "win32",
        )
        end: dict[str, Any] = {}
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            message = json.loads(raw)
            if "state" in message:
                end = message
            else:
                step, line = message["stage"], message["line"]
                job.stage = ": ".join(word for word in (step, line) if word and word != job.title) or step
                job.fraction, job.line = message["fraction"], line
                self._publish(job)
        status = await self._process.wait()
        self._process = None
        if status == 0 and end.get("state") == "done":
            return None
        return (
            str(end["line"])
            if end
            else f"the installer ended with status {status}; see {installer_dir(self._overlays.root) / 'logs'}"
        )

    async def _kill(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(process.pid)
            started = leader.children(recursive=True)
            for member in [*started, leader]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        await asyncio.to_thread(psutil.wait_procs, started, timeout=5)
        await process.wait()

    def _finish(self, job: Job, state: State, stage: str) -> None:
        job.state, job.stage, job.fraction, job.line = state, stage, None, stage
        self._remember()
        self._publish(job)

    def _publish(self, job: Job) -> None:
        self._events.publish("install", asdict(job), key=job.overlay if job.state == "running" else None)

    # -- what a restart must know

    def _remember(self) -> None:
        """Keep what is still wanted, and what was stopped on purpose."""
        stopped = (set(read_json(self._memory).get("stopped", [])) | self._cancelled) - {
            job.overlay for job in self._jobs.values() if job.state == "done"
        }
        queued = [job.overlay for job in self._jobs.values() if job.state != "done" and job.overlay not in stopped]
        write_json(self._memory, {"queued": queued, "stopped": sorted(stopped)})

    def _forget_stop(self, overlay: str) -> None:
        known = read_json(self._memory)
        self._cancelled.discard(overlay)
        write_json(self._memory, {**known, "stopped": [name for name in known.get("stopped", []) if name != overlay]})


def _silent(stage: str, fraction: float | None, line: str) -> None:
    """Nothing is shown while one only looks."""

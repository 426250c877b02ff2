"""Jobs in the background of the server, one after another, and how the end of one that failed is told."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from modules.errors import AppError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

log = logging.getLogger(__name__)


class JobQueue:
    """The ids of jobs that wait, and the task of the one at work, which `work` does. Belongs to the server's event loop."""

    def __init__(self, work: Callable[[str], Coroutine[Any, Any, None]], name: str) -> None:
        self._do = work
        self._name = name
        self._waiting: list[str] = []
        self._runner: asyncio.Task[None] | None = None
        self._work: asyncio.Task[None] | None = None

    def add(self, job_id: str) -> None:
        self._waiting.append(job_id)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    def withdraw(self, job_id: str) -> bool:
        """Whether it still waited; it does no longer."""
        waited = job_id in self._waiting
        if waited:
            self._waiting.remove(job_id)
        return waited

    async def stop(self) -> None:
        """End the one at work, and wait until it has ended."""
        work = self._work
        if work is not None:
            work.cancel()
            await asyncio.wait([work])

    async def close(self) -> None:
        """End all of it."""
        self._waiting.clear()
        if self._runner is not None and not self._runner.done():
            self._runner.cancel()
            await asyncio.wait([self._runner])

    async def _run(self) -> None:
        while self._waiting:
            self._work = asyncio.get_running_loop().create_task(self._next(), name=f"{self._name}: one")
            try:
                await asyncio.wait([self._work])
            except asyncio.CancelledError:  # the server ends
                await self.stop()
                raise

    async def _next(self) -> None:
        if self._waiting:  # else it was withdrawn in the meantime: a job waits until its work begins
            await self._do(self._waiting.pop(0))


def failure(error: Exception, doing: str) -> dict[str, Any]:
    """The wire form of what ended a job, for its card; of the details only how its process ended. Logs what is no AppError."""
    if not isinstance(error, AppError):
        log.error("%s failed", doing, exc_info=error)
        error = AppError(f"{doing} failed: {error}.", hint="See the log.")
    wire = error.to_wire()
    return wire | {"detail": {key: value for key, value in wire["detail"].items() if key in ("exit_code", "stderr")}}

"""The server's batches: uploaded, started, paused, gone on with, fetched. One runs at a time; they belong to no page.

Each has a folder of its own under the data folder: input.jsonl, output.jsonl and state.json. What counts as done is what the
output holds. A batch that the server's end cut off is paused at the next start. Every change is a `batch` event with its view.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modules.batch.files import read_lines, storage_error
from modules.batch.runner import BatchRun, Progress
from modules.errors import AppError, Conflict, InvalidParameter, NoModelLoaded, NotFound, StorageError, StorageFull
from modules.events import revision
from modules.overlays import write_json

if TYPE_CHECKING:
    from modules.services import Services

log = logging.getLogger(__name__)

State = Literal["uploading", "waiting", "running", "paused", "cancelled", "done"]
MAX_INPUT_BYTES = 1 << 30
_PROBLEMS_SHOWN = 3
_ID = re.compile(r"batch_[0-9a-f]{24}")
_SPARE_BYTES = 16 << 20
AnswerLine = Callable[["Services", str, "dict[str, Any]", "str | None"], Awaitable["tuple[int, dict[str, Any]]"]]


@dataclass
class Batch:
    """One batch as the page sees it. `model` answers every line. `problem` says why it stopped by itself."""

    id: str
    name: str
    created_at: float
    state: State = "uploading"
    model: str | None = None
    endpoint: str | None = None
    lines: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_s: float | None = None
    remaining_s: float | None = None
    problem: str | None = None
    ended_at: float | None = None
    bytes: int = 0

    def view(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"revision": revision()}


def slots_of(services: Services, model: str) -> int:
    """How many generations the worker of `model` runs at once."""
    residents = [r for r in services.manager.residents() if r.model.id == model]
    if not residents:
        return 1
    resident = residents[-1]
    return (resident.info.slots if resident.info else 0) or services.specs[resident.loader].slots


class BatchJobs:
    """Belongs to the server's event loop. `answer` is `modules.api.batch_lines.answer_line`."""

    def __init__(self, services: Services, folder: Path, answer: AnswerLine) -> None:
        self._services = services
        self._folder = folder
        self._answer = answer
        self._batches: dict[str, Batch] = {}
        self._current: tuple[Batch, asyncio.Task[Progress]] | None = None
        self._runner: asyncio.Task[None] | None = None
        self._told: dict[str, float] = {}
        self._saving = asyncio.Lock()

    async def start_up(self) -> None:
        """Read what is kept. A batch that was at work when the server ended is paused."""
        for batch in await asyncio.to_thread(self._read_all):
            if batch.state in ("running", "waiting"):
                batch.state, batch.problem = "paused", "The server was stopped while this batch ran."
                await self._save(batch)
            self._batches[batch.id] = batch

    async def close(self) -> None:
        """Stop; what is done is kept, and the batch is paused at the next start."""
        tasks = [task for task in (self._runner, self._current[1] if self._current else None) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- what the routes ask ----------------------------------------------------------------------------------------

    def views(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [batch.view() for batch in sorted(self._batches.values(), key=lambda b: -b.created_at)]

    def get(self, batch_id: str) -> Batch:
        batch = self._batches.get(batch_id)
        if batch is None:
            raise NotFound("There is no such batch.", hint="Reload the list.")
        return batch

    def input_path(self, batch_id: str) -> Path:
        return self._home(self.get(batch_id).id) / "input.jsonl"

    def output_path(self, batch_id: str) -> Path:
        """The results so far. Raises NotFound while there are none."""
        path = self._home(self.get(batch_id).id) / "output.jsonl"
        if not path.is_file():
            raise NotFound("This batch has no results yet.")
        return path

    async def create(self, name: str) -> Batch:
        """An empty batch, to be uploaded in pieces."""
        shown = " ".join(name.split())[:120] or "batch.jsonl"
        batch = Batch(f"batch_{secrets.token_hex(12)}", shown, time.time())
        await asyncio.to_thread(self._home(batch.id).mkdir, parents=True)
        await asyncio.to_thread((self._home(batch.id) / "input.jsonl").write_bytes, b"")
        self._batches[batch.id] = batch
        await self._save(batch)
        self._publish(batch)
        return batch

    async def upload(self, batch_id: str, offset: int, data: bytes) -> Batch:
        """Append a piece at byte `offset`. One that is there already (a page that asks again) is taken as read."""
        batch = self.get(batch_id)
        if batch.state != "uploading":
            raise Conflict("This batch was started; its input can't change.", hint="Upload the file as a new batch.")
        if offset + len(data) > MAX_INPUT_BYTES:
            raise InvalidParameter(f"A batch file holds at most {MAX_INPUT_BYTES >> 30} GiB.", param="text")
        if offset > batch.bytes:
            raise Conflict(f"{batch.bytes} bytes are here; this piece begins at {offset}.", hint="Upload the file again.")
        if shutil.disk_usage(self._folder).free < len(data) + _SPARE_BYTES:
            raise StorageFull("The disk of the data folder is full.", hint="Free some space, then upload the file again.")
        await asyncio.to_thread(_write_at, self.input_path(batch_id), offset, data)
        batch.bytes = max(batch.bytes, offset + len(data))
        return batch

    async def start(self, batch_id: str, model: str | None = None) -> Batch:
        """Start, or go on. `model` is a loaded one; None: the batch's own, else the active one."""
        batch = self.get(batch_id)
        if batch.state in ("running", "waiting"):
            return batch
        wanted = model or batch.model
        active = self._services.manager.active()
        if wanted is None and active is None:
            raise NoModelLoaded("No model is loaded.", hint="Load one on the Models page, then start the batch.")
        resident = await self._services.manager.resolve(wanted)
        if batch.state in ("uploading", "cancelled", "done"):
            lines, problem = await asyncio.to_thread(_look_through, self.input_path(batch_id))
            if lines == 0:
                raise InvalidParameter("The file holds no requests.", hint="One JSON object a line; see docs/batch.md.")
            if problem:
                raise InvalidParameter(f"No line of the file is a request. {problem}", hint="See docs/batch.md.")
            batch.lines = lines
        batch.model, batch.state, batch.problem, batch.ended_at = resident.model.id, "waiting", None, None
        await self._save(batch)
        self._publish(batch)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._work(), name="batches")
        return batch

    async def stop(self, batch_id: str, state: Literal["paused", "cancelled"]) -> Batch:
        """Pause or cancel; results so far are kept. A paused one goes on with `start`."""
        batch = self.get(batch_id)
        if batch.state in ("running", "waiting", "paused", "uploading"):
            if batch.state == "uploading" and state == "paused":
                return batch
            batch.state = state
            batch.tokens_per_s = batch.remaining_s = None
            if self._current is not None and self._current[0] is batch:
                task = self._current[1]
                task.cancel()
                await asyncio.wait([task])
            await self._save(batch)
            self._publish(batch)
        return batch

    async def delete(self, batch_id: str) -> None:
        """Remove a batch with its files."""
        batch = self.get(batch_id)
        if batch.state in ("running", "waiting"):
            raise Conflict("This batch is at work.", hint="Cancel it first.")
        del self._batches[batch_id]
        await asyncio.to_thread(shutil.rmtree, self._home(batch_id), True)
        self._services.events.publish("batch", {"id": batch_id, "state": "deleted"})

    # --- at work ------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while (batch := self._next()) is not None:
            await self._run(batch)

    def _next(self) -> Batch | None:
        waiting = [batch for batch in self._batches.values() if batch.state == "waiting"]
        return min(waiting, key=lambda batch: batch.created_at, default=None)

    async def _run(self, batch: Batch) -> None:
        home, model = self._home(batch.id), batch.model

        async def answer(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            return await self._answer(self._services, url, body, model)

        run = BatchRun(
            home / "input.jsonl",
            home / "output.jsonl",
            answer,
            lambda: slots_of(self._services, model or ""),
            lambda progress: self._progressed(batch, progress),
        )
        task = asyncio.get_running_loop().create_task(run.run(), name=batch.id)
        batch.state, self._current = "running", (batch, task)  # at once: a stop must find it
        try:
            await self._save_at_work(batch)
            self._publish(batch)
            await asyncio.wait([task])
        except asyncio.CancelledError:  # the server ends
            task.cancel()
            await asyncio.wait([task])
            raise
        finally:
            self._current = None
        if not task.cancelled():
            error = task.exception()
            if error is None:
                batch.state = "done"
            else:
                batch.state, batch.problem = "paused", str(error)
                log.warning("%s: %s", batch.id, error, exc_info=None if isinstance(error, AppError) else error)
        batch.tokens_per_s = batch.remaining_s = None
        batch.ended_at = time.time()
        await self._save_at_work(batch)
        self._publish(batch)

    def _progressed(self, batch: Batch, progress: Progress) -> None:
        batch.lines, batch.done, batch.failed = progress.total, progress.done, progress.failed
        batch.prompt_tokens, batch.completion_tokens = progress.prompt_tokens, progress.completion_tokens
        batch.tokens_per_s, batch.remaining_s = progress.tokens_per_s, progress.remaining_s
        now = time.monotonic()
        if now - self._told.get(batch.id, 0.0) >= 0.2 or progress.done == progress.total:
            self._told[batch.id] = now
            self._publish(batch)

    def _publish(self, batch: Batch) -> None:
        self._services.events.publish("batch", batch.view(), key=batch.id)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def _home(self, batch_id: str) -> Path:
        return self._folder / batch_id

    async def _save(self, batch: Batch) -> None:
        """Raises StorageError."""
        path = self._home(batch.id) / "state.json"
        async with self._saving:  # a stop and the end it brings about both save
            try:
                await asyncio.to_thread(write_json, path, dataclasses.asdict(batch))
            except OSError as error:
                raise storage_error(error, path) from error

    async def _save_at_work(self, batch: Batch) -> None:
        """Where nobody waits for it: the output file alone says what is done."""
        try:
            await self._save(batch)
        except StorageError as error:
            batch.problem = batch.problem or str(error)
            log.warning("%s: %s", batch.id, error)

    def _read_all(self) -> list[Batch]:
        found = []
        for path in self._folder.glob("batch_*/state.json"):
            if not _ID.fullmatch(path.parent.name):
                continue
            with contextlib.suppress(OSError, ValueError, TypeError):
                batch = Batch(**json.loads(path.read_text(encoding="utf-8")))
                if batch.id == path.parent.name:
                    found.append(batch)
                    continue
            log.warning("%s can't be read; its files are left as they are", path)
        return found


def _look_through(path: Path) -> tuple[int, str]:
    """(lines, what is wrong when not one of them is a request)."""
    problems: list[str] = []
    count = good = 0
    for line in read_lines(path):
        count += 1
        good += line.error is None
        if line.error is not None and len(problems) < _PROBLEMS_SHOWN:
            problems.append(f"Line {line.number}: {line.error.message}")
    return count, "" if good else " ".join(problems)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()

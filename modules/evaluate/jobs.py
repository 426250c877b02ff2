"""Evaluations of the running server: one at a time, in the background, belonging to no connection.

Every change is an `evaluation` event: {id, state, row, rows, stage, fraction, words}; `fraction` is the whole run's. A run that
the server's end cuts off is stored as it stands and can be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, Conflict
from modules.evaluate.runner import Evaluation, Surroundings

if TYPE_CHECKING:
    from modules.evaluate.plan import Plan
    from modules.events import EventBus

log = logging.getLogger(__name__)


class EvaluationJobs:
    """Belongs to the server's event loop. `close` before the loop ends."""

    def __init__(self, around: Surroundings, events: EventBus) -> None:
        self.around = around
        self._events = events
        self._queue: deque[Evaluation] = deque()
        self._current: Evaluation | None = None
        self._work: asyncio.Task[Any] | None = None
        self._runner: asyncio.Task[None] | None = None
        self._progress: dict[str, Any] = {}

    async def start(self, plan: Plan) -> str:
        """Queue a new run; its id. Raises AppError for what can be told without a model."""
        evaluation = await asyncio.to_thread(Evaluation.new, self.around, plan, self._changed)
        return self._add(evaluation)

    async def resume(self, run_id: str) -> str:
        """Queue the rest of a stored run. Raises Conflict when it is at work."""
        if self.active(run_id):
            raise Conflict("This evaluation is running.", hint="Stop it first, or wait for it.")
        evaluation = await asyncio.to_thread(Evaluation.resume, self.around, run_id, self._changed)
        return self._add(evaluation)

    def _add(self, evaluation: Evaluation) -> str:
        self._queue.append(evaluation)
        run_id = str(evaluation.run["id"])
        self._publish({"id": run_id, "state": "queued", "fraction": 0.0, "words": "waiting"})
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run_queue(), name="evaluations")
        return run_id

    async def cancel(self, run_id: str) -> None:
        """Stop a queued or running run; what is measured is kept. Nothing happens to one that has ended."""
        for evaluation in list(self._queue):
            if evaluation.run["id"] == run_id:
                self._queue.remove(evaluation)
                evaluation.run["state"] = "cancelled"
                await asyncio.to_thread(self.around.store.save, evaluation.run)
                self._publish({"id": run_id, "state": "cancelled", "fraction": 0.0, "words": ""})
        if self._current is not None and self._current.run["id"] == run_id and self._work is not None:
            work = self._work
            work.cancel()
            await asyncio.wait([work])

    def active(self, run_id: str) -> bool:
        current = [self._current] if self._current else []
        return any(evaluation.run["id"] == run_id for evaluation in (*current, *self._queue))

    def run(self, run_id: str) -> dict[str, Any]:
        """The record, as it stands now."""
        if self._current is not None and self._current.run["id"] == run_id:
            return self._current.run
        return self.around.store.load(run_id)

    def progress(self) -> list[dict[str, Any]]:
        """Of the current run and of those that wait."""
        waiting = [
            {"id": evaluation.run["id"], "state": "queued", "fraction": 0.0, "words": "waiting"} for evaluation in self._queue
        ]
        return ([self._progress] if self._current is not None and self._progress else []) + waiting

    async def close(self) -> None:
        self._queue.clear()
        for task in (self._runner, self._work):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    # --- at work --------------------------------------------------------------------------------------------------

    async def _run_queue(self) -> None:
        while self._queue:
            self._current = self._queue.popleft()
            self._work = asyncio.get_running_loop().create_task(self._current.work(), name="evaluation")
            try:
                await asyncio.wait([self._work])
            except asyncio.CancelledError:
                self._work.cancel()
                await asyncio.wait([self._work])
                raise
            run, self._current = self._current.run, None
            words = ""
            if not self._work.cancelled() and (error := self._work.exception()) is not None:
                log.error("evaluation %s: %s", run["id"], error, exc_info=None if isinstance(error, AppError) else error)
                words = str(error)
            self._publish({"id": run["id"], "state": run["state"], "fraction": 1.0, "words": words})

    def _changed(self, step: dict[str, Any]) -> None:
        if self._current is None:
            return
        run = self._current.run
        count = len(run["rows"])
        stages = stages_of(self._current)
        position = stages.index(step["stage"]) if step["stage"] in stages else len(stages)
        share = (position + min(max(step["fraction"], 0.0), 1.0)) / len(stages) if position < len(stages) else 1.0
        self._publish(
            {
                "id": run["id"],
                "state": "running",
                "row": step["row"],
                "rows": count,
                "label": run["rows"][step["row"]]["label"],
                "stage": step["stage"],
                "fraction": round((step["row"] + share) / count, 4),
                "words": step["words"],
            }
        )

    def _publish(self, progress: dict[str, Any]) -> None:
        self._progress = progress
        self._events.publish("evaluation", progress, key=f"{progress['id']}:{progress['state']}")


def stages_of(evaluation: Evaluation) -> list[str]:
    """The steps of one row, in order."""
    plan = evaluation.plan
    rest = [name for name, part in (("speed", plan.speed), ("answers", plan.questions), ("tasks", plan.tasks)) if part]
    return ["load", *(f"text:{name}" for name in plan.data), *rest]

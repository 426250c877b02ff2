"""Evaluations of the running server: one at a time, in the background, belonging to no connection.

Every change is an `evaluation` event: {id, state, row, rows, stage, fraction, words}; `fraction` is the whole run's. A run that
the server's end cuts off is stored as it stands and can be resumed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, Conflict
from modules.evaluate.runner import Evaluation, Surroundings
from modules.job_queue import JobQueue

if TYPE_CHECKING:
    from modules.evaluate.plan import Plan
    from modules.events import EventBus

log = logging.getLogger(__name__)


class EvaluationJobs:
    """Belongs to the server's event loop. `close` before the loop ends."""

    def __init__(self, around: Surroundings, events: EventBus) -> None:
        self.around = around
        self._events = events
        self._queue = JobQueue(self._one, "evaluations")
        self._waiting: dict[str, Evaluation] = {}
        self._current: Evaluation | None = None
        self._progress: dict[str, Any] = {}  # of the current one

    async def start(self, plan: Plan) -> str:
        """Queue a new run; its id. Raises AppError for what can be told without a model."""
        evaluation = await asyncio.to_thread(Evaluation.new, self.around, plan, self._changed)
        return self._add(evaluation)

    async def resume(self, run_id: str) -> str:
        """Queue the rest of a stored run. Raises Conflict when it is at work."""
        evaluation = await asyncio.to_thread(Evaluation.resume, self.around, run_id, self._changed)
        if self.active(run_id):
            raise Conflict("This evaluation is running.", hint="Stop it first, or wait for it.")
        return self._add(evaluation)

    def _add(self, evaluation: Evaluation) -> str:
        run_id = str(evaluation.run["id"])
        self._waiting[run_id] = evaluation
        self._publish(_queued(run_id))
        self._queue.add(run_id)
        return run_id

    async def cancel(self, run_id: str) -> None:
        """Stop a queued or running run; what is measured is kept. Nothing happens to one that has ended."""
        if self._queue.withdraw(run_id):
            evaluation = self._waiting.pop(run_id)
            evaluation.run["state"] = "cancelled"
            await asyncio.to_thread(self.around.store.save, evaluation.run)
            self._publish({"id": run_id, "state": "cancelled", "fraction": 0.0, "words": ""})
        elif self._is_current(run_id):
            await self._queue.stop()

    def active(self, run_id: str) -> bool:
        return run_id in self._waiting or self._is_current(run_id)

    def run(self, run_id: str) -> dict[str, Any]:
        """The record, as it stands now."""
        if self._current is not None and self._is_current(run_id):
            return self._current.run
        return self.around.store.load(run_id)

    def progress(self) -> list[dict[str, Any]]:
        """Of the current run and of those that wait."""
        return ([self._progress] if self._progress else []) + [_queued(run_id) for run_id in self._waiting]

    async def close(self) -> None:
        await self._queue.close()

    # --- at work --------------------------------------------------------------------------------------------------

    def _is_current(self, run_id: str) -> bool:
        return self._current is not None and self._current.run["id"] == run_id

    async def _one(self, run_id: str) -> None:
        self._current = self._waiting.pop(run_id)
        run, words = self._current.run, ""
        try:
            await self._current.work()
        except Exception as error:
            log.error("evaluation %s: %s", run_id, error, exc_info=None if isinstance(error, AppError) else error)
            words = str(error)
        finally:
            self._current, self._progress = None, {}
            self._publish({"id": run_id, "state": run["state"], "fraction": 1.0, "words": words})

    def _changed(self, step: dict[str, Any]) -> None:
        if self._current is None:
            return
        run = self._current.run
        count = len(run["rows"])
        stages = stages_of(self._current)
        position = stages.index(step["stage"]) if step["stage"] in stages else len(stages)
        share = (position + min(max(step["fraction"], 0.0), 1.0)) / len(stages) if position < len(stages) else 1.0
        self._progress = {
            "id": run["id"],
            "state": "running",
            "row": step["row"],
            "rows": count,
            "label": run["rows"][step["row"]]["label"],
            "stage": step["stage"],
            "fraction": round((step["row"] + share) / count, 4),
            "words": step["words"],
        }
        self._publish(self._progress)

    def _publish(self, progress: dict[str, Any]) -> None:
        self._events.publish("evaluation", progress, key=f"{progress['id']}:{progress['state']}")


def _queued(run_id: str) -> dict[str, Any]:
    return {"id": run_id, "state": "queued", "fraction": 0.0, "words": "waiting"}


def stages_of(evaluation: Evaluation) -> list[str]:
    """The steps of one row, in order."""
    plan = evaluation.plan
    rest = [name for name, part in (("speed", plan.speed), ("answers", plan.questions), ("tasks", plan.tasks)) if part]
    return ["load", *(f"text:{name}" for name in plan.data), *rest]

"""The queue of background jobs: one at a time, in order, withdrawn, stopped, closed; and how a failure is told."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from modules.errors import LoadOutOfMemory
from modules.job_queue import JobQueue, failure

if TYPE_CHECKING:
    import pytest


class Work:
    """Notes what happens to each job; a job ends when `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.notes: list[str] = []
        self.begun = asyncio.Queue[str]()
        self.queue = JobQueue(self._do, "test")

    async def _do(self, job_id: str) -> None:
        self.notes.append(f"begin {job_id}")
        self.begun.put_nowait(job_id)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.notes.append(f"cancel {job_id}")
            raise
        self.notes.append(f"end {job_id}")
        if job_id == "bad":
            raise RuntimeError("bad")


async def test_one_at_a_time_in_order_and_a_failure_holds_nothing_up() -> None:
    work = Work()
    work.gate.set()
    for job_id in ("one", "bad", "two"):
        work.queue.add(job_id)
    assert [await asyncio.wait_for(work.begun.get(), 20) for _ in range(3)] == ["one", "bad", "two"]
    assert work.notes[:4] == ["begin one", "end one", "begin bad", "end bad"]
    await work.queue.close()


async def test_a_job_that_waits_can_be_withdrawn_and_a_running_one_stopped() -> None:
    work = Work()
    work.queue.add("one")
    work.queue.add("two")
    assert await asyncio.wait_for(work.begun.get(), 20) == "one"
    assert work.queue.withdraw("two") and not work.queue.withdraw("two") and not work.queue.withdraw("one")
    await work.queue.stop()
    work.queue.add("three")
    assert await asyncio.wait_for(work.begun.get(), 20) == "three"
    await work.queue.close()
    assert work.notes == ["begin one", "cancel one", "begin three", "cancel three"]


async def test_a_job_whose_turn_has_come_waits_until_it_begins() -> None:
    work = Work()
    work.queue.add("one")
    await asyncio.sleep(0)  # the queue has made the task, which has not run yet
    assert work.queue.withdraw("one")
    work.queue.add("two")
    assert await asyncio.wait_for(work.begun.get(), 20) == "two"
    await work.queue.close()
    assert work.notes == ["begin two", "cancel two"]


def test_what_ended_a_job(caplog: pytest.LogCaptureFixture) -> None:
    detail = {"exit_code": 1, "stderr": "x", "secret": "y"}
    told = failure(LoadOutOfMemory("No room.", hint="Buy some.", detail=detail), "Converting m")
    assert (told["message"], told["detail"]) == ("No room.", {"exit_code": 1, "stderr": "x"}) and not caplog.records
    with caplog.at_level(logging.ERROR):
        told = failure(RuntimeError("boom"), "Converting m")
    assert told["message"] == "Converting m failed: boom." and "Converting m failed" in caplog.text

"""Requests that wait for a yes or no."""

from __future__ import annotations

import asyncio

import pytest

from modules.approvals import Approvals
from modules.errors import Conflict, NotFound


def test_one_answer_for_everybody_who_waits() -> None:
    async def go() -> None:
        told: list[int] = []
        approvals = Approvals(lambda: told.append(1))
        waiting = [asyncio.create_task(approvals.ask("a")) for _ in range(3)]
        other = asyncio.create_task(approvals.ask("b"))
        await asyncio.sleep(0)
        assert approvals.pending() == [{"model": "a", "waiting": 3}, {"model": "b", "waiting": 1}]
        approvals.answer("a", True)
        await asyncio.gather(*waiting)
        approvals.answer("b", False)
        with pytest.raises(Conflict, match="refused"):
            await other
        assert approvals.pending() == [] and len(told) >= 6
        with pytest.raises(NotFound):
            approvals.answer("a", True)

    asyncio.run(go())


def test_a_request_that_leaves_takes_its_question_along() -> None:
    async def go() -> None:
        approvals = Approvals(lambda: None)
        first, second = (asyncio.create_task(approvals.ask("a")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert approvals.pending() == [{"model": "a", "waiting": 1}]
        second.cancel()
        await asyncio.wait([second])
        assert approvals.pending() == []

    asyncio.run(go())


def test_nobody_answers() -> None:
    async def go() -> None:
        approvals = Approvals(lambda: None, wait_s=0.01)
        with pytest.raises(Conflict, match="did not answer"):
            await approvals.ask("a")
        assert approvals.pending() == []

    asyncio.run(go())

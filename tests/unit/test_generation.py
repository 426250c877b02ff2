"""Runs: text for any number of viewers from any offset, stop at every stage, receipts, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from modules.errors import ContextLengthExceeded, EngineDead, NoModelLoaded
from modules.events import EventBus
from modules.generation import Delta, End, Run, Runs, Status
from modules.model_manager import ModelManager
from modules.schema import GenerationRequest

from .fake_engine import SPEC, Environment, FakeHost, FakeLibrary, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modules.engine_client import EngineClient
    from modules.residents import Resident

WHOLE = "a0 a1 a2 "


class Rig:
    def __init__(self) -> None:
        self.host = FakeHost()
        self.manager = ModelManager(
            FakeLibrary("a", "b"), {"fake": SPEC}, Environment(), EventBus(), self.host.start, available=lambda: 1 << 40
        )
        self.runs = Runs(self.manager)
        self.count = 0

    async def prepare(self, resident: Resident, client: EngineClient) -> GenerationRequest:
        self.count += 1
        return GenerationRequest(f"q{self.count}", prompt="x")

    def start(self, model: str | None = None, keep: bool = True) -> Run:
        return self.runs.start(self.prepare, model, warnings=["mind the gap"], keep=keep)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.manager.load("a")
    yield rig
    rig.host.gate.set()
    await rig.runs.close()
    await rig.manager.close()
    assert rig.runs.running() == []


async def read(run: Run, start: int = 0) -> str:
    text = ""
    async for item in run.follow(start, coalesce_s=0):
        if isinstance(item, Delta):
            text += item.text
            assert item.offset_end == start + len(text)
    return text


async def test_text_receipt_and_end(rig: Rig) -> None:
    run = rig.start()
    assert await read(run) == WHOLE == run.text
    assert (run.state, run.finish_reason, run.error) == ("done", "stop", None)
    assert run.receipt is not None
    assert run.receipt["model"] == "a" and run.receipt["loader"] == "fake" and run.receipt["seed"] == 7
    assert run.receipt["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "cached_tokens": 0}
    assert run.receipt["warnings"] == ["mind the gap"]
    assert run.receipt["ttft_ms"] >= 0 and run.receipt["total_ms"] >= run.receipt["ttft_ms"]


@pytest.mark.parametrize("start", range(len(WHOLE) + 1))
async def test_every_offset_can_be_followed_during_and_after(rig: Rig, start: int) -> None:
    rig.host.gate.clear()
    run = rig.start()
    during = asyncio.create_task(read(run, 0))
    await settle()
    rig.host.gate.set()
    assert await during == WHOLE
    assert await read(run, start) == WHOLE[start:]
    assert await read(run, 10_000) == ""


async def test_a_viewer_that_leaves_changes_nothing(rig: Rig) -> None:
    rig.host.gate.clear()
    run = rig.start()
    viewer = asyncio.create_task(read(run))
    await settle()
    viewer.cancel()
    rig.host.gate.set()
    await run.wait()
    assert run.text == WHOLE
    assert run._waiters == []


async def test_coalescing_keeps_every_character(rig: Rig) -> None:
    rig.host.tokens = 50
    run = rig.start()
    pieces = [item.text async for item in run.follow(coalesce_s=0.01) if isinstance(item, Delta)]
    assert "".join(pieces) == run.text
    assert len(pieces) < 50


async def test_status_comes_before_text_and_end_last(rig: Rig) -> None:
    rig.host.gate.clear()
    first, second = rig.start(), rig.start()
    await settle()
    seen: list[object] = []

    async def watch() -> None:
        async for item in second.follow():
            seen.append(item)

    watcher = asyncio.create_task(watch())
    await settle()
    rig.host.gate.set()
    await watcher
    await first.wait()
    assert isinstance(seen[0], Status) and (seen[0].state, seen[0].position) == ("queued", 1)
    assert isinstance(seen[-1], End)
    states = [item.state for item in seen if isinstance(item, Status)]
    assert states[-1] == "done"


async def test_stop_while_queued_and_while_decoding(rig: Rig) -> None:
    rig.host.gate.clear()
    running, queued = rig.start(), rig.start()
    await settle()
    assert rig.runs.stop(queued.id)
    await queued.wait()
    assert (queued.state, queued.finish_reason, queued.text) == ("done", "cancelled", "")
    rig.runs.stop(running.id)
    await settle()
    rig.host.gate.set()
    await running.wait()
    assert (running.state, running.finish_reason) == ("done", "cancelled")
    assert rig.manager.residents()[0].active_requests == 0
    assert not rig.runs.stop(running.id)
    assert not rig.runs.stop("no such run")


async def test_a_crash_keeps_the_text_and_says_why(rig: Rig) -> None:
    rig.host.gate.clear()
    crashed = rig.start()
    await settle()
    rig.host.clients[0].die()
    rig.host.gate.set()
    await crashed.wait()
    assert crashed.state == "failed"
    assert isinstance(crashed.error, EngineDead)
    assert crashed.receipt is not None and crashed.receipt["finish_reason"] == "error"
    after = rig.start()
    await after.wait()
    assert after.text == WHOLE


async def test_errors_of_prepare_and_of_the_queue(rig: Rig) -> None:
    async def refuse(resident: Resident, client: EngineClient) -> GenerationRequest:
        raise ContextLengthExceeded("too long")

    run = rig.runs.start(refuse)
    await run.wait()
    assert isinstance(run.error, ContextLengthExceeded) and run.state == "failed"
    await rig.manager.unload()
    run = rig.start()
    await run.wait()
    assert isinstance(run.error, NoModelLoaded)


async def test_a_switch_that_cancels_marks_the_run(rig: Rig) -> None:
    rig.host.gate.clear()
    run = rig.start()
    await settle()
    loading = asyncio.create_task(rig.manager.load("b", when_busy="cancel"))
    await settle()
    rig.host.gate.set()
    await loading
    await run.wait()
    assert (run.finish_reason, run.cancelled_by) == ("cancelled", "switch")


async def test_forgetting(rig: Rig) -> None:
    kept, forgotten = rig.start(), rig.start(keep=False)
    await kept.wait()
    await forgotten.wait()
    await settle()
    assert rig.runs.get(kept.id) is kept
    assert rig.runs.get(forgotten.id) is None
    short = Runs(rig.manager, keep_s=0.01)
    run = short.start(rig.prepare)
    await run.wait()
    await asyncio.sleep(0.05)
    assert short.get(run.id) is None


async def test_close_keeps_partial_text(rig: Rig) -> None:
    rig.host.gate.clear()
    run = rig.start()
    await settle()
    closing = asyncio.create_task(rig.runs.close())
    await settle()
    rig.host.gate.set()
    await closing
    assert run.done and run.finish_reason == "cancelled"

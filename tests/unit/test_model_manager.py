"""The manager's promises: one load for many askers, fair queues, safe switches, restarts, and never the wrong model (C17)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modules.errors import Conflict, CorruptModel, EngineDead, LoadError, LoadOutOfMemory, ModelNotFound, NoModelLoaded
from modules.events import EventBus
from modules.model_manager import ModelManager
from modules.schema import GenerationRequest

from .fake_engine import SPEC, Environment, FakeHost, FakeLibrary, settle, until


class Rig:
    def __init__(self, **options: Any) -> None:
        self.host = FakeHost()
        self.library = FakeLibrary("a", "b", "c", size=options.pop("size", 0))
        self.events = EventBus()
        self.manager = ModelManager(
            self.library, {"fake": SPEC}, Environment(), self.events, self.host.start, **{"available": lambda: 1 << 40, **options}
        )

    async def ask(self, model: str | None, request_id: str = "q") -> str:
        """One generation's text."""
        async with self.manager.lease(model) as lease:
            parts = [e async for e in lease.client.generate(GenerationRequest(request_id, prompt="x"))]
            return "".join(getattr(e, "text", "") for e in parts)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.host.gate.set()
    rig.host.load_gate.set()
    await rig.manager.close()
    assert rig.host.alive == []


async def test_load_fills_the_card_and_unload_ends_the_worker(rig: Rig) -> None:
    resident = await rig.manager.load("a")
    assert (resident.state, resident.model.id, resident.loader) == ("ready", "a", "fake")
    assert resident.info is not None and resident.memory_before and resident.memory_after
    assert rig.manager.active() == resident
    assert rig.manager.state() == "ready"
    freed = await rig.manager.unload()
    assert set(freed) == {"memory_before", "memory_after"}
    assert (rig.manager.residents(), rig.manager.state(), rig.host.alive) == ([], "empty", [])


async def test_two_loads_of_the_same_model_are_one(rig: Rig) -> None:
    first, second = await asyncio.gather(rig.manager.load("a"), rig.manager.load("a"))
    assert first.id == second.id
    assert rig.host.loads == ["/models/a"]


async def test_unknown_model_and_unknown_option(rig: Rig) -> None:
    with pytest.raises(ModelNotFound):
        await rig.manager.load("nope")
    with pytest.raises(Exception, match="no load option 'zap'"):
        await rig.manager.load("a", options={"zap": 1})
    assert rig.manager.residents() == []


@pytest.mark.parametrize("by", ["check", "load"])
async def test_a_refused_model_leaves_the_old_one_serving(rig: Rig, by: str) -> None:
    await rig.manager.load("a")
    if by == "check":
        rig.library.refuse["b"] = CorruptModel("incomplete: 10 of 20 bytes")
    else:
        rig.host.fail_load.add("/models/b")
    with pytest.raises(CorruptModel if by == "check" else LoadError):
        await rig.manager.load("b")
    states = {r.model.id: r.state for r in rig.manager.residents()}
    assert states == {"a": "ready", "b": "failed"}
    assert await rig.ask(None) == "a0 a1 a2 "
    assert rig.host.alive == ["a"]
    del rig.library.models["c"]
    rig.library.refuse.clear()
    rig.host.fail_load.clear()
    await rig.manager.load("b")  # the failed card makes way for the new attempt
    assert {r.model.id: r.state for r in rig.manager.residents() if r.state == "failed"} == {}


async def test_switch_lets_the_running_answer_finish_and_the_queue_wait_for_the_new_model(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.gate.clear()
    running = asyncio.create_task(rig.ask(None, "running"))
    await settle()
    queued = asyncio.create_task(rig.ask(None, "queued"))
    await settle()
    await rig.manager.load("b")
    assert {r.model.id: r.state for r in rig.manager.residents()} == {"a": "unloading", "b": "ready"}
    rig.host.gate.set()
    assert await running == "a0 a1 a2 "
    assert await queued == "b0 b1 b2 "
    await settle()
    assert rig.host.alive == ["b"]


async def test_switch_with_cancel_calls_the_leases_back(rig: Rig) -> None:
    await rig.manager.load("a")
    cancelled = asyncio.Event()

    async def hold() -> None:
        async with rig.manager.lease(None) as lease:
            lease.on_cancel = cancelled.set
            await cancelled.wait()

    holder = asyncio.create_task(hold())
    await settle()
    await rig.manager.load("b", when_busy="cancel")
    await holder
    await settle()
    assert rig.host.alive == ["b"]


async def test_load_beside_keeps_both(rig: Rig) -> None:
    await rig.manager.load("a")
    await rig.manager.load("b", when_busy="beside")
    assert sorted(rig.host.alive) == ["a", "b"]
    assert (await rig.ask("a"), await rig.ask(None)) == ("a0 a1 a2 ", "b0 b1 b2 ")


async def test_one_slot_is_fifo_and_positions_are_told(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.gate.clear()
    told: dict[str, list[int]] = {"r0": [], "r1": [], "r2": []}

    async def ask(name: str) -> None:
        async with rig.manager.lease(None, lambda position, _: told[name].append(position)) as lease:
            async for _ in lease.client.generate(GenerationRequest(name, prompt="x")):
                await settle()

    tasks = []
    for name in told:
        tasks.append(asyncio.create_task(ask(name)))
        await settle()
    rig.host.gate.set()
    await asyncio.gather(*tasks)
    assert rig.host.order == ["r0", "r1", "r2"]
    assert told["r0"] == []
    assert set(told["r1"]) == {1}
    assert list(dict.fromkeys(told["r2"])) == [2, 1]


async def test_leaving_the_queue_frees_the_place(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.gate.clear()
    tasks = [asyncio.create_task(rig.ask(None, f"r{n}")) for n in range(3)]
    await settle()
    tasks[1].cancel()
    tasks[0].cancel()
    await settle()
    rig.host.gate.set()
    assert await tasks[2] == "a0 a1 a2 "
    assert rig.manager.residents()[0].active_requests == 0
    assert rig.manager.residents()[0].queued == 0


async def test_a_grant_that_meets_a_cancel_is_given_back(rig: Rig) -> None:
    await rig.manager.load("a")
    async with rig.manager.lease(None):
        waiter = asyncio.create_task(rig.ask(None))
        await settle()
    waiter.cancel()  # the lease was granted in this very turn
    await settle()
    assert await asyncio.wait_for(rig.ask(None), 5) == "a0 a1 a2 "


async def test_three_clients_three_models_each_gets_its_own(rig: Rig) -> None:
    answers = await asyncio.gather(*(rig.ask(name, f"{name}{n}") for n in range(4) for name in "abc"))
    assert answers == [f"{name}0 {name}1 {name}2 " for _ in range(4) for name in "abc"]
    assert sorted(rig.host.loads) == ["/models/a", "/models/b", "/models/c"]


async def test_short_memory_evicts_the_least_recently_used_and_no_answer_is_wrong() -> None:
    rig = Rig(size=100 << 20)
    rig.manager.room.available = lambda: (900 << 20) - 420 * (1 << 20) * len(rig.host.alive)  # room for two
    try:
        answers = await asyncio.gather(*(rig.ask(name, f"{name}{n}") for n in range(3) for name in "abc"))
        assert answers == [f"{name}0 {name}1 {name}2 " for _ in range(3) for name in "abc"]
        assert len(rig.host.alive) <= 2
        assert len(rig.host.loads) >= 3
    finally:
        await rig.manager.close()


async def test_the_chats_model_comes_back_after_it_made_room() -> None:
    rig = Rig(size=100 << 20)
    await rig.manager.load("a")
    rig.manager.room.available = lambda: (900 << 20) - 800 * (1 << 20) * len(rig.host.alive)  # room for one
    try:
        assert await rig.ask("b") == "b0 b1 b2 "
        assert rig.host.alive == ["b"]
        assert await rig.ask(None) == "a0 a1 a2 "
    finally:
        await rig.manager.close()


async def test_policy_off_loads_nothing(rig: Rig) -> None:
    rig.manager.switch_policy = "off"
    with pytest.raises(ModelNotFound, match="not loaded"):
        await rig.ask("a")
    assert rig.host.loads == []


async def test_policy_ask_waits_for_the_operator(rig: Rig) -> None:
    rig.manager.switch_policy = "ask"
    with rig.events.subscribe() as events:
        refused = asyncio.create_task(rig.ask("a"))
        event = await anext(events)
        assert (event.kind, event.data["asked"]) == ("models", [{"model": "a", "waiting": 1}])
        rig.manager.approvals.answer("a", False)
        with pytest.raises(Conflict, match="refused"):
            await refused
        assert rig.host.loads == []
    allowed = [asyncio.create_task(rig.ask("a", f"q{number}")) for number in range(2)]
    await settle()
    assert rig.host.loads == []
    rig.manager.approvals.answer("a", True)
    assert await asyncio.gather(*allowed) == ["a0 a1 a2 "] * 2
    assert rig.host.loads == ["/models/a"]


async def test_no_model(rig: Rig) -> None:
    with pytest.raises(NoModelLoaded):
        await rig.ask(None)


async def test_requests_wait_while_the_model_loads(rig: Rig) -> None:
    rig.host.load_gate.clear()
    await rig.manager.begin_load("a")
    waiting = asyncio.create_task(rig.ask(None))
    await settle()
    assert rig.manager.state() == "loading"
    rig.host.load_gate.set()
    assert await waiting == "a0 a1 a2 "


async def test_unload_during_load_cancels_it(rig: Rig) -> None:
    rig.host.load_gate.clear()
    loading = asyncio.create_task(rig.manager.load("a"))
    asking = asyncio.create_task(rig.ask("a"))
    await settle()
    await rig.manager.unload()
    with pytest.raises(Conflict, match="cancelled"):
        await loading
    with pytest.raises(Conflict, match="cancelled"):
        await asking
    assert (rig.manager.residents(), rig.host.alive) == ([], [])


async def test_load_during_load_ends_with_the_last_one(rig: Rig) -> None:
    rig.host.load_gate.clear()
    first = asyncio.create_task(rig.manager.load("a"))
    await settle()
    second = asyncio.create_task(rig.manager.load("b"))
    await settle()
    rig.host.load_gate.set()
    with pytest.raises(Conflict, match="cancelled"):  # nobody waits minutes for a model that is not wanted any more
        await first
    await second
    await settle()
    active = rig.manager.active()
    assert active is not None and active.model.id == "b"
    assert rig.host.alive == ["b"]


async def test_back_to_the_old_model_while_the_new_one_loads(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.load_gate.clear()
    second = asyncio.create_task(rig.manager.load("b"))
    await settle()
    await rig.manager.load("a")
    rig.host.load_gate.set()
    with pytest.raises(Conflict):
        await second
    await settle()
    assert rig.host.alive == ["a"]
    assert await rig.ask(None) == "a0 a1 a2 "


async def test_a_failed_switch_answers_those_who_waited_with_the_old_model(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.load_gate.clear()
    rig.host.fail_load.add("/models/b")
    await rig.manager.begin_load("b")
    waiting = asyncio.create_task(rig.ask(None))
    await settle()
    rig.host.load_gate.set()
    assert await waiting == "a0 a1 a2 "


async def test_requests_wait_for_the_first_model_of_a_start(rig: Rig) -> None:
    settle_first = rig.manager.expect_first()
    waiting = asyncio.create_task(rig.ask(None))
    await settle()
    assert rig.manager.state() == "loading"
    await rig.manager.begin_load("a")
    settle_first()
    assert await waiting == "a0 a1 a2 "
    settle_first = rig.manager.expect_first()
    await rig.manager.unload()
    nothing = asyncio.create_task(rig.ask(None))
    await settle()
    settle_first()
    with pytest.raises(NoModelLoaded):
        await nothing


async def test_a_model_keeps_its_usual_backend(rig: Rig) -> None:
    usual: dict[str, str] = {"a": "fake", "b": "one that is gone"}
    rig.manager._model_loader = usual.get
    assert (await rig.manager.load("a")).loader == "fake"
    assert (await rig.manager.load("b")).loader == "fake"


async def test_a_crashed_worker_is_restarted_unasked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.model_manager.RESTART_DELAY_S", 0.01)
    await rig.manager.load("a")
    for loads in range(1, 5):
        await until(lambda: rig.manager.state() == "ready")
        assert len(rig.host.clients) == loads
        rig.host.clients[-1].die()
    await asyncio.sleep(0.1)
    assert len(rig.host.clients) == 4, "one load and three restarts"
    assert rig.manager.state() == "failed"


async def test_out_of_memory_makes_room_once_and_the_old_model_comes_back(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.no_memory.add("/models/b")
    with pytest.raises(LoadOutOfMemory):
        await rig.manager.load("b")
    assert rig.host.loads.count("/models/b") == 2
    assert await rig.ask(None) == "a0 a1 a2 "
    assert {r.model.id: r.state for r in rig.manager.residents()} == {"a": "ready", "b": "failed"}


async def test_a_request_waiting_for_an_unloaded_model_is_told(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.gate.clear()
    running = asyncio.create_task(rig.ask(None, "running"))
    await settle()
    waiting = asyncio.create_task(rig.ask(None, "waiting"))
    await settle()
    unloading = asyncio.create_task(rig.manager.unload())
    with pytest.raises(NoModelLoaded, match="while this request waited"):
        await waiting
    rig.host.gate.set()
    assert await running == "a0 a1 a2 "
    await unloading


async def test_a_dead_worker_is_a_card_and_the_next_request_reloads(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.host.gate.clear()
    running = asyncio.create_task(rig.ask(None, "running"))
    await settle()
    waiting = asyncio.create_task(rig.ask("a", "waiting"))
    await settle()
    rig.host.clients[0].die()
    card = rig.manager.residents()[0]
    assert card.state == "failed"
    assert card.error is not None and card.error["code"] == "worker_crashed" and card.error["detail"]["stderr"] == "boom"
    rig.host.gate.set()
    with pytest.raises(EngineDead):
        await running
    assert await waiting == "a0 a1 a2 "
    assert rig.host.loads == ["/models/a"] * 2
    active = rig.manager.active()
    assert active is not None and active.state == "ready" and active.error is None


async def test_at_most_three_restarts_in_a_minute(rig: Rig) -> None:
    await rig.manager.load("a")
    for _ in range(3):
        rig.host.clients[-1].die()
        assert await rig.ask(None) == "a0 a1 a2 "
    rig.host.clients[-1].die()
    with pytest.raises(EngineDead, match="4 times in a minute"):
        await rig.ask(None)
    assert rig.manager.state() == "failed"
    await rig.manager.load("a")  # the user's own attempt is not counted
    assert await rig.ask(None) == "a0 a1 a2 "


async def test_idle_unload_and_recall(rig: Rig) -> None:
    await rig.manager.load("a")
    rig.manager.idle.timeout_s = 60
    rig.manager.idle.sweep(time.time() + 59)
    assert rig.manager.state() == "ready"
    rig.manager.idle.sweep(time.time() + 61)
    await settle()
    assert (rig.host.alive, rig.manager.state()) == ([], "empty")
    assert await rig.ask(None) == "a0 a1 a2 "


async def test_close_in_the_middle_of_everything() -> None:
    rig = Rig()
    await rig.manager.load("a")
    rig.host.gate.clear()
    asking = asyncio.create_task(rig.ask("a"))
    await settle()
    rig.host.load_gate.clear()
    loading = asyncio.create_task(rig.manager.load("b"))
    await settle()
    await asyncio.wait_for(rig.manager.close(), 5)
    assert rig.host.alive == []
    asking.cancel()
    results = await asyncio.gather(asking, loading, return_exceptions=True)
    assert all(isinstance(r, BaseException) for r in results)


async def test_pages_are_told(rig: Rig) -> None:
    with rig.events.subscribe() as events:
        await rig.manager.load("a")
        await asyncio.sleep(0.15)
    kinds = [(e.kind, e.data["state"]) async for e in events]
    assert kinds[-1] == ("models", "ready")

"""The event bus: order, bounds, replacement, threads."""

from __future__ import annotations

import asyncio
import threading

from modules.events import BusEvent, EventBus


def test_order_and_close() -> None:
    async def go() -> list[BusEvent]:
        bus = EventBus()
        subscription = bus.subscribe()
        bus.publish("a", {"n": 1})
        bus.publish("b")
        subscription.close()
        assert bus.subscribers == 0
        bus.publish("late")
        return [event async for event in subscription]

    assert asyncio.run(go()) == [BusEvent("a", {"n": 1}), BusEvent("b", {})]


def test_slow_subscriber_gets_resync_and_the_fast_one_everything() -> None:
    async def go() -> tuple[list[str], list[int]]:
        bus = EventBus(limit=4)
        slow, fast = bus.subscribe(), bus.subscribe()
        seen: list[int] = []
        for n in range(10):
            bus.publish("tick", {"n": n})
            seen.append((await anext(fast)).data["n"])
        slow.close()
        return [event.kind async for event in slow], seen

    kinds, seen = asyncio.run(go())
    assert seen == list(range(10))
    assert "resync" in kinds
    assert len(kinds) <= 4


def test_key_replaces_the_undelivered_event() -> None:
    async def go() -> list[BusEvent]:
        bus = EventBus()
        with bus.subscribe() as subscription:
            bus.publish("models", {"fraction": 0.1}, key="m")
            bus.publish("notice", {"text": "x"})
            bus.publish("models", {"fraction": 0.2}, key="m")
        return [event async for event in subscription]

    assert asyncio.run(go()) == [BusEvent("notice", {"text": "x"}), BusEvent("models", {"fraction": 0.2})]


def test_publish_from_a_thread_wakes_the_waiter() -> None:
    async def go() -> BusEvent:
        bus = EventBus()
        subscription = bus.subscribe()
        thread = threading.Timer(0.01, bus.publish, ("install", {"line": "ok"}))
        thread.start()
        try:
            return await asyncio.wait_for(anext(subscription), 5)
        finally:
            thread.join()

    assert asyncio.run(go()) == BusEvent("install", {"line": "ok"})

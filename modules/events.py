"""One bus for what every open page wants to know: models, conversations, installs, notices.

Nothing here may slow the publisher down: `publish` never waits, a subscriber that falls behind loses its backlog and gets one
`resync` event, after which it should ask for the whole state again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

MAX_PENDING = 256
_revisions = itertools.count(time.time_ns() // 1000)  # microseconds: it grows over a restart too, and JavaScript holds it exactly


def revision() -> int:
    """A number for each picture of something, which grows: replies and events overtake each other on their way to a page."""
    return next(_revisions)


@dataclass(frozen=True, slots=True)
class BusEvent:
    """`kind` is the SSE event name, `data` a JSON-safe dict."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


class Subscription:
    """An async iterator of BusEvent. Close it (or use `with`) when the viewer leaves."""

    def __init__(self, bus: EventBus, limit: int) -> None:
        self._bus = bus
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._pending: OrderedDict[object, BusEvent] = OrderedDict()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> BusEvent:
        while not self._pending:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._pending.popitem(last=False)[1]

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the iteration; what is pending is still delivered."""
        self._closed = True
        self._bus._discard(self)
        self._wake()

    def _put(self, event: BusEvent, key: object) -> None:
        # A newer event of the same key replaces the one still waiting, and goes to the end: order stays true.
        self._pending.pop(key, None)
        if len(self._pending) >= self._limit:
            self._pending.clear()
            event, key = BusEvent("resync"), object()
        self._pending[key] = event
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventBus:
    """Publish from the event loop or from any thread; subscribe from an event loop."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self._limit = limit
        self._subscribers: set[Subscription] = set()

    def subscribe(self) -> Subscription:
        """A new subscription, which sees what is published from now on."""
        subscription = Subscription(self, self._limit)
        self._subscribers.add(subscription)
        return subscription

    def publish(self, kind: str, data: dict[str, Any] | None = None, *, key: str | None = None) -> None:
        """Hand the event to every subscriber. With `key`, it replaces an undelivered event of the same kind and key."""
        event = BusEvent(kind, data or {})
        token: object = (kind, key) if key is not None else object()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        for subscription in list(self._subscribers):
            if subscription._loop is running:
                subscription._put(event, token)
            elif not subscription._loop.is_closed():
                subscription._loop.call_soon_threadsafe(subscription._put, event, token)

    def close(self) -> None:
        """End every subscription (shutdown)."""
        for subscription in list(self._subscribers):
            subscription.close()

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def _discard(self, subscription: Subscription) -> None:
        self._subscribers.discard(subscription)

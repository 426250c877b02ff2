"""Server-sent events without a per-token task: one write per piece, one listener per connection.

`EventStream` is an ASGI response. Its producer writes bytes; when the client leaves, `on_disconnect` is called and further
writes go nowhere, so the producer ends by its own logic. A client that stops reading only holds up its own producer, and is
dropped after STALL_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger(__name__)

STALL_S = 60.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


class Writer:
    """What a producer writes with. `await writer(data)` waits only while the socket's buffer is full."""

    __slots__ = ("_loop", "_send", "gone", "waiting_since")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self.gone = False
        self.waiting_since: float | None = None

    async def __call__(self, data: bytes) -> None:
        if self.gone:
            return
        self.waiting_since = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.waiting_since = None


Producer = Callable[[Writer], Awaitable[None]]


class EventStream:
    """An ASGI response that streams what `produce` writes."""

    def __init__(
        self,
        produce: Producer,
        *,
        on_disconnect: Callable[[], None] | None = None,
        headers: list[tuple[bytes, bytes]] | None = None,
        stall_s: float = STALL_S,
        content_type: str = "",
    ) -> None:
        self._produce = produce
        self._on_disconnect = on_disconnect
        self._headers = [*HEADERS, *(headers or [])]
        if content_type:  # newline-delimited JSON and the like
            self._headers[0] = (b"content-type", content_type.encode("ascii"))
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        writer = Writer(send)
        producer = asyncio.ensure_future(self._produce(writer))
        listener = asyncio.create_task(self._listen(receive, writer, producer))
        try:
            await producer
        except asyncio.CancelledError:
            if not writer.gone:
                raise
            return  # a client that read nothing for too long: leaving without an end closes the connection
        finally:
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener
            if not producer.done():
                producer.cancel()
        if not writer.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _listen(self, receive: Receive, writer: Writer, producer: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Message] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(receive())
                done, _ = await asyncio.wait([waiting], timeout=self._stall_s / 4)
                stalled = writer.waiting_since is not None and loop.time() - writer.waiting_since > self._stall_s
                if (done and waiting.result()["type"] == "http.disconnect") or stalled:
                    writer.gone = True
                    if self._on_disconnect is not None:
                        self._on_disconnect()
                    if stalled:
                        log.warning("dropped a client that read nothing for %.0f s", self._stall_s)
                        producer.cancel()
                    return
                if done:
                    waiting = None
        finally:
            if waiting is not None and not waiting.done():
                waiting.cancel()


def event(data: str, name: str | None = None, event_id: str | int | None = None) -> bytes:
    """One server-sent event. `data` must be one line (JSON is)."""
    head = (f"id: {event_id}\n" if event_id is not None else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {data}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that clients skip: keep-alive, queue position."""
    return f": {text}\n\n".encode()


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return

"""The event stream: ends with its producer, tells it when the client leaves, drops one that reads nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from modules.api.sse import EventStream, Writer, comment, event


class Connection:
    """An ASGI server of one connection. `leave` disconnects; a `stuck` one never takes another byte."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.stuck = False

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.stuck and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def run(self, stream: EventStream) -> None:
        await asyncio.wait_for(stream({"type": "http"}, self.receive, self.send), 10)


async def test_what_is_written_arrives_and_the_stream_ends() -> None:
    async def produce(write: Writer) -> None:
        await write(event('{"a":1}', "status", 5))
        await write(comment("still here"))

    connection = Connection()
    await connection.run(EventStream(produce))
    assert connection.body == b'id: 5\nevent: status\ndata: {"a":1}\n\n: still here\n\n'
    assert connection.sent[0]["status"] == 200
    assert connection.sent[-1]["more_body"] is False


async def test_a_client_that_leaves() -> None:
    connection = Connection()
    stopped = asyncio.Event()

    async def produce(write: Writer) -> None:
        await write(b"data: 1\n\n")
        connection.left.set()
        await stopped.wait()
        await write(b"data: 2\n\n")

    await connection.run(EventStream(produce, on_disconnect=stopped.set))
    assert connection.body == b"data: 1\n\n"


async def test_a_client_that_reads_nothing_is_dropped() -> None:
    connection = Connection()
    connection.stuck = True
    told = asyncio.Event()

    async def produce(write: Writer) -> None:
        await write(b"data: 1\n\n")

    await connection.run(EventStream(produce, on_disconnect=told.set, stall_s=0.05))
    assert told.is_set()
    assert connection.sent[-1]["type"] == "http.response.start"  # no end: the server closes the connection


async def test_a_producer_that_fails_is_heard() -> None:
    async def produce(write: Writer) -> None:
        raise ValueError("broken")

    connection = Connection()
    try:
        await connection.run(EventStream(produce))
    except ValueError as error:
        assert str(error) == "broken"
    else:
        raise AssertionError("the failure was swallowed")

"""The server's socket."""

from __future__ import annotations

import asyncio
import socket

import pytest

from modules.app import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_no_stream_waits_for_the_other_sides_acknowledgement(host: str) -> None:
    """With Nagle's algorithm on, the first token of a kept connection comes 40 ms late."""
    try:
        listener = bind(host, 0)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accept, sock=listener) as server:
        _, writer = await asyncio.open_connection(host, server.sockets[0].getsockname()[1])
        assert await seen != 0
        writer.close()
        await writer.wait_closed()

"""The page's event streams: one of everything that changes, and one per answer that is being written.

Any number of viewers, any time: a viewer that leaves changes nothing, and one that comes back goes on at its last offset.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api import sse
from modules.errors import NotFound
from modules.generation import Delta, End

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from modules.api.sse import EventStream, Writer
    from modules.chat.service import Writing
    from modules.services import Services

RETRY = b"retry: 300\n\n"
KEEP_ALIVE_S = 15.0
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def build_router(services: Services) -> APIRouter:
    """`/ui-api/events` and `/ui-api/runs`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)
    chat = services.chat

    @router.post("/runs/{run}/stop")
    async def stop(run: str) -> JSONResponse:
        chat.stop(run)
        return JSONResponse({})

    @router.get("/runs/{run}/stream")
    async def stream(run: str, request: Request) -> Response:
        """The answer's text from character `start`, or from the Last-Event-ID of a viewer that comes back."""
        writing = chat.writing(run)
        given = request.headers.get("last-event-id") or request.query_params.get("start") or ""
        start = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
        return _cancelled_when_gone(lambda write: _follow(services, writing, start, write))

    @router.get("/events")
    async def events() -> Response:
        return _cancelled_when_gone(lambda write: _everything(services, write))

    return router


class _Stream(Response):
    """Lets FastAPI return an ASGI response that is no starlette Response."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stream(scope, receive, send)


def _cancelled_when_gone(produce: sse.Producer) -> _Stream:
    """These producers wait for news, so a viewer that leaves must wake them."""
    task: list[asyncio.Task[Any] | None] = [None]

    async def run(write: Writer) -> None:
        task[0] = asyncio.current_task()
        await produce(write)

    def leave() -> None:
        if task[0] is not None:
            task[0].cancel()

    return _Stream(sse.EventStream(run, on_disconnect=leave))


async def _follow(services: Services, writing: Writing, start: int, write: Writer) -> None:
    """Offsets are those of the answer's whole text, which a continued answer had some of before the run."""
    before = len(writing.prefix)
    await write(RETRY)
    if start < before:
        await write(sse.event(dumps(writing.prefix[start:]), event_id=before))
    async for item in writing.run.follow(max(0, start - before)):
        if isinstance(item, Delta):
            await write(sse.event(dumps(item.text), event_id=before + item.offset_end))
        elif isinstance(item, End):
            break
        else:
            prefill = {"done": item.prefill[0], "total": item.prefill[1]} if item.prefill else None
            status = {"state": item.state, "position": item.position, "estimate_s": item.estimate_s, "prefill": prefill}
            await write(sse.event(dumps(status), "status"))
    try:
        node = await services.chat.final_node(writing)
    except NotFound:  # deleted while it was written: the viewer reads the conversation again
        return
    await write(sse.event(dumps(node), "failed" if node["status"] == "failed" else "done"))


async def _everything(services: Services, write: Writer) -> None:
    with services.events.subscribe() as subscription:
        await write(RETRY)
        for notice in services.chat.notices():
            await write(sse.event(dumps({"level": notice.level, "text": notice.text}), "notice"))
        for job in services.installs.jobs():
            if job["state"] in ("queued", "running"):
                await write(sse.event(dumps(job), "install"))
        while True:
            try:
                event = await asyncio.wait_for(anext(subscription), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                await write(sse.comment("here"))  # tells proxies, and a dead connection, that somebody is
            except StopAsyncIteration:
                return
            else:
                await write(sse.event(dumps(event.data), event.kind))

"""The page's routes for conversations and messages. Every answer to a change is the conversation as it is now."""

from __future__ import annotations

import asyncio
import re
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, StreamingResponse

from modules.api.body import read_object
from modules.api.ui_body import Body
from modules.chat import transcript, transfer
from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from modules.chat.attachments import Attachments
    from modules.chat.service import ChatService

MAX_ID = 200
MAX_QUERY = 1000
CHUNK = 1 << 20


def build_router(chat: ChatService, attachments: Attachments) -> APIRouter:
    """`/ui-api/conversations`, `/ui-api/messages`, `/ui-api/undo`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)

    @router.get("/conversations")
    async def list_conversations(query: str = "", trashed: bool = False) -> JSONResponse:
        return JSONResponse({"conversations": await chat.conversations(transfer.clean_text(query[:MAX_QUERY], "query"), trashed)})

    @router.post("/conversations")
    async def create(request: Request) -> JSONResponse:
        body = await Body.of(request)
        title, prompt = body.optional_text("title"), body.optional_text("system_prompt")
        body.end()
        cleaned = None if prompt is None else transfer.clean_text(prompt, "system_prompt")
        return JSONResponse(await chat.create(transfer.clean_title(title or ""), cleaned))

    @router.post("/conversations/import")
    async def import_(request: Request) -> JSONResponse:
        # A file may be large: the rest of the server goes on meanwhile.
        data = await read_object(request)
        found = await asyncio.to_thread(transfer.from_json, data)
        report = [*found.report, *await attachments.take_in(found.images, transfer.shown_images(found.conversation))]
        return JSONResponse({**await chat.add_conversation(found.conversation), "report": report})

    @router.get("/conversations/{conversation}")
    async def snapshot(conversation: str) -> JSONResponse:
        return JSONResponse(await chat.snapshot(conversation))

    @router.patch("/conversations/{conversation}")
    async def update(conversation: str, request: Request) -> JSONResponse:
        body = await Body.of(request)
        changes: dict[str, Any] = {}
        if body.has("title"):
            changes["title"] = transfer.clean_title(body.text("title"))
        if body.has("system_prompt"):
            changes["system_prompt"] = transfer.clean_text(body.text("system_prompt"), "system_prompt")
        for name in ("pinned", "trashed"):
            if body.has(name):
                changes[name] = body.flag(name)
        if body.has("leaf"):
            changes["leaf"] = body.text("leaf", limit=MAX_ID)
        revision = body.optional_int("revision")
        body.end()
        return JSONResponse(await chat.update(conversation, changes, revision))

    @router.delete("/conversations/{conversation}")
    async def purge(conversation: str) -> JSONResponse:
        await chat.purge(conversation)
        return JSONResponse({})

    @router.get("/conversations/{conversation}/export")
    async def export(conversation: str, format: str = "json") -> StreamingResponse:
        """The chat with its images: our own JSON, which can be imported, or Markdown, in a zip where there are images."""
        if format not in ("json", "markdown"):
            raise InvalidParameter("A chat is exported as json or as markdown.", param="format")
        found = await chat.export(conversation)
        if format == "json":
            return _download(found.title, "json", transfer.json_pieces(found, attachments))
        file, kind = await transcript.to_file(found, attachments)
        return _download(found.title, kind, _chunks(file))

    @router.post("/conversations/{conversation}/messages")
    async def send(conversation: str, request: Request) -> JSONResponse:
        body = await Body.of(request)
        text, client_id = _message(body), _client_id(body)
        parent, revision = body.optional_text("parent", limit=MAX_ID), body.optional_int("revision")
        branch = body.flag("branch")
        body.end()
        return JSONResponse(
            await chat.send(conversation, text, client_id=client_id, parent=parent, revision=revision, branch=branch)
        )

    @router.post("/messages/{message}/regenerate")
    async def regenerate(message: str, request: Request) -> JSONResponse:
        return JSONResponse(await chat.regenerate(message, client_id=await _only_client_id(request)))

    @router.post("/messages/{message}/continue")
    async def continue_(message: str, request: Request) -> JSONResponse:
        return JSONResponse(await chat.continue_(message, client_id=await _only_client_id(request)))

    @router.post("/messages/{message}/stop")
    async def stop(message: str) -> JSONResponse:
        """An answer that another server may be writing; `runs/{run}/stop` is for one's own."""
        await chat.stop_answer(message[:MAX_ID])
        return JSONResponse({})

    @router.post("/messages/{message}/edit")
    async def edit(message: str, request: Request) -> JSONResponse:
        body = await Body.of(request)
        text, client_id, generate = _message(body), _client_id(body), body.flag("generate")
        body.end()
        return JSONResponse(await chat.edit(message, text, client_id=client_id, generate=generate))

    @router.delete("/messages/{message}")
    async def delete(message: str) -> JSONResponse:
        after, token = await chat.delete(message)
        return JSONResponse({"snapshot": after, "undo": token})

    @router.post("/undo/{token}")
    async def undo(token: str) -> JSONResponse:
        return JSONResponse(await chat.undo(token))

    return router


def _message(body: Body) -> str:
    text = transfer.clean_text(body.text("text"))
    if not text.strip():
        raise InvalidParameter("The message is empty.", hint="Write something first.", param="text")
    return text


def _client_id(body: Body) -> str:
    client_id = body.text("client_id", limit=MAX_ID)
    if not client_id.strip():
        raise InvalidParameter("client_id is empty.", param="client_id")
    return transfer.clean_text(client_id, "client_id")


async def _only_client_id(request: Request) -> str:
    body = await Body.of(request)
    client_id = _client_id(body)
    body.end()
    return client_id


_MEDIA = {"json": "application/json", "md": "text/markdown", "zip": "application/zip"}


def _download(title: str, kind: str, content: AsyncIterator[str] | Iterator[bytes]) -> StreamingResponse:
    headers = {"Content-Disposition": _attachment(title, kind), "Cache-Control": "no-store"}
    return StreamingResponse(content, media_type=_MEDIA[kind], headers=headers)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def _attachment(title: str, kind: str) -> str:
    """A file name any system takes, with the real title for those that read RFC 6266's extended form."""
    name = re.sub(r"[^\w\- ]", "", title).strip()[:60] or "chat"
    plain = name.encode("ascii", "ignore").decode().strip() or "chat"
    return f"attachment; filename=\"{plain}.{kind}\"; filename*=UTF-8''{quote(name)}.{kind}"

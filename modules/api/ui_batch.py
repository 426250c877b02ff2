"""The page's routes for batches: upload, start, pause, cancel, results."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse

from modules.api.ui_body import Body
from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from modules.services import Services

MAX_PIECE = 4_000_000


def build_router(services: Services) -> APIRouter:
    """`/ui-api/batches`."""
    router = APIRouter(prefix="/ui-api/batches", include_in_schema=False)
    jobs = services.batches

    @router.get("")
    async def overview() -> JSONResponse:
        return JSONResponse({"batches": jobs.views()})

    @router.post("")
    async def create(request: Request) -> JSONResponse:
        body = await Body.of(request)
        name = body.text("name", limit=1000)
        body.end()
        return JSONResponse((await jobs.create(name)).view())

    @router.get("/{batch_id}")
    async def one(batch_id: str) -> JSONResponse:
        return JSONResponse(jobs.get(batch_id).view())

    @router.post("/{batch_id}/input")
    async def upload(batch_id: str, request: Request) -> JSONResponse:
        """A piece of the file at a byte offset, as text."""
        body = await Body.of(request)
        text, offset = body.text("text", limit=MAX_PIECE), body.optional_int("offset") or 0
        body.end()
        if offset < 0:
            raise InvalidParameter("offset can't be negative.", param="offset")
        return JSONResponse((await jobs.upload(batch_id, offset, text.encode("utf-8", "replace"))).view())

    @router.post("/{batch_id}/start")
    async def start(batch_id: str, request: Request) -> JSONResponse:
        body = await Body.of(request)
        model = body.optional_text("model", limit=512)
        body.end()
        return JSONResponse((await jobs.start(batch_id, model)).view())

    @router.post("/{batch_id}/pause")
    async def pause(batch_id: str) -> JSONResponse:
        return JSONResponse((await jobs.stop(batch_id, "paused")).view())

    @router.post("/{batch_id}/cancel")
    async def cancel(batch_id: str) -> JSONResponse:
        return JSONResponse((await jobs.stop(batch_id, "cancelled")).view())

    @router.get("/{batch_id}/results")
    async def results(batch_id: str) -> FileResponse:
        """The output so far."""
        path = await asyncio.to_thread(jobs.output_path, batch_id)
        name = f"{Path(jobs.get(batch_id).name).stem or 'batch'}-results.jsonl"
        return FileResponse(path, media_type="application/x-ndjson", filename=name)

    @router.delete("/{batch_id}")
    async def delete(batch_id: str) -> JSONResponse:
        await jobs.delete(batch_id)
        return JSONResponse({})

    return router

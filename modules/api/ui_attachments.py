"""The page's routes for the images of its messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.ui_body import Body
from modules.images import MAX_BYTES, MEDIA_TYPES

if TYPE_CHECKING:
    from modules.chat.attachments import Attachments


def build_router(attachments: Attachments) -> APIRouter:
    """`/ui-api/attachments`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)

    @router.post("/attachments")
    async def save(request: Request) -> JSONResponse:
        """An image in base64 -> the name that messages refer to it by."""
        body = await Body.of(request)
        image = body.text("image", limit=MAX_BYTES * 2)
        body.end()
        return JSONResponse({"name": await attachments.save(image)})

    @router.get("/attachments/{name}")
    async def read(name: str) -> Response:
        data = await attachments.read(name)
        media = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=31536000, immutable"})

    return router

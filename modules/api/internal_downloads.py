"""Downloads for programs: /v1/internal/model/download and /downloads, the page's jobs under the names of this API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotations
from starlette.responses import JSONResponse

from modules.api import internal_models as models
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.openai_models import parse

if TYPE_CHECKING:
    from fastapi import APIRouter

    from modules.services import Services


def add_downloads(router: APIRouter, services: Services) -> None:
    """Add the routes to the /v1/internal router."""
    jobs = services.downloads

    @router.post("/model/download", openapi_extra=body_schema(models.DownloadRequest, samplers=False))
    async def download(request: Request) -> JSONResponse:
        """Begin to fetch a model in the background; the same one asked for twice is one. Needs an admin key if there are any."""
        body = parse(models.DownloadRequest, await read_object(request))
        return JSONResponse(await jobs.start(body.repository, body.revision, body.files))

    @router.get("/model/downloads")
    async def downloads() -> JSONResponse:
        """Every download, the newest first: state, bytes, speed, what was skipped and why."""
        return JSONResponse({"downloads": jobs.jobs()})

    @router.get("/model/downloads/{job_id}")
    async def one(job_id: str) -> JSONResponse:
        """One download."""
        return JSONResponse(jobs.job(job_id))

    @router.post("/model/downloads/{job_id}/pause")
    async def pause(job_id: str) -> JSONResponse:
        """Stop and keep what has arrived."""
        return JSONResponse(await jobs.pause(job_id))

    @router.post("/model/downloads/{job_id}/resume")
    async def resume(job_id: str) -> JSONResponse:
        """Go on with a paused, failed or cancelled one."""
        return JSONResponse(jobs.resume(job_id))

    @router.post("/model/downloads/{job_id}/cancel")
    async def cancel(job_id: str) -> JSONResponse:
        """Stop and delete what has arrived."""
        return JSONResponse(await jobs.cancel(job_id))

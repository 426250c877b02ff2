"""The page's routes for quantising: what can be chosen, start, follow, stop, resume."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules.api.ui_body import Body
from modules.errors import AppError, InvalidParameter
from modules.evaluate import texts
from modules.paths import confine
from modules.quantize.process import check_source
from modules.quantize.settings import BITS, ENGINES, GROUP_SIZES, METHODS, complete_settings

if TYPE_CHECKING:
    from modules.services import Services

MAX_NAME = 1000
DEVICES = ("auto", "cpu", "cuda")


def build_router(services: Services) -> APIRouter:
    """`/ui-api/quantizations`."""
    router = APIRouter(prefix="/ui-api/quantizations", include_in_schema=False)
    jobs = services.quantizations
    folders = services.evaluations.around.datasets

    @router.get("")
    async def overview() -> JSONResponse:
        """The list of jobs, the models that can be quantised, and the settings with their defaults."""
        return JSONResponse(
            {
                "jobs": jobs.jobs(),
                "models": await asyncio.to_thread(_sources, services),
                "defaults": complete_settings({}).to_dict(),
                "choices": {"bits": BITS, "group_size": GROUP_SIZES, "method": METHODS, "device": DEVICES, "engine": ENGINES},
                "calibration": [entry["name"] for entry in await asyncio.to_thread(texts.listed, folders) if entry.get("own")],
            }
        )

    @router.post("")
    async def start(request: Request) -> JSONResponse:
        body = await Body.of(request)
        model = body.text("model", limit=MAX_NAME)
        settings = body.optional_object("settings") or {}
        device = body.choice("device", DEVICES, "auto")
        name = body.optional_text("name", limit=200) or ""
        overwrite = body.flag("overwrite")
        body.end()
        calibration = settings.get("calibration", "bundled")
        if calibration != "bundled":
            if not isinstance(calibration, str) or not confine(folders[0], calibration).is_file():
                raise InvalidParameter(
                    "There is no such calibration text.", hint="Add it to the texts first.", param="calibration"
                )
            settings = settings | {"calibration": str(confine(folders[0], calibration).resolve())}
        return JSONResponse({"job": await jobs.start(model, settings, device=device, name=name, overwrite=overwrite)})

    @router.get("/{job_id}")
    async def one(job_id: str) -> JSONResponse:
        return JSONResponse({"job": jobs.job(job_id)})

    @router.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> JSONResponse:
        await jobs.cancel(job_id)
        return JSONResponse({"job": jobs.job(job_id)})

    @router.post("/{job_id}/resume")
    async def resume(job_id: str) -> JSONResponse:
        return JSONResponse({"job": jobs.resume(job_id)})

    @router.delete("/{job_id}")
    async def forget(job_id: str) -> JSONResponse:
        await asyncio.to_thread(jobs.forget, job_id)
        return JSONResponse({})

    return router


def _sources(services: Services) -> list[dict[str, Any]]:
    """Models in 16 or 32 bits, by name."""
    found = []
    for model in services.library.list():
        try:
            check_source(model)
        except AppError:
            continue
        found.append(
            {"id": model.id, "size_bytes": model.size_bytes, "parameters": model.parameters, "architecture": model.architecture}
        )
    return sorted(found, key=lambda entry: str(entry["id"]))

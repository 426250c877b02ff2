"""/health: 503 with the state until a model is ready, then 200. Free of keys, so that a supervisor can ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from modules.services import Services


def build_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["Health"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> JSONResponse:
        """`status` is ok, loading, empty or failed; `ui` says whether the page is there yet."""
        manager = services.manager
        state = manager.state()
        active = manager.active()
        body: dict[str, Any] = {"status": "ok" if state == "ready" else state, "ui": services.ui_state}
        if active is not None:
            body["model"] = active.model.id
        loading = next((r for r in manager.residents() if r.state == "loading"), None)
        if state == "loading" and loading is not None:
            body["model"] = loading.model.id
            if loading.progress is not None:
                body["progress"] = {"stage": loading.progress.stage, "fraction": loading.progress.fraction}
        failed = next((r for r in manager.residents() if r.state == "failed" and r.error), None)
        if state == "failed" and failed is not None and failed.error is not None:
            body["error"] = {"code": failed.error["code"], "message": failed.error["message"]}
        return JSONResponse(body, status_code=200 if state == "ready" else 503)

    return router

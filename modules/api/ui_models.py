"""The page's routes for models and backends: what is there, what can take what and why not, load, unload, install."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.model_view import listed
from modules.api.ui_body import Body
from modules.api.ui_library import can_open
from modules.errors import AppError, InvalidParameter, NotFound
from modules.load_options import confine_paths
from modules.plan.service import answer_plan
from modules.residents import shown

if TYPE_CHECKING:
    from modules.residents import Resident, WhenBusy
    from modules.services import Services

log = logging.getLogger(__name__)

MAX_NAME = 1000
WHEN_BUSY = ("finish", "cancel", "beside")


def build_router(services: Services) -> APIRouter:
    """`/ui-api/models` and `/ui-api/loaders`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)
    manager = services.manager
    savers: set[asyncio.Task[None]] = set()

    @router.get("/models")
    async def models(request: Request) -> Response:
        """Models, backends, what is in memory. Written in a thread, too: with a thousand models it is a megabyte."""
        state = {**manager.snapshot(), "can_open": can_open(request)}
        text = await asyncio.to_thread(lambda: json.dumps({**listed(services), **state}, ensure_ascii=False).encode())
        return Response(text, media_type="application/json")

    @router.post("/models/load")
    async def load(request: Request) -> JSONResponse:
        """Begins the load; how it goes comes as `models` events."""
        body = await Body.of(request)
        model, loader = body.text("model", limit=MAX_NAME), body.optional_text("loader", limit=MAX_NAME)
        options = body.optional_object("options")
        when_busy = cast("WhenBusy", body.choice("when_busy", WHEN_BUSY, "finish"))
        keep_others, anyway = body.flag("keep_others"), body.flag("anyway")
        body.end()
        if loader is not None and loader not in services.specs:
            raise InvalidParameter("There is no such backend.", param="loader")
        options = await asyncio.to_thread(_confined, services, model, loader, options)
        resident = await manager.begin_load(model, loader, options, keep_others=keep_others, when_busy=when_busy, anyway=anyway)
        if loader is not None or options:
            task = asyncio.create_task(_remember(services, resident, options or {}))
            savers.add(task)
            task.add_done_callback(savers.discard)
        return JSONResponse({"resident": shown(resident)})

    @router.get("/models/plan")
    async def plan(model: str) -> JSONResponse:
        """What fits on this machine, as /v1/internal/model/plan says it."""
        return JSONResponse(await answer_plan(services, model))

    @router.post("/models/unload")
    async def unload(request: Request) -> JSONResponse:
        body = await Body.of(request)
        resident = body.optional_text("resident", limit=MAX_NAME)
        when_busy = cast("WhenBusy", body.choice("when_busy", WHEN_BUSY[:2], "finish"))
        body.end()
        return JSONResponse(await manager.unload(resident, when_busy))

    @router.post("/models/activate")
    async def activate(request: Request) -> JSONResponse:
        body = await Body.of(request)
        resident = body.text("resident", limit=MAX_NAME)
        body.end()
        return JSONResponse({"resident": shown(await manager.activate(resident))})

    @router.post("/models/approve")
    async def approve(request: Request) -> JSONResponse:
        """Under --model-switch ask: load the model that requests wait for, or refuse them."""
        body = await Body.of(request)
        model, approved = body.text("model", limit=MAX_NAME), body.flag("approved")
        body.end()
        manager.approvals.answer(model, approved)
        return JSONResponse({})

    @router.get("/models/settings")
    async def model_settings(model: str) -> JSONResponse:
        """What is remembered for one model: its backend, and the options that differ from each backend's defaults."""
        saved = services.model_settings
        options = {name: saved.options(model, name) for name in services.specs if saved.options(model, name)}
        return JSONResponse({"loader": saved.loader(model), "options": options})

    def overlay_of(name: str) -> str:
        spec = services.specs.get(name)
        if spec is None:
            raise NotFound("There is no such backend.", param="name")
        if spec.overlay is None:
            raise InvalidParameter(f"{spec.title} needs no installation.", param="name")
        return spec.overlay

    @router.post("/loaders/{name}/install")
    async def install(name: str) -> JSONResponse:
        return JSONResponse({"install": services.installs.install(overlay_of(name))})

    @router.post("/loaders/{name}/install/cancel")
    async def cancel_install(name: str) -> JSONResponse:
        await services.installs.cancel(overlay_of(name))
        return JSONResponse({})

    return router


def _confined(services: Services, model: str, loader: str | None, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options with their paths inside the folders of the models and adapters, whichever backend they are for."""
    config = services.config
    folders = (*config.model_dirs, config.lora_dir)
    names = [loader] if loader is not None else [services.model_settings.loader(model), *services.specs]
    for name in names:
        if name in services.specs and options:
            spec = services.specs[name]
            # The page sends back what flags and earlier loads have set: that is the operator's already.
            own = {**config.options_for(spec.options), **services.model_settings.options(model, spec.name)}
            new = {key: value for key, value in options.items() if key not in own or own[key] != value}
            options = {**options, **(confine_paths(spec, new, folders) or {})}
    return options


async def _remember(services: Services, resident: Resident, options: dict[str, Any]) -> None:
    """A model's options are kept once it has loaded with them: a set that does not load must not come back by itself."""
    try:
        await services.manager.wait(resident.id)
    except AppError:
        return  # the page has it from the manager's own event
    saved = services.model_settings.options(resident.model.id, resident.loader)
    try:
        await asyncio.to_thread(services.model_settings.save, resident.model.id, resident.loader, {**saved, **options})
    except AppError as error:
        services.chat.notify("warning", f"The load options of {resident.model.id} were not kept: {error}")

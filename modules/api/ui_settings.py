"""The page's routes for settings, presets and the table of sampling parameters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules import sampling
from modules.api.ui_body import Body
from modules.errors import InvalidParameter
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.services import Services

# Set by the server itself, so the page may not.
_OWN = frozenset({"last_model"})


def build_router(services: Services) -> APIRouter:
    """`/ui-api/settings`, `/ui-api/presets`, `/ui-api/parameters`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)
    settings, presets, events = services.settings, services.presets, services.events

    def view() -> dict[str, Any]:
        """`unsaved` says why the last change will be gone with the server, if it will."""
        return {**settings.values(), "unsaved": str(settings.unsaved) if settings.unsaved else None}

    async def change(changes: dict[str, Any]) -> dict[str, Any]:
        failed_before = settings.unsaved is not None
        await asyncio.to_thread(settings.update, changes)
        events.publish("settings", key="")
        if settings.unsaved is not None and not failed_before:
            services.chat.notify("error", f"{settings.unsaved} The change holds until the server ends.")
        return view()

    @router.get("/settings")
    async def get_settings() -> JSONResponse:
        return JSONResponse(view())

    @router.put("/settings")
    async def put_settings(request: Request) -> JSONResponse:
        changes = (await Body.of(request)).rest()
        for name in _OWN & changes.keys():
            raise InvalidParameter(f"{name} is set by the server.", param=name)
        return JSONResponse(await change(changes))

    @router.get("/presets")
    async def list_presets() -> JSONResponse:
        found = await asyncio.to_thread(presets.all)
        return JSONResponse({"presets": [to_wire(preset) for preset in found]})

    @router.get("/presets/{name:path}")
    async def get_preset(name: str) -> JSONResponse:
        return JSONResponse(to_wire(await asyncio.to_thread(presets.load, name)))

    @router.put("/presets/{name:path}")
    async def put_preset(name: str, request: Request) -> JSONResponse:
        body = await Body.of(request)
        values = body.optional_object("sampling")
        body.end()
        saved = await asyncio.to_thread(presets.save, name, settings.sampling() if values is None else values)
        events.publish("presets", key="")
        return JSONResponse(to_wire(saved))

    @router.delete("/presets/{name:path}")
    async def delete_preset(name: str) -> JSONResponse:
        await asyncio.to_thread(presets.delete, name)
        events.publish("presets", key="")
        if settings["preset"] == name:
            await change({"preset": None})
        return JSONResponse({})

    @router.get("/parameters")
    async def parameters() -> JSONResponse:
        active = services.manager.active()
        spec = services.specs[active.loader] if active is not None else None

        def row(parameter: sampling.Parameter) -> dict[str, Any]:
            supported = spec is None or parameter.name in spec.samplers
            reason = None if supported or spec is None else f"{spec.title} does not have {parameter.name}."
            return {**to_wire(parameter), "default": to_wire(parameter.default), "supported": supported, "reason": reason}

        return JSONResponse({"parameters": [row(parameter) for parameter in sampling.PARAMETERS.values()]})

    return router

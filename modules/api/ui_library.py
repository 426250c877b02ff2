"""The page's routes for the model files: rename, trash, conversions, saved settings, and the folder on the desktop."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules.api.ui_body import Body
from modules.errors import Conflict, Forbidden, InvalidParameter
from modules.load_options import confine_paths
from modules.open_folder import open_folder, opener
from modules.user_config import read_user_config

if TYPE_CHECKING:
    from modules.schema import ModelFiles
    from modules.services import Services

MAX_NAME = 1000
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


def build_router(services: Services) -> APIRouter:
    """`/ui-api/models/…`, `/ui-api/trash` and `/ui-api/conversions`."""
    router = APIRouter(prefix="/ui-api", include_in_schema=False)
    _add_files(router, services)
    _add_settings(router, services)
    _add_conversions(router, services)
    return router


def _add_files(router: APIRouter, services: Services) -> None:
    shelf = services.shelf

    async def idle(model_id: str) -> ModelFiles:
        """The model, which nothing uses. Raises ModelNotFound, Conflict."""
        model = await asyncio.to_thread(services.library.find, model_id)
        check_idle(services, model)
        return model

    @router.post("/models/rename")
    async def rename(request: Request) -> JSONResponse:
        body = await Body.of(request)
        model, name = body.text("model", limit=MAX_NAME), body.text("name", limit=MAX_NAME)
        body.end()
        files = await idle(model)
        new = await asyncio.to_thread(shelf.rename, files, name)
        last = services.settings["last_model"]
        if last is not None and last["model"] == files.id:
            await asyncio.to_thread(services.settings.update, {"last_model": {**last, "model": new}})
        tell(services)
        return JSONResponse({"model": new})

    @router.post("/models/trash")
    async def trash(request: Request) -> JSONResponse:
        body = await Body.of(request)
        model = body.text("model", limit=MAX_NAME)
        body.end()
        entry = await asyncio.to_thread(shelf.trash, await idle(model))
        tell(services)
        return JSONResponse({"entry": _entry(asdict(entry))})

    @router.get("/trash")
    async def trashed() -> JSONResponse:
        return JSONResponse({"entries": [_entry(asdict(entry)) for entry in await asyncio.to_thread(shelf.trashed)]})

    @router.post("/trash/{entry_id}/restore")
    async def restore(entry_id: str) -> JSONResponse:
        model = await asyncio.to_thread(shelf.restore, entry_id)
        tell(services)
        return JSONResponse({"model": model})

    @router.delete("/trash/{entry_id}")
    async def delete(entry_id: str) -> JSONResponse:
        return JSONResponse({"freed_bytes": await asyncio.to_thread(shelf.empty, entry_id)})

    @router.delete("/trash")
    async def empty() -> JSONResponse:
        return JSONResponse({"freed_bytes": await asyncio.to_thread(shelf.empty)})

    @router.post("/models/open")
    async def show(request: Request) -> JSONResponse:
        """Open the model's folder in the file manager of this machine."""
        body = await Body.of(request)
        model = body.text("model", limit=MAX_NAME)
        body.end()
        if not from_here(request):
            raise Forbidden("The folder opens on the server's own screen: only a browser there may ask for it.")
        path = Path((await asyncio.to_thread(services.library.find, model)).path)
        await open_folder(path if path.is_dir() else path.parent)
        return JSONResponse({})


def from_here(request: Request) -> bool:
    """Whether the browser is on this machine. Behind a proxy nobody can tell, so it counts as not."""
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        address = ipaddress.ip_address(request.client.host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def can_open(request: Request) -> bool:
    return opener() is not None and from_here(request)


def check_idle(services: Services, model: ModelFiles) -> None:
    """Raise Conflict while something reads or writes the model's files."""
    path = Path(model.path)
    for resident in services.manager.residents():
        if resident.state in ("loading", "ready", "unloading") and Path(resident.model.path) == path:
            raise Conflict(f"{model.id} is loaded.", hint="Unload it first.")
    if services.downloads.busy(path):
        raise Conflict(f"{model.id} is being downloaded.", hint="Cancel the download first.")
    if services.conversions.busy(model.id):
        raise Conflict(f"{model.id} is being converted.", hint="Stop the conversion first, or wait for it.")
    if any(job["state"] in ("queued", "running") and job["model"] == model.id for job in services.quantizations.jobs()):
        raise Conflict(f"{model.id} is being quantised.", hint="Stop it first, or wait for it.")


def tell(services: Services) -> None:
    """Every open page reads the list again."""
    services.events.publish("library", {})


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("id", "model", "size_bytes", "deleted_at")}


def _add_settings(router: APIRouter, services: Services) -> None:
    saved = services.model_settings

    @router.put("/models/settings")
    async def save(request: Request) -> JSONResponse:
        """Keep a loader and its options for one model, without loading it."""
        body = await Body.of(request)
        model, loader = body.text("model", limit=MAX_NAME), body.text("loader", limit=MAX_NAME)
        options = body.optional_object("options") or {}
        body.end()
        if loader not in services.specs:
            raise InvalidParameter("There is no such backend.", param="loader")
        files = await asyncio.to_thread(services.library.find, model)
        config = services.config
        own = saved.options(files.id, loader)
        new = {name: value for name, value in options.items() if name not in own or own[name] != value}
        folders = (*config.model_dirs, config.lora_dir)
        confined = await asyncio.to_thread(confine_paths, services.specs[loader], new, folders)
        checked = {**options, **(confined or {})}
        await asyncio.to_thread(saved.save, files.id, loader, checked)
        tell(services)
        return JSONResponse({})

    @router.delete("/models/settings")
    async def forget(model: str) -> JSONResponse:
        await asyncio.to_thread(saved.forget, model)
        tell(services)
        return JSONResponse({})

    @router.post("/models/settings/import")
    async def take(request: Request) -> JSONResponse:
        """text-generation-webui's config-user.yaml: what was taken, and what not and why."""
        body = await Body.of(request)
        text = body.text("text", limit=2_000_000)
        body.end()

        def work() -> dict[str, Any]:
            found = read_user_config(text, services.library.list(), services.specs)
            for model, loader, options in found.saved:
                saved.save(model, loader, {**saved.options(model, loader), **options})
            return {
                "saved": [{"model": m, "loader": loader, "options": options} for m, loader, options in found.saved],
                "skipped": [{"what": what, "reason": reason} for what, reason in found.skipped],
            }

        result = await asyncio.to_thread(work)
        tell(services)
        return JSONResponse(result)


def _add_conversions(router: APIRouter, services: Services) -> None:
    jobs = services.conversions

    @router.get("/conversions")
    async def overview() -> JSONResponse:
        return JSONResponse({"jobs": jobs.jobs()})

    @router.post("/conversions")
    async def start(request: Request) -> JSONResponse:
        body = await Body.of(request)
        model, kind = body.text("model", limit=MAX_NAME), body.text("type", limit=40)
        requantize = body.flag("requantize")
        body.end()
        return JSONResponse({"job": await jobs.start(model, kind, requantize=requantize)})

    @router.post("/conversions/{job_id}/cancel")
    async def cancel(job_id: str) -> JSONResponse:
        return JSONResponse({"job": await jobs.cancel(job_id)})

    @router.delete("/conversions/{job_id}")
    async def forget(job_id: str) -> JSONResponse:
        jobs.forget(job_id)
        return JSONResponse({})

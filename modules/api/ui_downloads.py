"""The page's routes for downloads: look into a repository, fetch, follow, pause, resume, cancel; the hub, its proxy and token."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules.api.ui_body import Body
from modules.download.hub import list_repository, list_revisions
from modules.download.plan import best_projector, choose_files, variants
from modules.errors import ConfigError, InvalidParameter, UnsafeModel
from modules.plan import verdict
from modules.plan.machine import this_machine
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.download.plan import RepoFile, Variant
    from modules.plan import Machine
    from modules.services import Services

MAX_NAME = 200
MAX_CHOSEN = 5000
MAX_SHOWN = 2000


def build_router(services: Services) -> APIRouter:
    """`/ui-api/downloads`."""
    router = APIRouter(prefix="/ui-api/downloads", include_in_schema=False)
    jobs = services.downloads

    @router.get("")
    async def overview() -> JSONResponse:
        """The jobs, and which hub they ask."""
        return JSONResponse({"jobs": jobs.jobs(), "hub": await asyncio.to_thread(_hub, services)})

    @router.post("/look")
    async def look(request: Request) -> JSONResponse:
        """What a repository holds at a revision, and what of it would be fetched."""
        repository, branch = await _asked(request)
        hub = await asyncio.to_thread(services.hub.hub)
        commit, files = await list_repository(hub, repository, branch)
        return JSONResponse(await asyncio.to_thread(_shown, services, repository, commit, files))

    @router.post("/revisions")
    async def revisions(request: Request) -> JSONResponse:
        """The branches and tags of a repository."""
        repository, _ = await _asked(request)
        return JSONResponse({"revisions": await list_revisions(await asyncio.to_thread(services.hub.hub), repository)})

    @router.put("/hub")
    async def change_hub(request: Request) -> JSONResponse:
        """Take `endpoint`, `proxy` or `token`; null takes one away."""
        body = await Body.of(request)
        changes = {name: body.optional_text(name, limit=1000) for name in ("endpoint", "proxy", "token") if body.has(name)}
        body.end()
        await asyncio.to_thread(services.hub.change, changes)
        return JSONResponse({"hub": await asyncio.to_thread(_hub, services)})

    @router.post("")
    async def start(request: Request) -> JSONResponse:
        body = await Body.of(request)
        repository, branch, commit = _names(body)
        files = body.optional_texts("files", most=MAX_CHOSEN)
        body.end()
        return JSONResponse({"job": await jobs.start(repository, branch, files, commit=commit)})

    @router.get("/{job_id}")
    async def one(job_id: str) -> JSONResponse:
        return JSONResponse({"job": jobs.job(job_id)})

    @router.post("/{job_id}/pause")
    async def pause(job_id: str) -> JSONResponse:
        return JSONResponse({"job": await jobs.pause(job_id)})

    @router.post("/{job_id}/resume")
    async def resume(job_id: str) -> JSONResponse:
        return JSONResponse({"job": jobs.resume(job_id)})

    @router.post("/{job_id}/cancel")
    async def cancel(job_id: str) -> JSONResponse:
        return JSONResponse({"job": await jobs.cancel(job_id)})

    @router.delete("/{job_id}")
    async def forget(job_id: str) -> JSONResponse:
        jobs.forget(job_id)
        return JSONResponse({})

    return router


async def _asked(request: Request) -> tuple[str, str | None]:
    body = await Body.of(request)
    repository, branch = body.text("repository", limit=MAX_NAME), body.optional_text("branch", limit=MAX_NAME)
    body.end()
    return repository, branch or None


def _names(body: Body) -> tuple[str, str | None, str | None]:
    return (
        body.text("repository", limit=MAX_NAME),
        body.optional_text("branch", limit=MAX_NAME) or None,
        body.optional_text("commit", limit=40) or None,
    )


def _hub(services: Services) -> dict[str, Any]:
    try:
        return services.hub.shown()
    except ConfigError as error:
        return {"endpoint": None, "problem": str(error)}


def _shown(services: Services, repository: str, commit: str, files: list[RepoFile]) -> dict[str, Any]:
    problem: str | None = None
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    try:
        plan = choose_files(repository, commit, files)
        chosen, skipped = [file.path for file in plan.files], plan.skipped
    except InvalidParameter as error:
        problem = None if error.param == "include" else str(error)  # several GGUFs: the page's user picks one
    except UnsafeModel as error:
        problem = str(error)
    machine = this_machine(services.config.model_dir, services.config.user_data_dir, bandwidth=False)
    rows = [{"path": file.path, "size": file.size} for file in sorted(files, key=lambda file: file.path)]
    return {
        "repository": repository,
        "commit": commit,
        "problem": problem,
        "chosen": chosen,
        "projector": projector.path if (projector := best_projector(files)) is not None else None,
        "variants": [_variant(variant, machine) for variant in variants(files)],
        "files": rows[:MAX_SHOWN],
        "left_out": max(0, len(rows) - MAX_SHOWN),
        "skipped": dict(list(skipped.items())[:MAX_SHOWN]),
        "free_bytes": machine.disk_free_bytes,
    }


def _variant(variant: Variant, machine: Machine) -> dict[str, Any]:
    return {
        "label": variant.label,
        "files": [file.path for file in variant.files],
        "size_bytes": variant.size_bytes,
        "verdict": to_wire(verdict(variant.size_bytes, machine)),
    }

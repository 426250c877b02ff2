"""The saved servers over HTTP: the page's /ui-api/remotes and /v1/internal/remotes, with the same bodies. The operator's alone.

A key goes in and never comes out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules.api.ui_body import Body
from modules.remotes.address import MAX_URL
from modules.remotes.route import MAX_CA
from modules.remotes.store import KINDS, MAX_KEY

if TYPE_CHECKING:
    from modules.services import Services

PREFIXES = ("/ui-api/remotes", "/v1/internal/remotes")
MAX_NAME = 200
MAX_ADDRESS = 2000


def build_router(services: Services) -> APIRouter:
    """The routes under both prefixes; only those of /v1/internal are in the reference."""
    router = APIRouter()
    for prefix in PREFIXES:
        _add(router, services, prefix, shown=prefix.startswith("/v1"))
    return router


def _add(router: APIRouter, services: Services, prefix: str, *, shown: bool) -> None:
    remotes = services.remotes
    kind: dict[str, Any] = {"include_in_schema": shown, "tags": ["Internal"]}

    @router.get(prefix, name=f"servers {prefix}", **kind)
    async def servers() -> JSONResponse:
        """Every saved server: its address, whether it answers, how fast, and its models."""
        return JSONResponse({"servers": await asyncio.to_thread(remotes.snapshot), "kinds": KINDS})

    @router.post(prefix, name=f"add a server {prefix}", **kind)
    async def add(request: Request) -> JSONResponse:
        """Save a server and ask it for its models. One that does not answer is saved all the same. `ca` are certificates as PEM,
        `proxy` is a URL."""
        body = await Body.of(request)
        name, url = body.text("name", limit=MAX_NAME), body.text("url", limit=MAX_ADDRESS)
        key, server_kind = body.optional_text("key", limit=MAX_KEY), body.choice("kind", KINDS, "auto")
        way: dict[str, Any] = {
            "ca": body.optional_text("ca", limit=MAX_CA),
            "proxy": body.optional_text("proxy", limit=MAX_URL),
            "proxy_resolves": body.flag("proxy_resolves"),
        }
        body.end()
        server = await asyncio.to_thread(lambda: remotes.store.add(name.strip(), url, key, server_kind, **way))
        await remotes.check(server)
        return JSONResponse({"server": await asyncio.to_thread(_row, services, server.name)})

    @router.post(prefix + "/{name}/test", name=f"test a server {prefix}", **kind)
    async def test(name: str) -> JSONResponse:
        """Ask a server for its models now."""
        await remotes.check(await asyncio.to_thread(remotes.store.get, name))
        return JSONResponse({"server": await asyncio.to_thread(_row, services, name)})

    @router.delete(prefix + "/{name}", name=f"remove a server {prefix}", **kind)
    async def remove(name: str) -> JSONResponse:
        """Forget a server and its key. Its loaded models stay until they are unloaded."""
        server = await asyncio.to_thread(remotes.store.remove, name)
        remotes.forget(server)
        return JSONResponse({"servers": await asyncio.to_thread(remotes.snapshot)})


def _row(services: Services, name: str) -> dict[str, Any]:
    return next(row for row in services.remotes.snapshot() if row["name"] == name)

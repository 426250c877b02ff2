"""What is known of each saved server now: whether it answers, how fast, and which models it has.

A list of models must never wait for a stranger: the servers are asked in the background, and what they said last is what is
listed. Only a server that was never asked is asked on the spot, when one of its models is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from modules.errors import AppError, ModelNotFound
from modules.remotes.listing import entries, listed_vision
from modules.remotes.store import PREFIX, Server, model_id, model_path
from modules.schema import ModelFiles, Quantization

if TYPE_CHECKING:
    from modules.events import EventBus
    from modules.remotes.store import RemoteStore

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_S = 15.0  # how long a server has for its list
EVERY_S = 30.0
AGAIN_S = 3.0  # a model that is not there is asked for at the server this often at most
FILE_EVERY_S = 2.0  # how soon a server that `server.py remote` added or removed is seen


@dataclass(frozen=True, slots=True)
class Health:
    """One look at a server. `latency_ms` is that of its model list; `error` says why it is not `ok`."""

    ok: bool
    checked_at: float
    latency_ms: float | None = None
    error: str | None = None
    models: tuple[dict[str, Any], ...] = ()


async def look(server: Server, *, seconds: float = LOOK_S) -> Health:
    """Ask a server for its models. Never raises: what is wrong is in the answer."""
    from modules.remotes.connection import Connection  # with httpx: not at every start

    connection = Connection(server, connect_s=min(seconds, 5.0))
    began = time.perf_counter()
    try:
        listed = entries(await asyncio.wait_for(connection.get("/models"), seconds))
    except AppError as error:
        return Health(False, time.time(), error=str(error))
    except asyncio.TimeoutError:
        return Health(False, time.time(), error=f"{server.name} did not list its models within {seconds:g} s.")
    finally:
        await connection.close()
    return Health(True, time.time(), round(1000 * (time.perf_counter() - began), 1), models=tuple(listed))


class Remotes:
    """The saved servers and what is known of them. `models` and `find` may be called in any thread."""

    def __init__(self, store: RemoteStore, events: EventBus | None = None, *, every_s: float = EVERY_S) -> None:
        self.store = store
        self._events = events
        self._every_s = every_s
        self._mutex = threading.Lock()
        self._known: dict[Server, Health] = {}

    def models(self) -> list[ModelFiles]:
        """What the servers had when they were last asked; none of one that was not asked yet or is gone."""
        return [
            _files(self.store, server, entry)
            for server in self._servers()
            if (health := self._of(server)) is not None
            for entry in health.models
        ]

    def find(self, name: str) -> ModelFiles:
        """Raises ModelNotFound."""
        server_name, _, model = name.removeprefix(PREFIX).partition("/")
        server = next((s for s in self._servers() if s.name == server_name), None)
        if server is None:
            raise ModelNotFound(
                f"There is no server named {server_name[:60]!r}.", hint="server.py remote list shows them.", param="model"
            )
        health = self._of(server)
        has = health is not None and any(entry["id"] == model for entry in health.models)
        if health is None or (not has and time.time() - health.checked_at > AGAIN_S):
            health = _in_own_loop(self.check(server))  # it may have come up, or have got the model, since
        for entry in health.models:
            if entry["id"] == model:
                return _files(self.store, server, entry)
        why = health.error or f"{server.name} has no model {model[:200]!r} now."
        raise ModelNotFound(why, hint="Refresh the model list.", param="model")

    async def check(self, server: Server) -> Health:
        """Ask one server now. A server that fails keeps the models it had, so that what was chosen stays to be seen."""
        health = await look(server)
        before = self._of(server)
        if not health.ok and before is not None:
            health = Health(False, health.checked_at, None, health.error, before.models)
        with self._mutex:
            self._known[server] = health
        if before is None or (before.ok, before.error, before.models) != (health.ok, health.error, health.models):
            self._tell(models=before is None or before.models != health.models)
        return health

    def forget(self, server: Server) -> None:
        """It was removed: its models leave the list now."""
        with self._mutex:
            known = self._known.pop(server, None)
        self._tell(models=known is not None)

    def snapshot(self) -> list[dict[str, Any]]:
        """Each server for the page, the API and the command line; keys are left out."""
        shown = []
        for server in self._servers():
            health = self._of(server)
            row = {**server.public(), "state": "unknown", "latency_ms": None, "error": None, "checked_at": None, "models": []}
            if health is not None:
                row |= {
                    "state": "ready" if health.ok else "failed",
                    "latency_ms": health.latency_ms,
                    "error": health.error,
                    "checked_at": health.checked_at,
                    "models": [model_id(server.name, entry["id"]) for entry in health.models],
                }
            shown.append(row)
        return shown

    async def watch(self) -> None:
        """Ask every server now and again, and a new one at once, until cancelled."""
        due: dict[Server, float] = {}
        asking: dict[Server, asyncio.Task[Health]] = {}
        try:
            while True:
                servers = await asyncio.to_thread(self._servers)
                if self._forget_others(servers):
                    self._tell(models=True)
                due = {server: due.get(server, 0.0) for server in servers}
                now = time.monotonic()
                for server in servers:
                    running = asking.get(server)
                    if now >= due[server] and (running is None or running.done()):
                        asking[server] = asyncio.create_task(self.check(server))
                        due[server] = now + self._every_s
                await asyncio.sleep(FILE_EVERY_S)
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)

    def _servers(self) -> tuple[Server, ...]:
        try:
            return self.store.servers()
        except AppError as error:
            log.warning("%s", error)
            return ()

    def _of(self, server: Server) -> Health | None:
        with self._mutex:
            return self._known.get(server)

    def _forget_others(self, servers: tuple[Server, ...]) -> bool:
        with self._mutex:
            gone = self._known.keys() - set(servers)
            for server in gone:
                del self._known[server]
        return bool(gone)

    def _tell(self, *, models: bool) -> None:
        if self._events is not None:
            self._events.publish("remotes", {"models": models}, key="remotes")


def _files(store: RemoteStore, server: Server, entry: dict[str, Any]) -> ModelFiles:
    context = entry.get("max_model_len") or entry.get("context_length")
    quantization, architecture = entry.get("quantization"), entry.get("architecture")
    return ModelFiles(
        id=model_id(server.name, entry["id"]),
        path=model_path(store.path.absolute(), server.name, entry["id"]),
        format="remote",
        architecture=architecture[:100] if isinstance(architecture, str) else None,
        quantization=Quantization(quantization[:40]) if isinstance(quantization, str) else None,
        context_length=context if isinstance(context, int) and not isinstance(context, bool) and context > 0 else None,
        has_chat_template=True,
        vision=listed_vision(entry) is True,
    )


def _in_own_loop(work: Coroutine[Any, Any, T]) -> T:
    """Wait for it in a thread of its own: whoever waits may have a loop that runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()

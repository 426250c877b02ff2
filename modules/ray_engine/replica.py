"""One replica: a Serve actor with a worker of its own, in the backend's environment, behind the same client as in the server.

A crash of the backend ends the answers on it with a typed error, and the replica starts its worker anew; a worker that can't be
brought back makes the replica unhealthy, and Serve replaces it. The death of the replica itself is the gateway's to tell. What
happens here is posted to the gateway's `Board`; a replica whose board is gone has no gateway, and ends the deployment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import protocol
from modules.errors import AppError, EngineDead, ModelNotFound, ProtocolError
from modules.overlays import Overlays
from modules.ray_engine.launch import LOOPBACK, ROOT
from modules.registry import load_spec
from modules.schema import Done, Event, GenerationRequest, Usage, from_wire, to_wire
from modules.worker import event_frame
from modules.worker_client import WorkerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RESTARTS = 3
RESTART_WINDOW_S = 60.0
HEARTBEAT_S = 5.0
REMEMBERED_ABORTS = 1000
RESEND = "Send it again: the other replicas go on, and this one comes back."


def _stay_on_loopback() -> None:
    """Serve's replica opens a port on every interface; for a Ray of our own it belongs on 127.0.0.1. A token guards it, too."""
    from ray.serve._private import replica as serve_replica

    inner = serve_replica.add_port_to_grpc_server
    if not getattr(inner, "on_loopback", False):

        def add_port(server: Any, address: str) -> Any:
            return inner(server, address.replace("[::]", "127.0.0.1"))

        add_port.on_loopback = True  # type: ignore[attr-defined]
        serve_replica.add_port_to_grpc_server = add_port


if os.environ.get(LOOPBACK):
    _stay_on_loopback()


class Board:
    """An actor of the gateway: replicas post, the gateway takes. It ends with the gateway, which is how replicas notice."""

    def __init__(self) -> None:
        self._notes: deque[dict[str, Any]] = deque()
        self._news = asyncio.Event()

    async def post(self, note: dict[str, Any]) -> None:
        self._notes.append(note)
        self._news.set()

    async def take(self) -> list[dict[str, Any]]:
        """All notes since the last time; waits for one."""
        await self._news.wait()
        self._news.clear()
        notes, self._notes = list(self._notes), deque()
        return notes

    async def hold(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()


class Replica:
    """The deployment's class. `job`: loader, path, options, app."""

    async def __init__(self, job: dict[str, Any], board: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        import ray

        self._job, self._board = job, board
        self._spec = load_spec(job["loader"])
        self._name = ray.get_runtime_context().get_actor_id()
        self._client: WorkerClient | None = None
        self._ready = asyncio.Event()
        self._failed: AppError | None = None
        self._deaths: list[float] = []
        self._aborted: deque[str] = deque(maxlen=REMEMBERED_ABORTS)
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            await self._bring_up()
        except AppError as error:
            await self._board.post.remote({"kind": "failed", "replica": self._name, "error": error.to_wire()})
            raise RuntimeError(f"{error}") from error
        self._spawn(self._watch_board())
        self._spawn(self._beat())

    # --- the worker ---------------------------------------------------------------------------------------------

    async def _bring_up(self) -> None:
        """Start a worker and load. Raises AppError and leaves no process."""
        path = self._job["path"]
        if self._job["is_file"] and not Path(path).exists():
            raise ModelNotFound(
                f"The model file is not on the node {_node()}: {path}.", hint="Keep the models in a folder that all nodes share."
            )
        client = await WorkerClient.start(self._spec, Overlays.find(ROOT), on_log=lambda text: self._post("log", text=text))
        try:
            info = await client.load(
                path, self._job["options"], lambda p: self._post("progress", stage=p.stage, fraction=p.fraction)
            )
        except BaseException:
            await client.close()
            raise
        client.on_death = self._died
        self._client = client
        self._ready.set()
        self._post("ready", info=to_wire(info), versions=client.versions, **self._about())

    def _about(self) -> dict[str, Any]:
        assert self._client is not None
        return {"pid": os.getpid(), "worker": self._client.pid, "node": _node(), "bytes": self._client.memory_bytes()}

    def _died(self, error: EngineDead) -> None:
        self._ready.clear()
        self._post("crashed", error=error.to_wire(), worker=self._client.pid if self._client is not None else None)
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < RESTART_WINDOW_S] + [now]
        if len(self._deaths) > RESTARTS:
            self._give_up(error)
        else:
            self._spawn(self._restart())

    async def _restart(self) -> None:
        dead, self._client = self._client, None
        if dead is not None:
            await dead.close()
        try:
            await self._bring_up()
        except AppError as error:
            self._give_up(error)

    def _give_up(self, error: AppError) -> None:
        """Serve replaces this replica at its next health check."""
        self._failed = error
        self._post("failed", error=error.to_wire())
        self._ready.set()

    async def check_health(self) -> None:
        if self._failed is not None:
            raise RuntimeError(str(self._failed))

    async def _worker(self) -> WorkerClient:
        while True:
            await self._ready.wait()
            if self._failed is not None:
                raise self._failed
            if self._client is not None:
                return self._client

    # --- requests -----------------------------------------------------------------------------------------------

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[bytes]:
        """Frames for the server's pipe, several in one piece when they come quickly; the last is done or error. An empty piece
        says that this replica has it, and that it lives."""
        request_id = request["request_id"]
        frames: list[bytes] = []
        news = asyncio.Event()
        loop = asyncio.get_running_loop()
        yield b""
        pump = asyncio.ensure_future(self._pump(from_wire(GenerationRequest, request), frames, news))
        try:
            while True:
                beat = loop.call_later(HEARTBEAT_S, news.set)  # wait_for would make a task for each token
                await news.wait()
                beat.cancel()
                news.clear()
                ended = pump.done()
                piece = b"".join(frames)
                frames.clear()
                if piece or not ended:
                    yield piece
                if ended:
                    return
        finally:
            if not pump.done():
                pump.cancel()
            with contextlib.suppress(ValueError):
                self._aborted.remove(request_id)

    async def _pump(self, request: GenerationRequest, frames: list[bytes], news: asyncio.Event) -> None:
        try:
            if request.request_id in self._aborted:
                frames.append(frame(Done(request.request_id, "cancelled", Usage())))
                return
            client = await self._worker()
            async for event in client.generate(request):
                frames.append(frame(event))
                news.set()
        except AppError as error:
            if isinstance(error, EngineDead):
                error.hint = RESEND
            frames.append(error_frame(error, request_id=request.request_id))
        except Exception as error:
            fault = ProtocolError(f"A replica failed: {type(error).__name__}: {error}.")
            frames.append(error_frame(fault, request_id=request.request_id))
        finally:
            news.set()

    async def abort(self, request_id: str) -> None:
        """All replicas are asked; one that has not begun it yet remembers."""
        self._aborted.append(request_id)
        if self._client is not None:
            await self._client.abort(request_id)

    async def call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """{"value"} or {"error"}."""
        try:
            return {"value": to_wire(await (await self._worker()).call(method, **arguments))}
        except AppError as error:
            return {"error": error.to_wire()}

    # --- the gateway ----------------------------------------------------------------------------------------------

    def _post(self, kind: str, **note: Any) -> None:
        self._board.post.remote({"kind": kind, "replica": self._name, **note})

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._client is not None:
                self._post("memory", **self._about())

    async def _watch_board(self) -> None:
        from ray import serve
        from ray.exceptions import RayError

        try:
            await self._board.hold.remote()
        except RayError:  # the gateway ended without deleting the deployment: kill -9, or its machine is gone
            await asyncio.to_thread(serve.delete, self._job["app"], _blocking=False)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            await self._client.close(grace_s=1.0)


def frame(event: Event) -> bytes:
    return protocol.encode_frame(event_frame(event))


def error_frame(error: AppError, **ids: str) -> bytes:
    return protocol.encode_frame({"type": "error", "error": error.to_wire(), **ids})


def _node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())

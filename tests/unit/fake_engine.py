"""A worker client without a process, for the logic of the manager and the runs. tests/contract and tests/api use real ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from modules.engine_client import EngineClient, OnProgress
from modules.errors import EngineDead, LoadError, LoadOutOfMemory, ModelNotFound
from modules.schema import Done, Event, GenerationRequest, LoaderSpec, LoadProgress, ModelFiles, ModelInfo, TokenEvent, Usage

SPEC = LoaderSpec(
    "fake", "Fake", "x:Y", "a fake", {"hf": 1}, frozenset({"temperature", "seed"}), options=(), features=frozenset()
)


class Environment:
    def unavailable(self, spec: LoaderSpec) -> str | None:
        return None


class FakeLibrary:
    def __init__(self, *names: str, size: int = 0) -> None:
        self.models = {name: ModelFiles(name, f"/models/{name}", "hf", size_bytes=size) for name in names}
        self.refuse: dict[str, Exception] = {}

    def list(self) -> list[ModelFiles]:
        return list(self.models.values())

    def find(self, name: str) -> ModelFiles:
        if name not in self.models:
            raise ModelNotFound(f"There is no model {name!r}.")
        return self.models[name]

    def check(self, model: ModelFiles) -> None:
        if model.id in self.refuse:
            raise self.refuse[model.id]


class FakeClient(EngineClient):
    """Answers `tokens` words; waits on `gate` before each word when there is one."""

    def __init__(self, spec: LoaderSpec, host: FakeHost) -> None:
        self.spec = spec
        self.host = host
        self.versions = {}
        self.closed = False
        self.aborted: set[str] = set()
        self.path = ""
        self.running = 0

    async def load(self, path: str, options: dict[str, Any], on_progress: OnProgress | None = None) -> ModelInfo:
        self.path = path
        self.host.loads.append(path)
        if on_progress is not None:
            on_progress(LoadProgress("Reading weights", 0.5))
        await self.host.load_gate.wait()
        if path in self.host.no_memory:
            raise LoadOutOfMemory("too small")
        if path in self.host.fail_load:
            raise LoadError("no good")
        self.info = ModelInfo(path.rpartition("/")[2], path, "fake", "hf", context_length=self.host.context)
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.running += 1
        self.host.order.append(request.request_id)
        try:
            for index in range(self.host.tokens):
                await self.host.gate.wait()
                if self.dead is not None:
                    raise self.dead
                if request.request_id in self.aborted:
                    yield Done(request.request_id, "cancelled", Usage(1, index))
                    return
                yield TokenEvent(request.request_id, index, (index,), f"{self.path.rpartition('/')[2]}{index} ")
            yield Done(request.request_id, "stop", Usage(1, self.host.tokens), seed=7)
        finally:
            self.running -= 1

    async def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    async def call(self, method: str, **arguments: Any) -> Any:
        return [ord(c) for c in arguments["text"]] if method == "encode" else ""

    async def close(self, grace_s: float = 5.0) -> None:
        self.closed = True

    def die(self) -> None:
        self.dead = EngineDead("It died.", detail={"signal": "SIGKILL", "stderr": "boom"})
        if self.on_death is not None:
            self.on_death(self.dead)


class FakeHost:
    """Starts fake clients and holds their gates, open at first."""

    def __init__(self) -> None:
        self.clients: list[FakeClient] = []
        self.loads: list[str] = []
        self.order: list[str] = []
        self.fail_load: set[str] = set()
        self.no_memory: set[str] = set()
        self.tokens = 3
        self.context = 100
        self.load_gate = asyncio.Event()
        self.gate = asyncio.Event()
        self.load_gate.set()
        self.gate.set()

    async def start(self, spec: LoaderSpec, on_log: Any) -> FakeClient:
        client = FakeClient(spec, self)
        self.clients.append(client)
        return client

    @property
    def alive(self) -> list[str]:
        return [c.path.rpartition("/")[2] for c in self.clients if not c.closed]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def settle() -> None:
    """Let every ready callback run, threads of to_thread included, however slow the machine is."""
    deadline = time.monotonic() + 5
    quiet = 0
    while quiet < 20:
        await asyncio.sleep(0.001)
        quiet = quiet + 1 if _threads_idle() or time.monotonic() > deadline else 0


def _threads_idle() -> bool:
    executor: Any = getattr(asyncio.get_running_loop(), "_default_executor", None)
    return executor is None or executor._idle_semaphore._value >= len(executor._threads)

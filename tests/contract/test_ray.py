"""Replicas on Ray: what a kill of each part does to the answers, what listens, and what is left at the end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from modules.errors import BackendUnavailable, EngineDead
from modules.ray_engine import launch
from modules.ray_engine.client import RayClient, RayEngine
from modules.ray_engine.settings import RaySettings
from modules.registry import load_spec
from modules.schema import Done, GenerationRequest, StopParams, TokenEvent
from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

LONG = "[[echo tokens=100000 rate=50]] on and on"
ECHO = load_spec("echo")
OPTIONS = {option.name: option.default for option in ECHO.options}
LIMIT_S = 240


class Replicas:
    """Echo on its replicas, driven from synchronous tests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: RayEngine, minimum: int, maximum: int, **options: Any) -> None:
        self.loop = loop
        engine.settings = RaySettings(minimum=minimum, maximum=maximum, cpus=0.5, routing="least-loaded")
        self.client: RayClient = self.run(engine.start(ECHO))
        self.run(self.client.load("echo", OPTIONS | options))
        engine.settings = RaySettings()
        self._ids = iter(range(1000))

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, LIMIT_S))

    def stream(self, prompt: str, tokens: int = 1_000_000) -> Streamed:
        return Streamed(self.client, f"r{next(self._ids)}", prompt, tokens)

    async def these(self, count: int) -> list[dict[str, Any]]:
        """The replicas, once there are so many with a worker."""
        while len(self.client.replicas) != count:
            await asyncio.sleep(0.05)
        return [dict(replica) for replica in self.client.replicas]

    async def text(self, prompt: str) -> str:
        stream = self.stream(prompt)
        async for _ in stream:
            pass
        return stream.text


class Streamed:
    def __init__(self, client: RayClient, request_id: str, prompt: str, tokens: int) -> None:
        stop = StopParams(max_tokens=tokens)
        self.request = GenerationRequest(request_id, prompt=prompt, stop=stop, sampling={"temperature": 0.0})
        self.client, self.tokens, self.text = client, 0, ""
        self.done: Done | None = None
        self.error: EngineDead | None = None

    async def __aiter__(self) -> AsyncIterator[None]:
        async for event in self.client.generate(self.request):
            if isinstance(event, TokenEvent):
                self.tokens += 1
                self.text += event.text
            elif isinstance(event, Done):
                self.done = event
            yield None

    async def follow(self) -> None:
        try:
            async for _ in self:
                pass
        except EngineDead as error:
            self.error = error

    async def until(self, tokens: int) -> None:
        while self.tokens < tokens:
            assert self.error is None and self.done is None
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def pair(loop: asyncio.AbstractEventLoop, ray_engine: RayEngine) -> Iterator[Replicas]:
    pair = Replicas(loop, ray_engine, 2, 2, slots=1)  # so that two answers are always on both
    yield pair
    pair.run(pair.client.close())


def test_the_server_may_send_what_all_replicas_run(pair: Replicas) -> None:
    assert pair.client.info is not None and pair.client.info.slots == 2
    assert "2 replicas" in pair.client.info.notes[-1]
    replicas = pair.run(pair.these(2))
    assert pair.client.versions.keys() >= {"ray", "echo", "python"}
    assert {"pid", "worker", "node", "bytes"} <= replicas[0].keys()
    assert (pair.client.memory_bytes() or 0) > sum(replica["bytes"] for replica in replicas) > 0


@pytest.mark.parametrize(("victim", "words"), [("pid", "its process ended"), ("worker", "SIGKILL")])
def test_a_killed_replica_ends_its_own_answers_only_and_comes_back(pair: Replicas, victim: str, words: str) -> None:
    """kill -9 of the replica, then of its backend, in mid-stream."""

    async def kill() -> tuple[list[Streamed], list[dict[str, Any]]]:
        before = await pair.these(2)
        streams = [pair.stream(LONG), pair.stream(LONG)]
        tasks = [asyncio.ensure_future(s.follow()) for s in streams]
        for stream in streams:
            await stream.until(3)
        psutil.Process(before[0][victim]).kill()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        survivor = streams[1 - tasks.index(done.pop())]
        await survivor.until(survivor.tokens + 20)
        await pair.client.abort(survivor.request.request_id)
        await asyncio.gather(*tasks)
        return streams, before

    async def back(before: list[dict[str, Any]]) -> None:
        while before[0]["worker"] in {r["worker"] for r in await pair.these(2)}:
            await asyncio.sleep(0.05)
        texts = await asyncio.gather(*(pair.text(f"again {n}") for n in range(8)))
        assert texts == [f"again {n}" for n in range(8)]

    streams, before = pair.run(kill())
    errors = [s.error for s in streams if s.error is not None]
    assert len(errors) == 1 and words in str(errors[0]), "one answer is lost, the other goes on"
    assert errors[0].hint and "stderr" in errors[0].detail
    assert [s.done.finish_reason for s in streams if s.done] == ["cancelled"]
    assert pair.client.dead is None
    pair.run(back(before))


def test_nothing_listens_beyond_loopback(pair: Replicas, ray_engine: RayEngine) -> None:
    pids = [pair.client.pid, ray_engine.pid]
    processes = [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    found = {c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_what_an_option_says_of_the_slots_is_what_scales(loop: asyncio.AbstractEventLoop, ray_engine: RayEngine) -> None:
    """Four answers for one replica of two: the others wait for the second, which comes. Echo's declaration says 256."""
    few = Replicas(loop, ray_engine, 1, 2, slots=2)

    async def grow() -> None:
        [first] = await few.these(1)
        streams = [few.stream(LONG) for _ in range(4)]
        tasks = [asyncio.ensure_future(stream.follow()) for stream in streams]
        for stream in streams:
            await stream.until(3)
        assert first["worker"] in {replica["worker"] for replica in await few.these(2)}, "Serve was told as it ran"
        for stream in streams:
            await few.client.abort(stream.request.request_id)
        await asyncio.gather(*tasks)

    try:
        assert few.client.info is not None and few.client.info.slots == 4
        few.run(grow())
    finally:
        few.run(few.client.close())


# --- clusters -------------------------------------------------------------------------------------------------


@pytest.fixture
def of_cluster(
    ray_engine: RayEngine, overlays: Overlays, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    """Makes engines that join a cluster by its address, with the token of the Ray that the tests started."""
    for name, value in launch.local_env(ray_engine.token).items():
        if name in launch.CLUSTER_AUTH:
            monkeypatch.setenv(name, value)
    engines = []

    def join(address: str) -> RayEngine:
        engines.append(RayEngine(RaySettings(address=address, cpus=0.5), overlays, tmp_path))
        return engines[-1]

    yield join
    for engine in engines:
        loop.run_until_complete(engine.close())


def test_no_cluster_is_told_at_once(of_cluster: Any, loop: asyncio.AbstractEventLoop) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(BackendUnavailable, match=r"no Ray cluster at 127\.0\.0\.1") as caught:
        loop.run_until_complete(of_cluster(address).start(ECHO))
    assert "ray start --head" in caught.value.hint


def test_what_is_no_cluster_is_told(of_cluster: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Something listens there, but never says a word."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(8)
        with pytest.raises(BackendUnavailable, match="can't be used as a Ray cluster") as caught:
            loop.run_until_complete(of_cluster(f"127.0.0.1:{other.getsockname()[1]}").start(ECHO))
    assert caught.value.hint


SERVER = """
import asyncio, json, sys
from pathlib import Path
import psutil
from modules.overlays import Overlays
from modules.ray_engine.client import RayEngine
from modules.ray_engine.settings import RaySettings
from modules.registry import load_spec

async def main():
    spec = load_spec("echo")
    engine = RayEngine(RaySettings(), Overlays.find(), Path(sys.argv[1]))
    client = await engine.start(spec)
    await client.load("echo", {o.name: o.default for o in spec.options})
    while not client.replicas:
        await asyncio.sleep(0.05)
    pids = [p.pid for p in psutil.Process().children(recursive=True)] + [r["worker"] for r in client.replicas]
    print(json.dumps({"address": await engine.start_node(), "token": engine.token, "pids": pids}), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_killed_server_takes_its_ray_with_it(
    of_cluster: Any, loop: asyncio.AbstractEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of a server: no Ray, no replica, no worker and no folder is left. Another server that had joined that Ray as its
    cluster, looked at its nodes and serves a model there is told in mid-stream that the head is lost."""
    words = [sys.executable, "-c", SERVER, str(tmp_path)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=variables) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        monkeypatch.setenv("RAY_AUTH_TOKEN", told["token"])
        monkeypatch.setattr(launch, "HEAD_LOST_S", 2)

        async def joined() -> EngineDead:
            client = await of_cluster(told["address"]).start(ECHO)
            await client.load("echo", OPTIONS)
            assert "in the cluster" in client.info.notes[-1]
            stream = Streamed(client, "r", LONG, 1_000_000)
            following = asyncio.ensure_future(stream.follow())
            await stream.until(3)
            server.kill()
            await following
            assert stream.error is not None
            await client.close()
            return stream.error

        processes = [psutil.Process(pid) for pid in told["pids"]]
        assert len(processes) > 5
        try:
            error = loop.run_until_complete(asyncio.wait_for(joined(), LIMIT_S))
        finally:
            server.kill()
    assert error.hint and "stderr" in error.detail
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "ray").exists()

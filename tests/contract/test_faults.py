"""Every way a worker can fail, on request of the echo loader: a typed error, and a fresh worker serves the next request."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from modules import worker_client
from modules.errors import (
    AppError,
    CorruptModel,
    EngineDead,
    GenerateOutOfMemory,
    GenerationFailed,
    InvalidParameter,
    LoadOutOfMemory,
    UnsupportedParameter,
)
from tests.conftest import ROOT
from tests.contract.conftest import Bench
from tests.contract.rows import ROWS

if TYPE_CHECKING:
    from modules.overlays import Overlays

ECHO = next(row for row in ROWS if row.loader == "echo")


@pytest.fixture
def echo(overlays: Overlays, loop: asyncio.AbstractEventLoop) -> Iterator[Bench]:
    bench = Bench(ECHO, overlays, loop)
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("directive", "error"),
    [
        ("error_at=2", GenerationFailed),
        ("raise_at=2", GenerationFailed),
        ("oom_at=2", GenerateOutOfMemory),
        ("nonsense=2", InvalidParameter),
    ],
)
def test_recoverable(echo: Bench, directive: str, error: type[AppError]) -> None:
    echo.load()
    with pytest.raises(error) as caught:
        echo.generate(f"[[echo {directive} tokens=9]]")
    assert caught.value.hint
    assert echo.generate("still here").text == "still here"


@pytest.mark.parametrize(
    ("directive", "where", "value"),
    [
        ("crash_at=2", "signal", "SIGSEGV"),
        ("kill_at=2", "signal", "SIGKILL"),
        ("exit_at=2", "exit_code", 7),
        ("exit_at=0", "exit_code", 7),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_death_in_mid_stream(echo: Bench, directive: str, where: str, value: Any) -> None:
    echo.load()
    deaths: list[EngineDead] = []
    echo.client.on_death = deaths.append
    with pytest.raises(EngineDead) as caught:
        echo.generate(f"[[echo {directive} tokens=9]]")
    assert caught.value.detail[where] == value
    assert len(deaths) == 1
    if directive.startswith("crash"):
        assert "about to crash" in caught.value.detail["stderr"]
    with pytest.raises(EngineDead):
        echo.generate("a dead worker answers nothing")
    echo.client = echo.start()
    echo.load()
    assert echo.generate("again").text == "again"


def test_garbage_on_the_pipe_is_death(echo: Bench) -> None:
    echo.load()
    with pytest.raises(EngineDead, match="no frame"):
        echo.generate("[[echo garbage_at=2 tokens=9]]")


def test_printf_is_no_garbage(echo: Bench) -> None:
    echo.load()
    assert echo.generate("[[echo printf_at=1]]two words").text == "two words"
    assert any("C library printed" in line for line in echo.log)


@pytest.mark.parametrize("directive", ["freeze_at=2", "hang_at=2"])
@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX")
def test_silence_or_deafness_is_death(echo: Bench, directive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process answers no ping; one that hangs in a token answers pings but not an abort."""
    monkeypatch.setattr(worker_client, "PING_EVERY_S", 0.1)
    monkeypatch.setattr(worker_client, "ABORT_GRACE_S", 0.5)
    echo.close()
    echo.client = echo.start()
    echo.load()
    monkeypatch.setattr(worker_client, "SILENCE_S", 1.0)  # a load on a busy machine may take longer to answer
    pid = echo.client.pid

    async def generate() -> None:
        request = echo.request(f"[[echo {directive} tokens=9]]")
        answer = asyncio.ensure_future(echo.collect(request))
        if "hang" in directive:  # an abort that came before the hang would be obeyed
            while not any("about to hang" in line for line in echo.log):
                await asyncio.sleep(0.01)
            await echo.client.abort(request.request_id)
        await answer

    with pytest.raises(EngineDead, match=r"did not (answer|stop)"):
        echo.run(generate())
    assert pid is not None
    for _ in range(200):
        if not psutil.pid_exists(pid):
            break
        echo.run(asyncio.sleep(0.05))
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(("fault", "error"), [("corrupt", CorruptModel), ("oom", LoadOutOfMemory), ("exit", EngineDead)])
def test_load_faults(echo: Bench, fault: str, error: type[AppError]) -> None:
    with pytest.raises(error):
        echo.load(fault=fault)


def test_close_ends_a_hanging_load(echo: Bench) -> None:
    async def load_and_close() -> None:
        load = asyncio.ensure_future(echo.client.load("echo", echo.options(fault="hang")))
        await asyncio.sleep(0.2)
        await echo.client.close(grace_s=0.2)
        with pytest.raises(EngineDead, match="unloaded"):
            await load

    pid = echo.client.pid
    echo.run(load_and_close())
    assert pid is not None and not psutil.pid_exists(pid)


def test_optional_methods_are_typed(echo: Bench) -> None:
    echo.load()
    with pytest.raises(UnsupportedParameter):
        echo.run(echo.client.score([1, 2, 3]))


def test_many_streams_do_not_mix(echo: Bench) -> None:
    echo.load()

    async def one(number: int) -> str:
        return (await echo.collect(echo.request(f"nonce{number} " * 20))).text

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(n) for n in range(60)))

    for number, text in enumerate(echo.run(all_of_them())):
        assert set(text.split()) == {f"nonce{number}"}


def test_slow_stream_does_not_hold_up_another(echo: Bench) -> None:
    echo.load()

    async def order() -> list[str]:
        ended: list[str] = []

        async def one(name: str, prompt: str) -> None:
            await echo.collect(echo.request(prompt, stop=engine_stop()))
            ended.append(name)

        await asyncio.gather(one("slow", "[[echo tokens=40 rate=20]]"), one("quick", "[[echo tokens=5]]"))
        return ended

    assert echo.run(order()) == ["quick", "slow"]


def engine_stop() -> Any:
    from modules.schema import StopParams

    return StopParams(max_tokens=1000)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_worker_ends_with_its_parent() -> None:
    """Kill -9 of the parent leaves no worker behind."""
    script = textwrap.dedent("""
        import asyncio, time
        from modules.worker_client import WorkerClient
        from modules.overlays import Overlays
        from modules.registry import load_spec
        async def main():
            client = await WorkerClient.start(load_spec("echo"), Overlays.find())
            print(client.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")

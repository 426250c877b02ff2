"""Crashes, disconnects, switches, floods and ends, over real processes (C1, C2, C9-C11, C16, C17, D1-D4)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Server

Launch = Callable[..., "Server"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def text_of(items: list[Any]) -> str:
    return "".join(i["choices"][0]["delta"].get("content", "") for i in items if isinstance(i, dict) and i.get("choices"))


def busy(server: Server) -> int:
    return sum(r["active_requests"] + r["queued"] for r in server.http.get("/ui-api/models").json()["residents"])


# --- crashes -------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("fault", ["crash_at=5", "kill_at=5", "exit_at=5", "garbage_at=5"])
def test_c1_a_worker_that_dies_in_mid_stream(launch: Launch, fault: str) -> None:
    server = launch().wait_ready()
    items = server.stream(f"[[echo tokens=50 {fault}]] x")
    assert items[-1] != "[DONE]"
    assert items[-1]["error"]["code"] in ("worker_crashed", "protocol_error"), items[-1]
    assert text_of(items).split(), "the text before the crash came through"
    whole = server.chat(f"[[echo tokens=50 {fault}]] x")
    assert whole.json()["error"]["code"] in ("worker_crashed", "protocol_error")
    assert server.chat("ping").status_code == 200  # this request reloads the model
    server.oracle()
    assert len(server.workers()) == 1


def test_errors_that_leave_the_worker_alive(server: Server) -> None:
    before = [worker.pid for worker in server.workers()]
    for fault, code in (
        ("error_at=3", "generation_failed"),
        ("raise_at=3", "generation_failed"),
        ("oom_at=3", "out_of_memory_generate"),
    ):
        items = server.stream(f"[[echo tokens=20 {fault}]] x")
        assert items[-1]["error"]["code"] == code
        assert server.chat(f"[[echo tokens=20 {fault}]] x").json()["error"]["code"] == code
        server.oracle()
    assert [worker.pid for worker in server.workers()] == before


@posix
def test_c1_other_streams_of_another_worker_are_untouched(launch: Launch, tmp_path: Path) -> None:
    server = launch().wait_ready()
    load = {"model": "echo", "loader": "echo", "options": {"context_length": 4096}, "when_busy": "beside"}
    first = server.http.get("/ui-api/models").json()["active"]
    second = server.http.post("/ui-api/models/load", json=load).json()["resident"]["id"]
    server.until(lambda: server.http.get("/ui-api/models").json()["active"] == second, "switched")
    assert first != second
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(server.stream, "[[echo tokens=60 rate=60]] x", model=first)
        time.sleep(0.3)
        crashed = server.stream("[[echo tokens=50 kill_at=5]] x", model=second)
        assert crashed[-1]["error"]["code"] == "worker_crashed"
        assert long.result()[-1] == "[DONE]"


@posix
def test_c1_health_comes_back_without_a_request(launch: Launch) -> None:
    server = launch().wait_ready()
    server.workers()[0].kill()
    server.until(lambda: server.http.get("/health").status_code == 503, "unwell", 10)
    server.until(lambda: server.http.get("/health").status_code == 200, "well again", 20)
    server.oracle()


@posix
def test_c10_a_crash_loop_ends_with_the_reason(launch: Launch) -> None:
    server = launch().wait_ready()
    codes = [server.chat("[[echo tokens=9 kill_at=2]] x").json()["error"]["code"] for _ in range(4)]
    assert set(codes) == {"worker_crashed"}
    last = server.chat("ping")
    assert last.status_code == 502 and "4 times" in last.json()["error"]["message"]
    health = server.http.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert server.workers() == []
    reload = server.http.post("/ui-api/models/load", json={"model": "echo"})
    assert reload.status_code in (200, 202), reload.text
    server.until(lambda: server.http.get("/health").status_code == 200, "loaded again")
    server.oracle()


@pytest.mark.parametrize("fault", ["corrupt", "oom", "exit"])
def test_c2_a_load_that_fails_leaves_the_old_model(launch: Launch, fault: str) -> None:
    server = launch().wait_ready()
    body = {"model": "echo", "loader": "echo", "options": {"fault": fault}}
    server.http.post("/ui-api/models/load", json=body)

    def failed() -> bool:
        return any(r["state"] == "failed" for r in server.http.get("/ui-api/models").json()["residents"])

    server.until(failed, "failed")
    assert server.chat("ping").status_code == 200  # where memory was short, the old model had to go and comes back
    server.oracle()
    assert len(server.workers()) == 1


# --- disconnects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first token", "in mid-stream", "whole answer", "n of 4"])
def test_d1_a_client_that_leaves_stops_its_generation(server: Server, when: str) -> None:
    text = "[[echo tokens=100000 rate=50 delay=2]] x" if when == "before the first token" else "[[echo tokens=100000 rate=200]] x"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": when != "whole answer"}
    if when == "n of 4":
        body["n"] = 4
        body["max_tokens"] = 5000
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
        )  # fmt: skip
        if when == "in mid-stream":
            while b'"content":"' not in connection.recv(65536):
                pass
        else:
            server.until(lambda: busy(server) > 0, "started")
    server.until(lambda: busy(server) == 0, "idle", 10)
    server.oracle()


def test_d1_a_disconnect_storm_leaves_nothing(server: Server) -> None:
    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = {"messages": [{"role": "user", "content": "[[echo tokens=5000 rate=400]] x"}], "stream": True}
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                count = 0
                async for _ in response.aiter_bytes():
                    count += 1
                    if count > index % 7:
                        return

    async def storm() -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(one(client, index) for index in range(150)))

    asyncio.run(storm())
    server.until(lambda: busy(server) == 0, "idle", 15)
    server.oracle()


# --- many at once --------------------------------------------------------------------------------------------------


async def streams(server: Server, count: int, tokens: int) -> list[tuple[int, str, bool]]:
    """(status, text, ended properly) of `count` concurrent streams, each with words of its own."""

    async def one(client: httpx.AsyncClient, index: int) -> tuple[int, str, bool]:
        words = " ".join(f"n{index}w{word}" for word in range(tokens))
        body = {"messages": [{"role": "user", "content": words}], "stream": True}
        text, ended = "", False
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                assert response.headers["retry-after"]
                return response.status_code, "", False
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return 200, text if text != words else "exact", ended

    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, index) for index in range(count)))


def test_d3_200_streams_without_a_mix_up(server: Server) -> None:
    assert set(asyncio.run(streams(server, 200, 100))) == {(200, "exact", True)}
    server.oracle()


def test_d4_beyond_the_limit_is_refused_and_the_rest_finishes(server: Server) -> None:
    answers = asyncio.run(streams(server, 600, 30))
    assert set(answers) <= {(200, "exact", True), (503, "", False)}
    assert answers.count((200, "exact", True)) >= 300
    server.oracle()


def test_d2_a_reader_that_never_reads_holds_up_nobody(server: Server) -> None:
    content = json.dumps({"messages": [{"role": "user", "content": "[[echo tokens=8000]] x"}], "stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    with connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        server.oracle()
        server.until(lambda: busy(server) == 0, "generated to the end without its reader", 20)
    server.oracle()


# --- models --------------------------------------------------------------------------------------------------------


def test_c17_switch_while_four_streams_run(launch: Launch) -> None:
    server = launch().wait_ready()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.stream, "[[echo tokens=40 rate=40]] x") for _ in range(4)]
        server.until(lambda: busy(server) == 4, "running")
        body = {"model": "echo", "loader": "echo", "options": {"context_length": 2048}, "when_busy": "finish"}
        new = server.http.post("/ui-api/models/load", json=body).json()["resident"]["id"]
        for stream in running:
            assert stream.result()[-1] == "[DONE]"
    server.until(lambda: [r["id"] for r in server.http.get("/ui-api/models").json()["residents"]] == [new], "switched")
    server.until(lambda: len(server.workers()) == 1, "the old worker gone")
    server.oracle()


def test_c17_switch_that_cancels(launch: Launch) -> None:
    server = launch().wait_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.stream, "[[echo tokens=100000 rate=50]] x")
        server.until(lambda: busy(server) == 1, "running")
        body = {"model": "echo", "loader": "echo", "options": {"context_length": 2048}, "when_busy": "cancel"}
        server.http.post("/ui-api/models/load", json=body)
        last = running.result()[-1]
    assert last["error"]["code"] == "conflict"
    server.oracle()


def test_health_and_requests_without_a_model(launch: Launch) -> None:
    server = launch(model=None)
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "empty")
    none = server.chat("x")
    assert (none.status_code, none.json()["error"]["code"]) == (503, "no_model_loaded")
    assert none.headers["retry-after"]
    by_name = server.chat("hello", model="echo")  # --model-switch on: the request loads it
    assert by_name.status_code == 200 and by_name.json()["model"] == "echo"
    assert server.http.get("/health").status_code == 200


def test_health_while_loading_and_waiting_requests(launch: Launch) -> None:
    server = launch("--load-seconds", "2")
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert server.chat("I waited").json()["choices"][0]["message"]["content"] == "I waited"


def test_a_client_that_gives_up_while_the_model_loads(launch: Launch) -> None:
    server = launch("--load-seconds", "3")
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=0.5)
    server.wait_ready()
    server.oracle()


def test_policy_off(launch: Launch) -> None:
    server = launch("--model-switch", "off", model=None)
    refused = server.chat("x", model="echo")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_the_last_model_is_loaded_again(launch: Launch, tmp_path: Path) -> None:
    data = tmp_path / "kept ä"
    first = launch(data=data).wait_ready()
    first.until(lambda: (data / "settings.yaml").is_file(), "remembered")
    assert first.stop() == 0
    command_free = launch("--model-dir", str(tmp_path), model=None, data=data)  # --no-model wins over the memory
    assert command_free.http.get("/health").json()["status"] == "empty"


# --- start and end -------------------------------------------------------------------------------------------------


def test_c11_a_port_in_use(launch: Launch, tmp_path: Path) -> None:
    server = launch().wait_ready()
    flags = ["--listen-port", str(server.port), "--user-data-dir", str(tmp_path / "other"), "--no-model", "--nowebui"]
    second = subprocess.run([sys.executable, "server.py", *flags], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert str(server.port) in second.stderr and "--listen-port" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    server.oracle()


def test_c16_a_data_folder_in_use(launch: Launch) -> None:
    server = launch().wait_ready()
    flags = ["--listen-port", "0", "--user-data-dir", str(server.data), "--no-model", "--nowebui"]
    second = subprocess.run([sys.executable, "server.py", *flags], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert str(server.data) in second.stderr
    assert "Traceback" not in second.stderr
    server.oracle()


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_c9_an_orderly_end_while_streaming(launch: Launch, number: signal.Signals) -> None:
    server = launch().wait_ready()
    workers = server.workers()
    helpers = psutil.Process(server.process.pid).children(recursive=True)
    items: list[Any] = []
    reader = threading.Thread(target=lambda: items.extend(server.stream("[[echo tokens=100000 rate=50]] x")))
    reader.start()
    server.until(lambda: busy(server) == 1, "streaming")
    server.process.send_signal(number)
    assert server.process.wait(30) == 0
    reader.join(10)
    assert items and workers
    _, alive = psutil.wait_procs(helpers, timeout=30)
    assert alive == []
    assert "Traceback" not in server.rest()


@posix
def test_c9_the_second_signal_ends_at_once(launch: Launch) -> None:
    server = launch().wait_ready()
    workers = server.workers()
    reader = threading.Thread(target=_quiet, args=(server,))
    reader.start()
    server.until(lambda: busy(server) == 1, "streaming")
    for _ in range(2):  # one Ctrl-C that came twice is one
        server.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    with contextlib.suppress(ProcessLookupError):  # it may have ended in good order by now
        server.process.send_signal(signal.SIGINT)
    server.process.wait(30)
    reader.join(10)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def _quiet(server: Server) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.stream("[[echo tokens=100000 rate=50]] x")


@posix
def test_c9_an_end_while_a_model_loads(launch: Launch) -> None:
    server = launch("--load-seconds", "60")
    server.until(lambda: bool(server.workers()), "loading")
    workers = server.workers()
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


@posix
def test_c8_workers_end_with_a_killed_parent(launch: Launch) -> None:
    server = launch().wait_ready()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(5)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []

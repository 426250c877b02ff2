"""A real server process with a real worker (echo) behind it: one for all tests that leave it well, fresh ones for the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 60.0


class Server:
    """`server.py` in a process of its own."""

    def __init__(self, data: Path, *flags: str, model: str | None = "echo") -> None:
        first = ["--model", model] if model else ["--no-model"]
        command = [sys.executable, "server.py", "--listen-port", "0", "--user-data-dir", str(data), *first, *flags]
        if not any(flag == "webui" for flag in flags):
            command.append("--nowebui")
        command = [word for word in command if word != "webui"]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SWITCHYARD_") or k == "SWITCHYARD_SET"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        self.data = data
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"Switchyard: (http://[\d.]+:(\d+)\S*)", line)
            if found:
                self.login = found[1]
                self.port = int(found[2])
                break
        else:
            self.process.wait()
            self.process.stdout.close()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_ready(self) -> Server:
        self.until(lambda: self.http.get("/health").status_code == 200, "ready")
        return self

    def until(self, condition: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        due = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the server ended ({self.process.returncode}):\n{self.rest()}"
            assert time.monotonic() < due, f"not {what} within {seconds} s"
            time.sleep(0.02)

    def chat(self, text: str = "ping", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **fields})

    def stream(self, text: str, **fields: Any) -> list[dict[str, Any] | str]:
        """Every data item of a streamed chat: objects, and the word [DONE]."""
        body = {"messages": [{"role": "user", "content": text}], "stream": True, **fields}
        items: list[dict[str, Any] | str] = []
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            with contextlib.suppress(httpx.RemoteProtocolError):
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        data = line[6:]
                        items.append(data if data == "[DONE]" else json.loads(data))
        return items

    def raw(self, request: bytes, *, wait_s: float = 20.0) -> bytes:
        """Bytes in, bytes out, until the server closes or nothing more comes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while chunk := connection.recv(65536):
                    answer += chunk
            return answer

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "modules.worker" in " ".join(child.cmdline())]

    def oracle(self) -> None:
        """After every bad input: alive, healthy, and the next ordinary request is answered."""
        assert self.process.poll() is None
        assert self.http.get("/health", timeout=2).status_code == 200
        answer = self.chat("still there")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "still there"

    def rest(self) -> str:
        """The log, once the process has ended."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        return "".join(self.lines)

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            assert self.process.stdout is not None
            if not self.process.stdout.closed:
                self.lines += self.process.stdout.readlines()
                self.process.stdout.close()
        return code


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Shared by every test that does it no harm."""
    server = Server(tmp_path_factory.mktemp("data"))
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A server of the test's own: `launch("--flag", model="echo")`."""
    servers: list[Server] = []

    def start(*flags: str, model: str | None = "echo", data: Path | None = None) -> Server:
        servers.append(Server(data or tmp_path / f"data{len(servers)}", *flags, model=model))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()

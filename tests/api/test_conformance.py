"""The probes against a real server: nothing fails on echo, and what echo does not have is told as that."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from modules.conformance.cli import table
from modules.conformance.client import Api, Failed, Unsupported
from modules.conformance.probes import PROBES
from modules.conformance.runner import Cell, Column, http_client, report, run_column

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Server

ROOT = Path(__file__).resolve().parent.parent.parent
# What echo has no logits or vectors for.
NOT_ON_ECHO = {"chat_logprobs", "echo", "logit_bias", "embeddings", "ollama_embed", "llama_probs", "internal_logits", "vision"}


def test_every_probe_on_echo(server: Server) -> None:
    async def go() -> Column:
        column = Column("echo", "echo")
        async with http_client(server.url) as http:
            await run_column(http, column)
        return column

    column = asyncio.run(go())
    states = {name: cell.state for name, cell in column.cells.items()}
    failed = {name: cell.reason for name, cell in column.cells.items() if cell.state == "fail"}
    assert failed == {} and len(states) == len(PROBES)
    assert {name for name, state in states.items() if state == "unsupported"} == NOT_ON_ECHO


def test_the_subcommand_on_a_running_server(server: Server) -> None:
    command = [
        sys.executable,
        "server.py",
        "conformance",
        "--url",
        server.url,
        "--probe",
        "chat",
        "--probe",
        "embeddings",
        "--json",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(c["loader"], c["passed"], c["failed"], c["unsupported"]) for c in found["columns"]] == [("echo", 1, 0, 1)]


def test_the_pages_run(launch: Callable[..., Server]) -> None:
    server = launch("--api-key", "user-key-1234", model=None)
    headers = {"Authorization": "Bearer user-key-1234"}
    address = "/v1/internal/conformance"
    assert server.http.get("/conformance").status_code == 401
    assert "Run" in server.http.get("/conformance", headers=headers).text
    assert server.http.post(address, headers=headers).json()["error"]["code"] == "no_model_loaded"
    loaded = server.http.post("/v1/internal/model/load", json={"model_name": "echo"}, headers=headers)
    assert loaded.json() == "OK"
    assert server.http.post(address, headers=headers).json()["running"] is True
    server.until(lambda: not server.http.get(address, headers=headers).json()["running"], "finished", 120)
    found: dict[str, Any] = server.http.get(address, headers=headers).json()
    assert found["problem"] == "" and found["columns"][0]["failed"] == 0 and found["columns"][0]["passed"] > 20
    assert [row["name"] for row in found["rows"]] == [probe.name for probe in PROBES]


def test_a_wrong_answer_is_a_failure_with_its_reason() -> None:
    """Every probe fails on a server that answers nonsense: none can pass by itself."""

    def nonsense(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"choices": [], "model": "other"})

    async def go() -> Column:
        column = Column("x", "m")
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(nonsense)) as http:
            await run_column(http, column)
        return column

    column = asyncio.run(go())
    # Those that only have to be answered at all; the parameters are told apart by warnings, which are missing here.
    assert {name for name, cell in column.cells.items() if cell.state == "pass"} == {"chat_prefill", "tool_result"}
    assert all(cell.reason for cell in column.cells.values() if cell.state == "fail")


def test_a_typed_refusal_is_told_from_a_failure() -> None:
    bodies = [
        (400, {"error": {"message": "no", "code": "unsupported_parameter"}}, Unsupported),
        (400, {"error": "x makes no embeddings.", "code": "unsupported_parameter"}, Unsupported),
        (400, {"error": {"message": "no", "code": 400, "name": "unsupported_parameter"}}, Unsupported),
        (400, {"detail": {"msg": "no", "type": "unsupported_parameter"}}, Unsupported),
        (500, {"error": {"message": "no", "code": "internal_error"}}, Failed),
    ]

    async def go() -> None:
        for status, body, kind in bodies:
            transport = httpx.MockTransport(lambda request, status=status, body=body: httpx.Response(status, json=body))
            async with httpx.AsyncClient(base_url="http://x", transport=transport) as http:
                with pytest.raises(kind):
                    await Api(http, "m").get("/")

    asyncio.run(go())


def test_the_table_names_every_reason() -> None:
    first, second = Column("one", "m"), Column("two", "m", error="out of memory")
    first.cells = {"chat": Cell("pass", "", 1), "embeddings": Cell("fail", "too short", 1)}
    text = table([first, second])
    assert "Embeddings: vectors as numbers and as base64: too short" in text and "two could not load m: out of memory" in text
    assert report([first, second])["columns"][1]["error"] == "out of memory"

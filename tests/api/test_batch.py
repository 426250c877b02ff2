"""Batches over a real server and from the command line: killed in the middle, gone on with, nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.api.conftest import Server

# Half a second each, 256 at once: 400 of them take two waves.
SLOW = "[[echo tokens=10 rate=20]] line"


def requests(count: int, text: str = "line") -> str:
    lines = []
    for n in range(count):
        body = {"model": "anything", "messages": [{"role": "user", "content": f"{text} {n}"}]}
        lines.append(json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    return "\n".join(lines) + "\n"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def upload(server: Server, text: str, name: str = "my file.jsonl") -> str:
    batch = server.http.post("/ui-api/batches", json={"name": name}).json()["id"]
    half = len(text) // 2
    for offset, piece in ((0, text[:half]), (half, text[half:]), (half, text[half:])):  # a page may ask twice
        answer = server.http.post(f"/ui-api/batches/{batch}/input", json={"text": piece, "offset": offset})
        assert answer.status_code == 200, answer.text
    return str(batch)


def view(server: Server, batch: str) -> dict[str, Any]:
    return dict(server.http.get(f"/ui-api/batches/{batch}").json())


def until(server: Server, batch: str, *states: str) -> dict[str, Any]:
    server.until(lambda: view(server, batch)["state"] in states, f"in state {states}")
    return view(server, batch)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SWITCHYARD_") or k == "SWITCHYARD_SET"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        words = [sys.executable, "server.py", "batch", *arguments, "--model", "echo", "--user-data-dir", str(tmp_path / "data")]
        return subprocess.Popen(
            words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )

    return start


def test_a_killed_batch_goes_on(tmp_path: Path, command: Callable[..., subprocess.Popen[str]]) -> None:
    source, target = tmp_path / "in put.jsonl", tmp_path / "öut.jsonl"
    source.write_text(requests(400, SLOW) + "broken\n", encoding="utf-8")
    first = command(str(source), str(target))
    due = time.monotonic() + 120
    while lines_in(target) < 20 and time.monotonic() < due:
        time.sleep(0.005)
    first.kill()
    first.communicate()
    there = lines_in(target)
    assert 20 <= there < 401
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_torn", "custom_id": "r39')
    second = command(str(source), str(target))
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1 and "400 answered, 1 with errors" in output
    found = records(target)
    assert sorted(item["line"] for item in found) == list(range(1, 402))
    assert [item["line"] for item in found if item["error"]] == [401]
    assert {item["custom_id"] for item in found} == {f"r{n}" for n in range(400)} | {None}


def test_what_the_command_refuses(tmp_path: Path, command: Callable[..., subprocess.Popen[str]]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(requests(2), encoding="utf-8")
    for arguments, words in (
        ((str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")), "no batch file none.jsonl"),
        ((str(source), str(source)), "written over the input"),
    ):
        process = command(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and words in output and "Traceback" not in output
    assert source.read_text(encoding="utf-8") == requests(2)


# --- the server --------------------------------------------------------------------------------------------------


def test_a_batch_from_upload_to_results(server: Server) -> None:
    batch = upload(server, requests(5, "hello wörld 🙂") + "broken\n")
    assert view(server, batch)["state"] == "uploading"
    assert server.http.get(f"/ui-api/batches/{batch}/results").status_code == 404
    assert server.http.post(f"/ui-api/batches/{batch}/start", json={}).json()["model"] == "echo"
    done = until(server, batch, "done")
    assert (done["lines"], done["done"], done["failed"], done["problem"]) == (6, 6, 1, None)
    answer = server.http.get(f"/ui-api/batches/{batch}/results")
    assert "my%20file-results.jsonl" in answer.headers["content-disposition"]
    found = {item["custom_id"]: item for item in map(json.loads, answer.text.splitlines())}
    body = found["r3"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "hello wörld 🙂 3" and body["model"] == "echo"
    assert server.http.post(f"/ui-api/batches/{batch}/input", json={"text": "x", "offset": 0}).status_code == 409
    assert server.http.delete(f"/ui-api/batches/{batch}").status_code == 200
    assert server.http.get(f"/ui-api/batches/{batch}").status_code == 404
    server.oracle()


@pytest.mark.parametrize("batch", ["batch_000000000000000000000000", "..%2f..", "batch_x"])
def test_a_batch_that_is_not_there(server: Server, batch: str) -> None:
    for method, path in (("GET", ""), ("GET", "/results"), ("POST", "/start"), ("DELETE", "")):
        assert server.http.request(method, f"/ui-api/batches/{batch}{path}").status_code == 404


def test_a_file_that_is_no_batch(server: Server) -> None:
    for text, words in (("no\njson\n", "Line 1 is no valid JSON"), ("\n\n", "holds no requests")):
        batch = upload(server, text)
        answer = server.http.post(f"/ui-api/batches/{batch}/start", json={})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        server.http.delete(f"/ui-api/batches/{batch}")


def test_a_chat_goes_on_beside_a_batch_that_is_paused_and_gone_on_with(server: Server) -> None:
    batch = upload(server, requests(600, SLOW))
    server.http.post(f"/ui-api/batches/{batch}/start", json={})
    until(server, batch, "running")
    assert server.chat("ping").json()["choices"][0]["message"]["content"] == "ping"
    assert server.http.delete(f"/ui-api/batches/{batch}").status_code == 409
    server.until(lambda: view(server, batch)["done"] > 0, "some done")
    paused = server.http.post(f"/ui-api/batches/{batch}/pause").json()
    assert paused["state"] == "paused" and 0 < paused["done"] < 600
    for _ in range(5):  # each stop and the end it brings about save at once
        assert server.http.post(f"/ui-api/batches/{batch}/start", json={}).status_code == 200
        assert server.http.post(f"/ui-api/batches/{batch}/pause").status_code == 200
    server.http.post(f"/ui-api/batches/{batch}/start", json={})
    assert until(server, batch, "done")["done"] == 600
    text = server.http.get(f"/ui-api/batches/{batch}/results").text
    assert sorted(json.loads(line)["line"] for line in text.splitlines()) == list(range(1, 601))
    server.http.delete(f"/ui-api/batches/{batch}")


def test_a_killed_server_leaves_a_batch_that_goes_on(launch: Callable[..., Server]) -> None:
    first = launch().wait_ready()
    batch = upload(first, requests(400, SLOW))
    first.http.post(f"/ui-api/batches/{batch}/start", json={})
    first.until(lambda: view(first, batch)["done"] > 0, "some done")
    first.process.kill()
    first.process.wait()
    second = launch(data=first.data).wait_ready()
    found = view(second, batch)
    assert found["state"] == "paused" and "server was stopped" in found["problem"]
    second.http.post(f"/ui-api/batches/{batch}/start", json={})
    assert until(second, batch, "done")["done"] == 400
    text = second.http.get(f"/ui-api/batches/{batch}/results").text
    assert sorted(json.loads(line)["line"] for line in text.splitlines()) == list(range(1, 401))


def test_an_unloaded_model_pauses_its_batch(launch: Callable[..., Server]) -> None:
    server = launch().wait_ready()
    batch = upload(server, requests(600, SLOW))
    server.http.post(f"/ui-api/batches/{batch}/start", json={})
    server.until(lambda: view(server, batch)["done"] > 0, "some done")
    server.http.post("/ui-api/models/unload", json={})
    found = until(server, batch, "paused")
    assert "unloaded" in found["problem"] and found["failed"] == 0
    answer = server.http.post(f"/ui-api/batches/{batch}/start", json={})
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "no_model_loaded"

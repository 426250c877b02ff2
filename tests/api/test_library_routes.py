"""The Models page's routes on a real server: downloads over a kill, files renamed and trashed, settings, the trash's limits."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.hub_server import SMALL_LLAMA, FakeHub

if TYPE_CHECKING:
    from tests.api.conftest import Server

FILES = {
    **SMALL_LLAMA,
    "model.bin": b"\x80\x02pickle",
    "m-Q4_K_M.gguf": b"GGUF" * 1000,
    "m-Q8_0.gguf": b"GGUF" * 2000,
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(FILES)) as server:
        yield server
        if server.faults.hold is not None:
            server.faults.hold.set()


def job(server: Server, job_id: str) -> dict[str, Any]:
    return dict(server.http.get(f"/ui-api/downloads/{job_id}").json()["job"])


def test_a_download_outlives_a_kill_of_the_server(hub: FakeHub, launch: Callable[..., Server], tmp_path: Path) -> None:
    models, data = tmp_path / "models ü", tmp_path / "data"
    flags = ("--model-dir", str(models), "--hub-endpoint", hub.url)
    gate = hub.faults.hold = threading.Event()
    first = launch(*flags, model=None, data=data)
    started = first.http.post("/v1/internal/model/download", json={"repository": "owner/name"}).json()
    folder = models / "owner_name"
    first.until(lambda: any(part.stat().st_size > 100_000 for part in folder.glob(".model*.part")), "half there")
    assert first.http.post("/v1/internal/model/load", json={"model_name": "owner_name"}).status_code in (404, 422)
    first.process.kill()
    first.process.wait()
    assert not (folder / "model.safetensors").exists()
    gate.set()
    second = launch(*flags, model=None, data=data)
    second.until(lambda: job(second, started["id"])["state"] in ("done", "failed"), "taken up again")
    assert job(second, started["id"])["error"] is None
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert any("range" in headers for path, headers in hub.file_requests() if "model.safetensors" in path)
    listed = second.http.get("/v1/internal/model/downloads").json()["downloads"]
    assert [entry["id"] for entry in listed] == [started["id"]]


def test_the_page_looks_fetches_renames_and_deletes(hub: FakeHub, launch: Callable[..., Server], tmp_path: Path) -> None:
    models = tmp_path / "models"
    server = launch("--model-dir", str(models), "--hub-endpoint", hub.url, model=None)
    http = server.http
    seen = http.post("/ui-api/downloads/look", json={"repository": "owner/name", "branch": "main"}).json()
    assert [variant["label"] for variant in seen["variants"]] == ["safetensors", "Q4_K_M", "Q8_0"]
    assert all(variant["verdict"]["level"] in ("fits", "tight", "no") for variant in seen["variants"])
    assert "pickle" in seen["skipped"]["model.bin"] and "model.bin" not in seen["chosen"]
    assert http.post("/ui-api/downloads/revisions", json={"repository": "owner/name"}).json()["revisions"] == ["main", "4.0bpw"]

    begun = http.post("/ui-api/downloads", json={"repository": "owner/name", "commit": seen["commit"]}).json()["job"]
    server.until(lambda: job(server, begun["id"])["state"] == "done", "fetched")
    row = next(model for model in http.get("/ui-api/models").json()["models"] if model["id"] == "owner_name")
    assert row["plain"] is True and row["path"] == "owner_name"

    options = {"model": "owner_name", "loader": "transformers", "options": {"load_in_4bit": True}}
    assert http.put("/ui-api/models/settings", json=options).status_code == 200
    bad = http.put("/ui-api/models/settings", json={**options, "options": {"load_in_4bit": "yes"}})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "load_in_4bit")
    assert http.post("/ui-api/models/rename", json={"model": "owner_name", "name": "../x"}).status_code == 400
    assert http.post("/ui-api/models/rename", json={"model": "owner_name", "name": "mine"}).json() == {"model": "mine"}
    assert http.get("/ui-api/models/settings?model=mine").json()["options"] == {"transformers": {"load_in_4bit": True}}
    assert http.get("/ui-api/models/settings?model=owner_name").json() == {"loader": None, "options": {}}

    entry = http.post("/ui-api/models/trash", json={"model": "mine"}).json()["entry"]
    assert all(model["id"] != "mine" for model in http.get("/ui-api/models").json()["models"])
    assert [item["model"] for item in http.get("/ui-api/trash").json()["entries"]] == ["mine"]
    assert http.post(f"/ui-api/trash/{entry['id']}/restore").json() == {"model": "mine"}
    http.post("/ui-api/models/trash", json={"model": "mine"})
    assert http.delete("/ui-api/trash").json()["freed_bytes"] > 0
    assert http.get("/ui-api/trash").json()["entries"] == [] and not (models / "mine").exists()


def test_what_is_in_use_stays(server: Server) -> None:
    for path, body in (("rename", {"model": "echo", "name": "x"}), ("trash", {"model": "echo"})):
        answer = server.http.post(f"/ui-api/models/{path}", json=body)
        assert answer.status_code == 409, answer.text
    assert server.http.post("/ui-api/models/trash", json={"model": "nobody"}).status_code == 404


def test_the_token_goes_in_and_never_comes_out(hub: FakeHub, launch: Callable[..., Server], tmp_path: Path) -> None:
    server = launch("--hub-endpoint", hub.url, model=None, data=tmp_path / "data")
    kept = server.http.put("/ui-api/downloads/hub", json={"token": "hf_topsecret"})
    assert kept.json()["hub"]["token"] == "saved" and "topsecret" not in kept.text
    server.http.post("/ui-api/downloads/look", json={"repository": "owner/name"})
    assert {headers.get("authorization") for _, headers in hub.requests} == {"Bearer hf_topsecret"}
    file = tmp_path / "data" / "hub.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "topsecret" not in server.http.get("/ui-api/downloads").text
    refused = server.http.put("/ui-api/downloads/hub", json={"endpoint": "file:///etc/passwd"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "endpoint")
    server.process.terminate()
    server.process.wait(30)
    assert "topsecret" not in "".join(server.lines) + server.rest()


def test_another_products_settings_are_read(server: Server) -> None:
    text = "echo$:\n  loader: Echo\n  load_seconds: 0.5\n  unknown: 1\nnobody:\n  loader: llama.cpp\n"
    answer = server.http.post("/ui-api/models/settings/import", json={"text": text}).json()
    assert [(entry["model"], entry["loader"]) for entry in answer["saved"]] == [("echo", "echo")]
    assert {entry["what"] for entry in answer["skipped"]} == {"nobody", "echo: unknown"}
    assert server.http.get("/ui-api/models/settings?model=echo").json()["options"]["echo"] == {"load_seconds": 0.5}
    assert server.http.delete("/ui-api/models/settings?model=echo").status_code == 200
    assert server.http.get("/ui-api/models/settings?model=echo").json()["options"] == {}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/ui-api/downloads", {}),
        ("POST", "/ui-api/downloads", {"repository": "a/b", "files": "x"}),
        ("POST", "/ui-api/downloads", {"repository": "a/b", "files": [1]}),
        ("POST", "/ui-api/downloads", {"repository": "../../etc"}),
        ("POST", "/ui-api/downloads", {"repository": "a/b", "commit": "../x"}),
        ("POST", "/ui-api/downloads/look", {"repository": "a/b", "branch": "x y"}),
        ("POST", "/ui-api/downloads/nobody/pause", {}),
        ("DELETE", "/ui-api/downloads/nobody", None),
        ("POST", "/ui-api/conversions", {"model": "echo"}),
        ("POST", "/ui-api/conversions", {"model": "echo", "type": "Q99"}),
        ("DELETE", "/ui-api/trash/..%2f..", None),
        ("POST", "/ui-api/models/settings/import", {"text": "a: ["}),
        ("PUT", "/ui-api/models/settings", {"model": "echo", "loader": "nobody"}),
        ("PUT", "/ui-api/models/settings", {"model": "echo", "loader": "echo", "options": {"nope": 1}}),
    ],
)
def test_bad_bodies_are_refused(server: Server, method: str, path: str, body: dict[str, Any] | None) -> None:
    answer = server.http.request(method, path, json=body)
    assert answer.status_code in (400, 404, 405), answer.text
    assert "error" in answer.json() and "Traceback" not in answer.text

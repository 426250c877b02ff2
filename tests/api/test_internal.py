"""text-generation-webui's own addresses, and the queue."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Server

PREFIX = "/v1/internal"


def post(server: Server, path: str, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    return server.http.post(PREFIX + path, json=body, headers=headers)


def test_text(server: Server) -> None:
    encoded = post(server, "/encode", {"text": "hello there"}).json()
    assert encoded["length"] == len(encoded["tokens"]) > 0
    assert post(server, "/decode", {"tokens": encoded["tokens"]}).json() == {"text": "hello there"}
    assert post(server, "/token-count", {"text": "hello there"}).json() == {"length": encoded["length"]}
    prompt = post(server, "/chat-prompt", {"messages": [{"role": "user", "content": "hi"}]}).json()["prompt"]
    assert prompt == "<|user|>\nhi\n<|assistant|>\n"
    assert post(server, "/decode", {"tokens": [-1]}).json()["error"]["param"] == "tokens"
    assert post(server, "/logits", {"prompt": "x"}).json()["error"]["code"] == "unsupported_parameter"


def test_models(server: Server) -> None:
    assert server.http.get(PREFIX + "/health").json() == {"status": "ok"}
    assert server.http.get(PREFIX + "/model/info").json() == {"model_name": "echo", "lora_names": [], "loader": "echo"}
    listed = server.http.get(PREFIX + "/model/list").json()
    assert "echo" in listed["model_names"]
    echo = next(model for model in listed["models"] if model["id"] == "echo")
    assert {"format", "size_bytes", "quantization", "context_length", "license", "has_chat_template"} <= echo.keys()
    why = {loader["name"]: (loader["ok"], loader["reason"]) for loader in echo["loaders"]}
    assert why["echo"] == (True, None) and why["llamacpp"][0] is False and "GGUF" in why["llamacpp"][1]
    assert server.http.get(PREFIX + "/lora/list").json()["lora_names"] == []
    assert post(server, "/lora/load", {"lora_names": ["x"]}).json()["error"]["code"] == "unsupported_parameter"
    assert post(server, "/model/load", {"model_name": "no such"}).status_code == 404


def test_load_and_unload(launch: Callable[..., Server]) -> None:
    server = launch(model=None)
    answer = post(server, "/model/load", {"model_name": "echo", "args": {"loader": "Echo", "n_ctx": 512, "wbits": 4}})
    assert (answer.status_code, answer.json()) == (200, "OK")
    assert "wbits is no option of Echo" in answer.headers["X-Switchyard-Warnings"]
    assert server.http.get("/props").json()["default_generation_settings"]["n_ctx"] == 512
    assert server.chat("hello").status_code == 200
    assert post(server, "/model/unload").json() == "OK"
    assert server.http.get(PREFIX + "/model/info").json()["model_name"] == "None"
    assert post(server, "/encode", {"text": "x"}).json()["error"]["code"] == "no_model_loaded"
    assert post(server, "/model/load", {"model_name": "echo", "args": {"loader": "nothing"}}).status_code == 400
    assert (
        post(server, "/model/load", {"model_name": "echo", "args": {"n_ctx": "big"}}).json()["error"]["param"] == "context_length"
    )


def test_loras_are_names_below_their_folder(launch: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "loras" / "kind").mkdir(parents=True)
    server = launch("--lora-dir", str(tmp_path / "loras")).wait_ready()
    assert server.http.get(PREFIX + "/lora/list").json() == {"lora_names": ["kind"]}
    assert post(server, "/lora/unload").json()["error"]["code"] == "unsupported_parameter"  # echo takes none


def test_stop_is_per_request(server: Server) -> None:
    """By the id of the answer; without an id, only what the same program began."""
    results: dict[str, Any] = {}
    ids: dict[str, str] = {}

    def run(name: str) -> None:
        body = {"messages": [{"role": "user", "content": "[[echo tokens=400 rate=100]]"}], "stream": True, "max_tokens": 400}
        text = ""
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers={"User-Agent": name}, timeout=60
        ) as answer:
            ids[name] = answer.headers["x-request-id"]
            for line in answer.iter_lines():
                text += line
        results[name] = text

    threads = {name: threading.Thread(target=run, args=(name,)) for name in ("by-id", "by-program", "untouched")}
    for thread in threads.values():
        thread.start()

    def running() -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = server.http.get(PREFIX + "/queue").json()["running"]
        return [entry for entry in entries if entry["completion_tokens"] > 2]

    server.until(lambda: len(running()) == 3, "running")
    assert {entry["id"] for entry in running()} == set(ids.values())
    assert post(server, "/stop-generation", {"id": f"chatcmpl-{ids['by-id']}"}).json() == "OK"
    threads["by-id"].join(30)
    assert post(server, "/stop-generation", **{"User-Agent": "by-program"}).json() == "OK"
    threads["by-program"].join(30)
    assert not threads["by-id"].is_alive() and not threads["by-program"].is_alive()
    threads["untouched"].join(60)
    assert '"completion_tokens":400' in results["untouched"].replace(" ", "")
    assert '"completion_tokens":400' not in (results["by-id"] + results["by-program"]).replace(" ", "")


def test_the_queue_is_told(launch: Callable[..., Server]) -> None:
    server = launch().wait_ready()
    queue = server.http.get(PREFIX + "/queue").json()
    assert queue["running"] == [] and queue["queued"] == []
    assert queue["models"] == [{"model": "echo", "state": "ready", "active": 0, "queued": 0}]


def test_ask_lets_the_request_go_on_after_a_yes(launch: Callable[..., Server]) -> None:
    server = launch("--model-switch", "ask", model=None)
    answers: list[httpx.Response] = []
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60))

    def asked() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = server.http.get("/ui-api/models").json()["asked"]
        return found

    for approved, status in ((False, 409), (True, 200)):
        thread = threading.Thread(target=ask)
        thread.start()
        server.until(lambda: asked() == [{"model": "echo", "waiting": 1}], "asked")
        assert server.http.post("/ui-api/models/approve", json={"model": "echo", "approved": approved}).status_code == 200
        thread.join(30)
        assert answers.pop().status_code == status and asked() == []
    assert server.http.post("/ui-api/models/approve", json={"model": "echo", "approved": True}).status_code == 404


def test_what_fits_here(server: Server) -> None:
    answer = server.http.get(PREFIX + "/model/plan", params={"model": "wren-6m"})
    assert answer.status_code == 200
    plan = answer.json()
    assert plan["model"] == "wren-6m" and plan["machine"]["ram_bytes"] > 0
    assert {"transformers"} <= {fit["loader"] for fit in plan["fits"]}
    assert plan["nearest"] is None or plan["nearest"]["fits"]
    assert server.http.get("/ui-api/models/plan", params={"model": "wren-6m"}).json()["fits"][0].keys() == plan["fits"][0].keys()
    assert server.http.get(PREFIX + "/model/plan", params={"model": "no such"}).status_code == 404
    assert server.http.get(PREFIX + "/model/plan").status_code in (400, 422)


def test_loading_anyway_is_yes_or_no(server: Server) -> None:
    assert post(server, "/model/load", {"model_name": "echo", "anyway": "yes"}).status_code == 400
    assert server.http.post("/ui-api/models/load", json={"model": "echo", "anyway": "yes"}).status_code == 400

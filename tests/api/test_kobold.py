"""KoboldAI's API as KoboldCpp's clients use it. There is no client package; the bodies are those that its clients send."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Server

LITE: dict[str, Any] = {  # what KoboldAI Lite sends
    "n": 1,
    "max_context_length": 4096,
    "max_length": 40,
    "rep_pen": 1.05,
    "temperature": 0.75,
    "top_p": 0.92,
    "top_k": 100,
    "top_a": 0,
    "typical": 1,
    "tfs": 1,
    "rep_pen_range": 360,
    "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "memory": "",
    "trim_stop": True,
    "min_p": 0,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0,
    "nsigma": 0,
    "banned_tokens": [],
    "render_special": False,
    "logprobs": False,
    "presence_penalty": 0,
    "logit_bias": {},
    "stop_sequence": ["\n### Instruction:"],
    "use_default_badwordsids": False,
    "bypass_eos": False,
    "quiet": True,
}


def events(server: Server, **body: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", "/api/extra/generate/stream", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def test_what_is_there(server: Server) -> None:
    get = server.http.get
    assert get("/api/v1/model").json() == {"result": "koboldcpp/echo"}
    assert get("/api/v1/info/version").json()["result"] == "1.2.5"
    assert get("/api/extra/version").json()["result"] == "KoboldCpp"
    assert get("/api/extra/true_max_context_length").json() == {"value": 8192}
    assert get("/api/v1/config/max_context_length").json() == {"value": 8192}
    assert get("/api/v1/config/max_length").json()["value"] > 0
    assert get("/api/v1/config/soft_prompts_list").json() == {"values": []}


def test_generate(server: Server) -> None:
    answer = server.http.post("/api/v1/generate", json={**LITE, "prompt": "once upon a time", "genkey": "KCPP1"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    result = body["results"][0]
    assert result["text"] and result["finish_reason"] in ("stop", "length") and result["completion_tokens"] > 0
    assert "rep_pen_slope: has no effect here." in body["warnings"] and body["receipt"]["loader"] == "echo"
    perf = server.http.get("/api/extra/perf").json()
    assert perf["last_token_count"] == result["completion_tokens"] and perf["idle"] == 1 and perf["total_gens"] > 0


def test_a_stream(server: Server) -> None:
    parts = events(server, prompt="once upon a time", max_length=30, genkey="KCPP2")
    whole = server.http.post("/api/v1/generate", json={"prompt": "once upon a time", "max_length": 30}).json()
    assert "".join(part["token"] for part in parts) == whole["results"][0]["text"]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["finish_reason"] in ("stop", "length") and parts[-1]["receipt"]


def test_memory_comes_before_the_prompt(server: Server) -> None:
    with_memory = server.http.post("/api/v1/generate", json={"prompt": " b", "memory": "a", "max_length": 9}).json()
    plain = server.http.post("/api/v1/generate", json={"prompt": "a b", "max_length": 9}).json()
    assert with_memory["results"][0]["text"] == plain["results"][0]["text"]


def test_abort_stops_only_what_it_names(server: Server) -> None:
    results: dict[str, dict[str, Any]] = {}

    def run(key: str) -> None:
        body = {"prompt": "[[echo tokens=400 rate=100]]", "max_length": 400, "genkey": key}
        results[key] = httpx.post(f"{server.url}/api/v1/generate", json=body, timeout=60).json()["results"][0]

    threads = [threading.Thread(target=run, args=(key,)) for key in ("stay", "stop")]
    for thread in threads:
        thread.start()

    def check() -> str:
        return str(server.http.post("/api/extra/generate/check", json={"genkey": "stop"}).json()["results"][0]["text"])

    server.until(lambda: bool(check()), "text")
    assert server.http.post("/api/extra/abort", json={"genkey": "nobody"}).json()["success"] == "false"
    assert server.http.post("/api/extra/abort", json={"genkey": "stop"}).json()["success"] == "true"
    for thread in threads:
        thread.join(60)
    assert results["stay"]["completion_tokens"] == 400
    assert 0 < results["stop"]["completion_tokens"] < 400 and results["stop"]["text"]


def test_tokens(server: Server) -> None:
    counted = server.http.post("/api/extra/tokencount", json={"prompt": "hello there"}).json()
    assert counted["value"] == len(counted["ids"]) > 0
    text = server.http.post("/api/extra/detokenize", json={"ids": counted["ids"]}).json()
    assert text == {"result": "hello there", "success": True}


def test_grammar(server: Server) -> None:
    body = {"prompt": "x", "grammar": 'root ::= "yes" | "no"', "max_length": 20}
    assert server.http.post("/api/v1/generate", json=body).json()["results"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/generate", {}),
        ("/api/v1/generate", {"prompt": "x", "max_length": 0}),
        ("/api/v1/generate", {"prompt": "x", "sampler_order": [9]}),
        ("/api/v1/generate", {"prompt": "x", "temperature": "hot"}),
        ("/api/v1/generate", {"prompt": "x", "n": 99}),
        ("/api/extra/detokenize", {"ids": [-1]}),
        ("/api/extra/tokencount", {"prompt": 5}),
    ],
)
def test_bad_bodies(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    assert set(answer.json()["detail"]) == {"type", "msg", "param"}


def test_a_failure_in_mid_stream_is_an_error_event(server: Server) -> None:
    parts = events(server, prompt="[[echo tokens=50 error_at=3]] words")
    assert parts[-1]["detail"]["type"] == "generation_failed"

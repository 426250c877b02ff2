"""Another copy of this server as a backend, over real HTTP: chat, tools, cancel, its death, and who may save one."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Server
from tests.certificates import Authority
from tests.unit.far_server import Handler, far_server
from tests.unit.proxy_server import proxy_server

KEY = "far-away-key"
MODEL = "remote/far/echo"
Launch = Callable[..., Server]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """(near, far): the far one needs a key, and the near one knows it."""
    far = Server(tmp_path_factory.mktemp("far"), "--api-key", KEY)
    near = Server(tmp_path_factory.mktemp("near"))
    try:
        far.http.headers["Authorization"] = f"Bearer {KEY}"
        near.wait_ready()
        made = near.http.post("/v1/internal/remotes", json={"name": "far", "url": far.url, "key": KEY})
        assert made.status_code == 200, made.text
        assert MODEL in made.json()["server"]["models"] and made.json()["server"]["state"] == "ready"
        yield near, far
    finally:
        assert near.stop() == 0
        assert far.stop() == 0
        assert KEY not in "".join(near.lines), "the key is in the log"


def test_its_models_are_listed(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    listed = {m["id"]: m for m in near.http.get("/v1/models").json()["data"]}
    assert listed[MODEL]["format"] == "remote" and listed[MODEL]["context_length"] == 8192
    [row] = near.http.get("/ui-api/remotes").json()["servers"]
    assert row["state"] == "ready" and row["latency_ms"] > 0 and row["has_key"] and KEY not in json.dumps(row)
    assert near.http.post("/ui-api/remotes/far/test").json()["server"]["state"] == "ready"


def test_chat_whole_and_streamed(pair: tuple[Server, Server]) -> None:
    near, far = pair
    body = near.chat("Grüße 🙂", model=MODEL, temperature=0.5, num_beams=2).json()
    assert body["choices"][0]["message"]["content"] == "Grüße 🙂" and body["usage"]["completion_tokens"] > 2
    assert any("num_beams" in warning for warning in body["warnings"]), "the far side's own receipt"
    items = [i for i in near.stream("one two three", model=MODEL) if isinstance(i, dict)]
    assert "".join(i["choices"][0]["delta"].get("content", "") for i in items) == "one two three"
    raw = near.http.post("/v1/completions", json={"model": MODEL, "prompt": "raw text", "max_tokens": 50}).json()
    direct = far.http.post("/v1/completions", json={"model": "echo", "prompt": "raw text", "max_tokens": 50}).json()
    assert raw["choices"][0]["text"] == direct["choices"][0]["text"]
    assert raw["usage"] == direct["usage"]


def test_tools_and_forms(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    schema = {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    message = near.chat("weather?", model=MODEL, tools=[tool], tool_choice="required").json()["choices"][0]
    [call] = message["message"]["tool_calls"]
    assert message["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    formed = near.chat("x", model=MODEL, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert json.loads(formed.json()["choices"][0]["message"]["content"]) == {"city": "Paris"}


def test_tokens_and_counts(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    tokens = near.http.post("/tokenize", json={"content": "a b", "model": MODEL}).json()["tokens"]
    assert near.http.post("/detokenize", json={"tokens": tokens, "model": MODEL}).json()["content"] == "a b"
    counted = near.http.post("/v1/internal/token-count", json={"text": "a b", "model": MODEL}).json()
    assert counted["length"] == len(tokens)
    ids = near.http.post(
        "/v1/completions", json={"model": MODEL, "prompt": tokens, "max_tokens": 2, "return_token_ids": True}
    ).json()["choices"][0]["token_ids"]
    assert ids == tokens[:2]


def test_what_is_too_long_is_refused_with_its_reason(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    refused = near.http.post("/v1/completions", json={"model": MODEL, "prompt": "word " * 9000})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    near.oracle()


def test_stopping_here_stops_there(pair: tuple[Server, Server]) -> None:
    near, far = pair
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "[[echo tokens=8000 rate=50]]"}]}
    with near.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        seen = next(line for line in lines if '"content":' in line and '"content":""' not in line)
        assert seen
        assert len(far.http.get("/v1/internal/queue").json()["running"]) == 1
    far.until(lambda: far.http.get("/v1/internal/queue").json()["running"] == [], "idle")
    near.until(lambda: near.http.get("/v1/internal/queue").json()["running"] == [], "idle")
    near.oracle()


def test_two_answers_at_once(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = near.chat(f"number {number}", model=MODEL).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {number: f"number {number}" for number in range(8)}


def test_a_far_server_that_dies_in_mid_stream(launch: Launch) -> None:
    far = launch()
    near = launch().wait_ready()
    near.http.post("/ui-api/remotes", json={"name": "far", "url": far.url}).raise_for_status()
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "[[echo tokens=8000 rate=50]]"}]}
    items: list[Any] = []
    with near.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                items.append(json.loads(line[6:]))
                if len(items) == 4:
                    far.process.kill()
                    far.process.wait(30)
    assert items[-1]["error"]["code"] == "remote_error", items[-1]
    assert "far" in items[-1]["error"]["message"] and "choices" in items[3], "the text before it stays"
    again = near.chat("hello", model=MODEL)
    assert again.status_code == 502 and again.json()["error"]["code"] == "remote_error"
    assert near.http.post("/ui-api/remotes/far/test").json()["server"]["state"] == "failed"
    assert near.chat("still here", model="echo").status_code == 200


def test_chat_with_a_server_of_an_own_authority_behind_a_proxy(launch: Launch, tmp_path: Path) -> None:
    """The whole way: saved over HTTP, read by the worker, tunnelled, trusted; and no password on any of it."""
    authority = Authority()

    def answer(handler: Handler) -> None:
        handler.begin()
        handler.piece(delta={"content": "from afar"}, finish_reason="stop")
        handler.data(b"[DONE]")

    with far_server(authority.server(tmp_path, "127.0.0.1")) as far, proxy_server() as proxy:
        far.routes["/v1/chat/completions"] = answer
        proxy.user = "me:tunnel-s3cret"
        near = launch("--verbose").wait_ready()
        body = {"name": "far", "url": far.url, "ca": authority.pem, "proxy": proxy.url(proxy.user)}
        made = near.http.post("/v1/internal/remotes", json=body)
        row = made.json()["server"]
        assert row["state"] == "ready" and row["has_ca"] and row["proxy"] == proxy.url() and not row["proxy_resolves"], made.text
        reply = near.chat("hello", model="remote/far/m")
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == "from afar", reply.text
        assert {target for _, target in proxy.asked} == {f"127.0.0.1:{far.server_port}"}
        shown = made.text + near.http.get("/v1/internal/remotes").text + near.http.get("/ui-api/models").text
        bad = near.http.post(
            "/v1/internal/remotes", json={**body, "name": "bad", "proxy": "socks5://me:tunnel-s3cret@127.0.0.1:1"}
        )
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "proxy"
        assert near.stop() == 0
    logs = [path.read_text(encoding="utf-8") for path in near.data.glob("logs/*")]
    assert logs and "s3cret" not in "".join([shown, bad.text, *near.lines, *logs])


def test_only_the_operator_saves_servers(launch: Launch) -> None:
    server = launch("--api-key", "user", "--admin-key", "boss")
    body = {"name": "x", "url": "http://127.0.0.1:9/v1", "key": KEY}
    for prefix in ("/ui-api/remotes", "/v1/internal/remotes"):
        user, boss = ({"Authorization": f"Bearer {key}"} for key in ("user", "boss"))
        assert server.http.post(prefix, json=body).status_code == 401
        assert server.http.post(prefix, json=body, headers=user).status_code == 403
        assert server.http.delete(f"{prefix}/x", headers=user).status_code == 403
        made = server.http.post(prefix, json=body, headers=boss)
        assert made.status_code == 200 and made.json()["server"]["state"] == "failed" and KEY not in made.text
        assert server.http.post(prefix, json=body, headers=boss).status_code == 409
        assert KEY not in server.http.get(prefix, headers=boss).text
        assert server.http.delete(f"{prefix}/x", headers=boss).json()["servers"] == []
        assert server.http.delete(f"{prefix}/x", headers=boss).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {}, {"name": "x"}, {"name": "x", "url": 3}, {"name": "../x", "url": "http://127.0.0.1:9"}, {"name": "x", "url": "file:///x"},
        {"name": "x", "url": "http://127.0.0.1:9", "kind": "skynet"}, {"name": "x", "url": "http://127.0.0.1:9", "reach": 0},
        {"name": "x", "url": "http://127.0.0.1:9", "key": "a\nb"},
    ],
)  # fmt: skip
def test_a_bad_body_saves_nothing(server: Server, body: dict[str, Any]) -> None:
    assert server.http.post("/v1/internal/remotes", json=body).status_code == 400
    assert server.http.get("/v1/internal/remotes").json()["servers"] == []


def test_metadata_addresses_are_refused_over_http(server: Server) -> None:
    refused = server.http.post("/v1/internal/remotes", json={"name": "x", "url": "http://169.254.169.254/latest"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "url"
    assert server.http.get("/v1/internal/remotes").json()["servers"] == []


def test_a_cross_site_page_saves_nothing(server: Server) -> None:
    headers = {"Origin": "http://evil.example"}
    answer = httpx.post(f"{server.url}/ui-api/remotes", json={"name": "x", "url": "http://127.0.0.1:9"}, headers=headers)
    assert answer.status_code == 403


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_files_of_the_servers_are_private(pair: tuple[Server, Server]) -> None:
    near, _ = pair
    path = Path(near.data) / "remotes.json"
    assert path.stat().st_mode & 0o077 == 0

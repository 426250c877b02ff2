"""Ollama's API with the real client."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import ollama
import pytest

from tests.unit.hub_server import FakeHub
from tests.unit.model_files import gguf_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.api.conftest import Server

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(client: ollama.Client, server: Server) -> None:
    assert "echo" in [model.model for model in client.list().models]
    running = client.ps().models
    assert [model.model for model in running] == ["echo"] and running[0].expires_at is not None
    shown = client.show("echo")
    assert shown.capabilities is not None and "completion" in shown.capabilities
    assert shown.modelinfo is not None and shown.modelinfo["echo.context_length"] == 8192
    assert client.show("echo:latest").template == shown.template
    assert server.http.get("/api/version").json()["version"].count(".") == 2


def test_chat(client: ollama.Client) -> None:
    answer = client.chat("echo", say("hello there"), options={"temperature": 0, "num_predict": 50, "num_ctx": 4096})
    assert answer.message.content == "hello there" and answer.done and answer.done_reason == "stop"
    assert answer.prompt_eval_count and answer.eval_count and answer.total_duration and answer.eval_duration is not None
    assert answer.model == "echo" and answer.created_at


def test_a_stream_is_lines_of_json(client: ollama.Client, server: Server) -> None:
    pieces = list(client.chat("echo", say("hello there, how are you?"), stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == "hello there, how are you?"
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    with server.http.stream("POST", "/api/chat", json={"model": "echo", "messages": say("a b")}) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"  # streaming is the default here
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"] is True and lines[-1]["receipt"]["loader"] == "echo"


def test_generate(client: ollama.Client) -> None:
    answer = client.generate("echo", "hello there", system="Be kind.")
    assert answer.response == "hello there" and answer.context
    again = client.generate("echo", "and now?", context=answer.context)
    assert again.context is not None and list(again.context[: len(answer.context)]) == list(answer.context)
    streamed = list(client.generate("echo", "one two three", stream=True, raw=True))
    assert "".join(piece.response for piece in streamed).strip() and streamed[-1].done


def test_options_reach_the_engine(server: Server) -> None:
    options = {"temperature": 0.5, "top_k": 7, "seed": 3, "num_predict": 2, "stop": ["zebra"], "num_ctx": 99}
    body = {"model": "echo", "messages": say("a b c d e f g h"), "options": options, "stream": False}
    answer = server.http.post("/api/chat", json=body).json()
    applied = answer["receipt"]["applied"]
    assert (applied["temperature"], applied["top_k"], answer["receipt"]["seed"]) == (0.5, 7, 3)
    assert answer["done_reason"] == "length" and answer["eval_count"] == 2
    assert "num_ctx: is set where the model is loaded." in answer["warnings"]


def test_tools(client: ollama.Client) -> None:
    answer = client.chat("echo", say(CALL), tools=[WEATHER])
    assert answer.message.tool_calls is not None
    call = answer.message.tool_calls[0].function
    assert (call.name, dict(call.arguments)) == ("weather", {"city": "Oslo"})
    history: list[Any] = [*say("weather?"), answer.message, {"role": "tool", "tool_name": "weather", "content": "rain"}]
    assert client.chat("echo", history, tools=[WEATHER]).done
    streamed = [p for p in client.chat("echo", say(CALL), tools=[WEATHER], stream=True) if p.message.tool_calls]
    assert len(streamed) == 1


def test_formats(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    text = client.chat("echo", say("x"), format=schema, options={"num_predict": 200}).message.content
    assert isinstance(json.loads(text or "")["n"], int)
    assert isinstance(json.loads(client.generate("echo", "x", format="json").response), dict)


def test_errors(client: ollama.Client, server: Server) -> None:
    with pytest.raises(ollama.ResponseError) as gone:
        client.chat("no such", say("x"))
    assert gone.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="top_k"):
        client.chat("echo", say("x"), options={"top_k": -5})
    with pytest.raises(ollama.ResponseError, match="makes no embeddings"):
        client.embed("echo", "x")
    for path, body in (
        ("/api/chat", {}),
        ("/api/generate", {"model": 5}),
        ("/api/chat", {"model": "echo", "keep_alive": "soon"}),
    ):
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400 and isinstance(answer.json()["error"], str)
    assert server.http.post("/api/create", json={"model": "x"}).json()["code"] == "not_supported"
    assert server.http.get("/api/nothing").json()["code"] == "not_found"
    assert client.pull("echo").status == "success"


def test_pull_and_delete(launch: Callable[..., Server], tmp_path: Path) -> None:
    files = {"tiny-Q8_0.gguf": gguf_bytes(), "tiny-F16.gguf": b"GGUF" * 100, "README.md": b"#"}
    with FakeHub(files) as hub:
        server = launch("--model-dir", str(tmp_path / "models"), "--hub-endpoint", hub.url, model=None)
        with ollama.Client(host=server.url) as client:
            name = "a.hub/owner/name:q8_0"
            lines = list(client.pull(name, stream=True))
            assert lines[0].status == "pulling manifest" and lines[-1].status == "success"
            assert all(line.completed <= line.total for line in lines if line.total and line.completed is not None)
            assert (tmp_path / "models/owner_name/tiny-Q8_0.gguf").read_bytes() == files["tiny-Q8_0.gguf"]
            assert not (tmp_path / "models/owner_name/tiny-F16.gguf").exists()
            asked = len(hub.requests)
            assert client.pull(name).status == "success" and len(hub.requests) == asked, "it is here already"
            assert client.show(name).capabilities is not None
            with pytest.raises(ollama.ResponseError, match="Q8_0"):
                client.pull("owner/name:Q2_K")
            with pytest.raises(ollama.ResponseError, match="OWNER/NAME"):
                client.pull("llama3.2")
            hub.faults.corrupt = 9
            with pytest.raises(ollama.ResponseError, match="twice"):
                list(client.pull("owner/other:f16", stream=True))
            assert client.delete(name).status == "success"
            with pytest.raises(ollama.ResponseError, match="no model"):
                client.delete(name)
        trashed = server.http.get("/ui-api/trash").json()["entries"]
        assert len(trashed) == 1 and trashed[0]["model"].startswith("owner_name")


def test_a_failure_in_mid_stream_is_an_error_line(server: Server) -> None:
    body = {"model": "echo", "messages": say("[[echo tokens=50 error_at=3]] words")}
    lines = [json.loads(line) for line in server.http.post("/api/chat", json=body).text.splitlines()]
    assert "error" in lines[-1] and lines[0]["done"] is False


def test_keep_alive(launch: Callable[..., Server]) -> None:
    server = launch().wait_ready()
    with ollama.Client(host=server.url) as client:
        assert client.chat("echo", [], keep_alive="10m").done_reason == "load"
        first = client.ps().models[0].expires_at
        assert first is not None and 300 < first.timestamp() - time.time() < 660
        client.chat("echo", say("x"), keep_alive=-1)
        assert (client.ps().models[0].expires_at or first).year > first.year + 50
        client.chat("echo", say("x"), keep_alive=0)
        server.until(lambda: not client.ps().models, "unloaded")
        assert client.chat("echo", say("x")).message.content == "x"
        assert client.chat("echo", [], keep_alive=0).done_reason == "unload"
        assert not client.ps().models

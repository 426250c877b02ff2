"""llama-server's own addresses, on echo, and with probabilities and vectors on the bundled model where llama.cpp is installed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from modules.registry import discover
from tests.api.conftest import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modules.overlays import Overlays

WREN = "wren-6m-gguf/wren-6m-F16.gguf"


@pytest.fixture(scope="module")
def wren(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model on llama.cpp."""
    status = overlays.status(discover()["llamacpp"])
    if not (status.installed and status.importable):
        pytest.skip(f"llama.cpp is not installed: {status.reason}")
    server = Server(tmp_path_factory.mktemp("wren"), "--loader", "llamacpp", "--threads", "1", model=WREN)
    yield server.wait_ready()
    assert server.stop() == 0


def test_what_is_there(server: Server) -> None:
    assert server.http.get("/health").json()["status"] == "ok"
    props = server.http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 8192 and props["total_slots"] == 256
    assert "message" in props["chat_template"] or "m.role" in props["chat_template"]
    assert props["model_path"] == "echo"  # a name, never a path of this machine
    slots = server.http.get("/slots").json()
    assert len(slots) == 256 and not any(slot["is_processing"] for slot in slots)
    assert server.http.post("/props", json={}).json()["error"]["code"] == 400


def test_tokens(server: Server) -> None:
    post = server.http.post
    tokens = post("/tokenize", json={"content": "hello there"}).json()["tokens"]
    assert post("/detokenize", json={"tokens": tokens}).json() == {"content": "hello there"}
    pieces = post("/tokenize", json={"content": "hello there", "with_pieces": True}).json()["tokens"]
    assert "".join(item["piece"] for item in pieces) == "hello there" and [item["id"] for item in pieces] == tokens
    prompt = post("/apply-template", json={"messages": [{"role": "user", "content": "hi"}]}).json()["prompt"]
    assert prompt == "<|user|>\nhi\n<|assistant|>\n"


def test_completion(server: Server) -> None:
    answer = server.http.post("/completion", json={"prompt": "a b c", "n_predict": 8, "seed": 4, "cache_prompt": True}).json()
    assert answer["stop"] is True and answer["content"] and answer["tokens_predicted"] == answer["timings"]["predicted_n"] > 0
    assert answer["stop_type"] in ("eos", "limit") and answer["generation_settings"]["seed"] == 4
    assert answer["truncated"] is False and answer["model"] == "echo"
    ids = server.http.post("/tokenize", json={"content": "a b c"}).json()["tokens"]
    same = server.http.post("/completions", json={"prompt": ids, "n_predict": 8}).json()
    assert same["content"] == answer["content"]
    several = server.http.post("/completion", json={"prompt": ["a", "b"], "n_predict": 4}).json()
    assert [item["index"] for item in several] == [0, 1]


def test_a_stream(server: Server) -> None:
    body = {"prompt": "one two three four", "n_predict": 20, "stream": True}
    with server.http.stream("POST", "/completion", json=body) as answer:
        parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > 1
    assert parts[-1]["content"] == "" and parts[-1]["timings"]["predicted_n"] == parts[-1]["tokens_predicted"]
    whole = server.http.post("/completion", json={**body, "stream": False}).json()
    assert "".join(part["content"] for part in parts) == whole["content"]


def test_stops_and_forms(server: Server) -> None:
    stopped = server.http.post("/completion", json={"prompt": "one two three", "stop": ["two"], "n_predict": 30}).json()
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", "two")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    held = server.http.post("/completion", json={"prompt": "x", "json_schema": schema, "n_predict": 200}).json()
    assert isinstance(json.loads(held["content"])["n"], int)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {}),
        ("/completion", {"prompt": [1.5]}),
        ("/completion", {"prompt": "x", "n_predict": "many"}),
        ("/completion", {"prompt": "x", "logit_bias": [["word", 1]]}),
        ("/completion", {"prompt": "x", "samplers": [3]}),
        ("/detokenize", {"tokens": [-4]}),
        ("/tokenize", {"content": 5}),
        ("/apply-template", {"messages": []}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
        ("/rerank", {"query": "a", "documents": []}),
    ],
)
def test_bad_bodies(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400 and error["type"] == "invalid_request_error" and error["message"]


def test_probabilities_on_a_real_model(wren: Server) -> None:
    answer = wren.http.post("/completion", json={"prompt": "The cat", "n_predict": 3, "n_probs": 4, "temperature": 0}).json()
    rows = answer["completion_probabilities"]
    assert len(rows) == 3 and all(len(row["top_logprobs"]) == 4 and row["logprob"] <= 0 for row in rows)
    assert rows[0]["id"] == rows[0]["top_logprobs"][0]["id"]  # greedy: the likeliest one
    logits = wren.http.post("/v1/internal/logits", json={"prompt": "The cat", "top_logits": 50}).json()["logits"]
    assert 1 < len(logits) <= 50 and 0 < sum(logits.values()) <= 1.001
    assert max(logits, key=lambda text: logits[text]) == rows[0]["token"]


def test_vectors_on_a_real_model(wren: Server) -> None:
    answer = wren.http.post("/embedding", json={"content": ["a cat", "a dog"]})
    if "embeddings" not in discover()["llamacpp"].features:
        assert answer.status_code == 400 and answer.json()["error"]["name"] == "unsupported_parameter"
        return
    rows = answer.json()
    assert [row["index"] for row in rows] == [0, 1] and len(rows[0]["embedding"][0]) > 16
    embedded = wren.http.post("/api/embed", json={"model": WREN, "input": ["a cat"]}).json()
    assert embedded["embeddings"][0] == pytest.approx(rows[0]["embedding"][0])
    old = wren.http.post("/api/embeddings", json={"model": WREN, "prompt": "a cat"}).json()
    assert old["embedding"] == pytest.approx(rows[0]["embedding"][0])


def test_the_samplers_of_each_protocol_reach_a_real_model(wren: Server) -> None:
    """The same numbers under four protocols' names are the same parameters."""
    ollama = {
        "model": WREN,
        "prompt": "The cat",
        "raw": True,
        "stream": False,
        "options": {"num_predict": 12, "repeat_penalty": 1.3},
    }
    ollama["options"] |= {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "seed": 7, "repeat_last_n": 32}
    common = {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.02}
    kobold = {"prompt": "The cat", "max_length": 12, **common, "rep_pen": 1.3, "rep_pen_range": 32, "sampler_seed": 7}
    llama = {"prompt": "The cat", "n_predict": 12, **common, "repeat_penalty": 1.3, "repeat_last_n": 32, "seed": 7}
    post = wren.http.post
    texts = {
        post("/api/generate", json=ollama).json()["response"],
        post("/api/v1/generate", json=kobold).json()["results"][0]["text"],
        post("/completion", json=llama).json()["content"],
    }
    assert len(texts) == 1 and texts.pop()

"""Each protocol's own error body, for every way to be refused, and nothing of the request in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from modules.api.dialects import dialect_of, error_body
from modules.errors import Conflict, InvalidParameter, Overloaded

if TYPE_CHECKING:
    from tests.api.conftest import Server

CANARY = "canary-7f3a"
PATHS = {
    "/v1/chat/completions": lambda body: body["error"]["message"],
    "/v1/messages": lambda body: body["error"]["message"],
    "/api/chat": lambda body: body["error"],
    "/api/v1/generate": lambda body: body["detail"]["msg"],
    "/completion": lambda body: body["error"]["message"],
}


@pytest.mark.parametrize("path", PATHS)
def test_refusals(server: Server, path: str) -> None:
    message = PATHS[path]
    post = server.http.post
    cases: dict[int, Any] = {
        405: server.http.put(path, json={}),
        415: post(path, content=CANARY, headers={"content-type": "multipart/form-data; boundary=x"}),
        400: post(path, content=f'{{"{CANARY}": '.encode(), headers={"content-type": "application/json"}),
    }
    for status, answer in cases.items():
        assert answer.status_code == status, answer.text
        assert message(answer.json()) and CANARY not in answer.text
        assert len(answer.headers["x-request-id"]) == 24
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {11 << 20}\r\n\r\n"
    raw = server.raw(head.encode(), wait_s=3)
    assert raw.startswith(b"HTTP/1.1 413") and message(json.loads(raw.partition(b"\r\n\r\n")[2]))
    foreign = post(path, json={}, headers={"Origin": "http://evil.example"})
    assert foreign.status_code == 403 and message(foreign.json())


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/api/tags", "ollama"),
        ("/api/nothing", "ollama"),
        ("/api/v1/model", "kobold"),
        ("/api/extra/abort", "kobold"),
        ("/props", "llama_server"),
        ("/v1/models", "openai"),
        ("/metrics", "openai"),
        ("/", "openai"),
    ],
)
def test_which_protocol_an_address_speaks(path: str, dialect: str) -> None:
    assert dialect_of(path) == dialect


def test_bodies() -> None:
    error = InvalidParameter("No.", hint="Do.", param="x")
    assert error_body(error)["error"] == {"message": "No. Do.", "type": "invalid_request_error", "param": "x", "code": error.code}
    assert error_body(error, "/api/chat") == {"error": "No. Do.", "code": "invalid_parameter"}
    assert error_body(Overloaded("Full."), "/v1/messages")["error"]["type"] == "overloaded_error"
    conflict = Conflict("Old.", detail={"now": 1})
    assert error_body(conflict)["error"]["detail"] == {"now": 1} and "detail" not in error_body(conflict, "/completion")["error"]


def test_what_curl_sends_by_default_is_read_where_manuals_say_curl(server: Server) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    asked = b'{"model": "echo", "prompt": "hi", "stream": false}'
    assert server.http.post("/api/generate", content=asked, headers=headers).json()["response"] == "hi"
    assert server.http.post("/tokenize", content=b'{"content": "hi"}', headers=headers).json()["tokens"]
    assert server.http.post("/api/generate", content=b"a=b", headers=headers).json()["code"] == "invalid_json"
    assert server.http.post("/v1/completions", content=asked, headers=headers).status_code == 415
    foreign = {**headers, "Origin": "http://evil.example"}
    assert server.http.post("/api/generate", content=asked, headers=foreign).status_code == 403

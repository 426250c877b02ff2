"""The catalogue of bad API input (A1-A30): each entry answers with the OpenAI error body, and the server is well afterwards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Server

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK = [{"role": "user", "content": "x"}]
JSON = {"Content-Type": "application/json"}


def chat(**fields: Any) -> str:
    return json.dumps({"messages": ASK, **fields})


def with_number(name: str, literal: str) -> str:
    """A body with a number as it is written, which Python's own json might not write."""
    return f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {literal}}}'


def check(server: Server, response: Any, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    text = response.text
    assert "Traceback" not in text and "/work" not in text and "site-packages" not in text and len(text) < 4000
    server.oracle()
    return error


NUMBERS = [
    *[("A1", "temperature", literal) for literal in ("NaN", "Infinity", "-Infinity", "1e999")],
    ("A2", "temperature", "-1"),
    ("A2", "temperature", "1e6"),
    ("A2", "top_p", "-0.1"),
    ("A2", "top_p", "1.1"),
    ("A2", "top_k", "-2"),
    ("A2", "top_k", str(2**63)),
    ("A2", "min_p", "2"),
    ("A2", "repetition_penalty", "0"),
    ("A2", "repetition_penalty", "-1"),
    ("A2", "frequency_penalty", "3"),
    ("A2", "typical_p", "-0.5"),
    ("A2", "seed", str(2**70)),
    ("A2", "seed", "-2"),
    ("A2", "temperature", '"0.5"'),
    ("A2", "temperature", "true"),
    *[("A3", "max_tokens", literal) for literal in ("0", "-1", str(2**31), str(2**63), "1" + "0" * 4000, "1.5", '"12"', "true")],
    *[("A3", "max_completion_tokens", literal) for literal in ("0", "1.5", '"12"', "true")],
    ("A4", "n", "0"),
    ("A4", "n", "129"),
    ("A4", "n", "true"),
    ("A4", "top_logprobs", "1000000"),
    ("A19", "stop", '""'),
    ("A19", "stop", '[""]'),
    ("A19", "stop", "[1]"),
    ("A19", "stop", "7"),
    ("A19", "stop", json.dumps(["s"] * 65)),
    ("A19", "stop", json.dumps("s" * 257)),
    ("A20", "logit_bias", '{"abc": 1}'),
    ("A20", "logit_bias", '{"5": NaN}'),
    ("A20", "logit_bias", '{"5": 101}'),
    ("A20", "logit_bias", '{"-5": 1}'),
    ("A20", "logit_bias", json.dumps({str(i): 1 for i in range(1025)})),
    ("A12", "trust_remote_code", "true"),
    ("A12", "model_dir", '"/etc"'),
    ("A12", "extra_flags", '"--x"'),
    ("A12", "__class__", '"x"'),
    ("A12", "user_id", "1"),
    ("A26", "chat_template", '"{{ 1 }}"'),
    ("A26", "chat_template_kwargs", '{"tokenize": true}'),
]


@pytest.mark.parametrize(("entry", "param", "literal"), NUMBERS, ids=[f"{e}-{p}-{v[:12]}" for e, p, v in NUMBERS])
def test_a_field_out_of_range_is_named(server: Server, entry: str, param: str, literal: str) -> None:
    error = check(server, server.http.post(CHAT, content=with_number(param, literal), headers=JSON), 400)
    assert error["type"] == "invalid_request_error"
    if entry == "A26" and param == "chat_template_kwargs":
        assert error["param"] == "chat_template_kwargs"
    else:
        assert error["param"].partition(".")[0] == param


def test_a2_the_ranges_edges_are_inside(server: Server) -> None:
    for fields in ({"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_k": -1}, {"seed": -1}, {"seed": 2**63 - 1}):
        assert server.chat(**fields).status_code == 200, fields
    assert server.chat(max_tokens=None, temperature=None, stop=None, n=None, stream=None).status_code == 200


def test_a4_n_times_max_tokens(server: Server) -> None:
    check(server, server.chat(n=128, max_tokens=1_000_000), 400, param="n")
    body = {"prompt": "x", "best_of": 10**6}
    check(server, server.http.post(TEXT, json=body), 400, param="best_of")
    check(server, server.http.post(TEXT, json={"prompt": "x", "logprobs": 10**6}), 400, param="logprobs")


BODIES = [
    ("A5", b"", "invalid_json"),
    ("A5", b"[]", "invalid_json"),
    ("A5", b"1", "invalid_json"),
    ("A5", b"null", "invalid_json"),
    ("A5", b'{"messages": [', "invalid_json"),
    ("A5", b'{"messages": [],}', "invalid_json"),
    ("A5", b"{} {}", "invalid_json"),
    ("A5", b"[" * 100_000, "invalid_json"),
    ("A5", b'{"a":' * 2000 + b"1" + b"}" * 2000, "invalid_json"),
    ("A5", b'{"a":' + b"9" * 5000 + b"}", "invalid_json"),
    ("A6", b'{"messages": "\xff\xfe"}', "invalid_json"),
    ("A6", chat().encode("utf-16"), "invalid_json"),
    ("A7", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "invalid_unicode"),
    ("A7", rb'{"messages": [{"role": "user", "content": "x"}], "stop": ["\udfff"]}', "invalid_unicode"),
    ("A7", rb'{"messages": [{"role": "user", "content": "x", "name": "\udc00"}]}', "invalid_unicode"),
    ("A7", rb'{"messages": [{"role": "user", "content": "x"}], "\ud800": 1}', "invalid_unicode"),
]


@pytest.mark.parametrize(("entry", "body", "code"), BODIES, ids=[f"{e}-{b[:18]!r}" for e, b, _ in BODIES])
def test_a_body_that_is_no_json(server: Server, entry: str, body: bytes, code: str) -> None:
    check(server, server.http.post(CHAT, content=body, headers=JSON), 400, code)


def test_a6_a_byte_order_mark_is_taken(server: Server) -> None:
    assert server.http.post(CHAT, content=b"\xef\xbb\xbf" + chat().encode(), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "text", ["a\u0000b", "\u202eright to left", "zero\u200bwidth", "Z" + "\u0335" * 2000, "\U0001f468\u200d\U0001f469"]
)
def test_a8_odd_characters_in_a_prompt_are_only_text(server: Server, text: str) -> None:
    answer = server.chat(text)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == text


def test_a8_control_characters_in_a_name(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x", "name": "a\u0000b"}]}
    check(server, server.http.post(CHAT, json=body), 400, param="messages.0.name")


def test_a10_of_duplicate_keys_the_last_one_counts(server: Server) -> None:
    body = '{"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 1, "max_tokens": 2}'
    answer = server.http.post(CHAT, content=body, headers=JSON)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_a11_unknown_fields_are_listed(server: Server) -> None:
    answer = server.chat(service_tier="auto", wibble=1, user="me", metadata={})
    assert answer.status_code == 200
    warnings = answer.json()["warnings"]
    assert len(warnings) == 2
    assert "service_tier" in warnings[0] + warnings[1] and "wibble" in warnings[0] + warnings[1]


MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("text", "messages"),
    ([1], "messages.0"),
    ([{"role": "root", "content": "x"}], "messages.0.role"),
    ([{"content": "x"}], "messages.0.role"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": None}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": {"a": 1}}], "messages.0.content"),
    ([{"role": "user", "content": []}], "messages.0.content"),
    ([*ASK, {"role": "tool", "content": "x"}], "messages.1.tool_call_id"),
    ([{"role": "system", "content": ""}], "messages"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}], "messages.0.content.0"),
    ([{"role": "user", "content": [{"type": "what"}]}], "messages.0.content.0"),
]


@pytest.mark.parametrize(("messages", "param"), MESSAGES, ids=[str(i) for i in range(len(MESSAGES))])
def test_a14_messages(server: Server, messages: Any, param: str) -> None:
    check(server, server.http.post(CHAT, json={"messages": messages}), 400, param=param)


def test_a14_orders_that_are_odd_but_fine(server: Server) -> None:
    two_systems = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *ASK]
    assistant_first = [{"role": "assistant", "content": "hi"}, *ASK]
    for messages in (two_systems, assistant_first):
        assert server.http.post(CHAT, json={"messages": messages}).status_code == 200
    many = [{"role": "user", "content": "x"}] * 100_001
    check(server, server.http.post(CHAT, json={"messages": many}), 400, param="messages")


def test_a16_too_long_for_the_context(server: Server) -> None:
    for length in (8192, 800_000):
        body = {"prompt": "a " * length, "max_tokens": 1}
        check(server, server.http.post(TEXT, json=body), 400, "context_length_exceeded")
    check(server, server.http.post(TEXT, json={"prompt": [65] * 9000}), 400, "context_length_exceeded")


def test_a17_a_body_over_the_limit(server: Server) -> None:
    claim = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 67108864\r\n\r\n{"
        % CHAT.encode()
    )
    answer = server.raw(claim)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"body_too_large" in answer

    def chunks() -> Any:
        for _ in range(12):
            yield b" " * (1 << 20)

    for _ in range(2):  # the client sends everything first and then reads: the answer must still be there
        check(server, server.http.post(CHAT, content=chunks(), headers=JSON), 413, "body_too_large")
        check(server, server.http.post(CHAT, content=b" " * (12 << 20), headers=JSON), 413, "body_too_large")


def test_a17_a_content_length_that_lies(server: Server) -> None:
    short = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n%s" % (CHAT.encode(), chat().encode())
    assert b" 400 " in server.raw(short, wait_s=3).split(b"\r\n")[0]
    negative = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n" % CHAT.encode()
    assert b" 400 " in server.raw(negative, wait_s=3).split(b"\r\n")[0]
    server.oracle()


@pytest.mark.parametrize("prompt", [[-1], [2**40], [1.5], ["a", 1], [[]], [True], {}, 5, None, [[1], "a", None]])
def test_a21_prompts(server: Server, prompt: Any) -> None:
    error = check(server, server.http.post(TEXT, json={"prompt": prompt}), 400)
    assert error["param"].startswith("prompt")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


SCHEMAS: list[dict[str, Any]] = [
    deep(40),
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/nowhere"},
    {"$ref": "http://example.com/x"},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
    {"type": "string", "maxLength": 65_536},
    {"type": "string", "pattern": "(" * 60_000},
    {"type": "string", "pattern": "[a-z"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=[str(i) for i in range(len(SCHEMAS))])
def test_a22_schemas(server: Server, schema: dict[str, Any]) -> None:
    body = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    check(server, server.chat(response_format=body), 400, "invalid_grammar")


GRAMMARS = [
    'root ::= "a" ' + "(" * 60_000,
    "root ::= " + "(" * 100 + '"a"' + ")" * 100,
    "root ::= root",
    'root ::= a\na ::= b\nb ::= a | "x"',
    'root ::= "a"{1,1000000000}',
    'other ::= "a"',
    "root ::= missing",
    "\n".join([f"r{i} ::= r{i + 1}" for i in range(5000)]) + '\nroot ::= "a"',
    'root ::= "' + "a" * 70_000 + '"',
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=[str(i) for i in range(len(GRAMMARS))])
def test_a23_grammars(server: Server, grammar: str) -> None:
    check(server, server.chat(grammar=grammar), 400, "invalid_grammar", "grammar")


ROUTES = [
    ("GET", "/nothing", 404),
    ("GET", CHAT, 405),
    ("DELETE", "/v1/models", 405),
    ("GET", "/v1/models/..%2f..%2fetc/passwd", 404),
    ("GET", "/v1/models/nope", 404),
    ("GET", "//v1/models", 404),
    ("POST", "/v1/nothing", 404),
    ("PUT", TEXT, 405),
]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_a28_routes(server: Server, method: str, path: str, status: int) -> None:
    answer = server.raw(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["code"] in ("not_found", "method_not_allowed", "model_not_found")
    server.oracle()


@pytest.mark.parametrize("name", ["", "unknown", "a" * 1_000_000, "../../etc/passwd", "/etc/passwd", "echo\u0000", "ECHO "])
def test_a29_model_names(server: Server, name: str) -> None:
    error = check(server, server.chat(model=name), 404, "model_not_found")
    assert "passwd" not in error["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"])
def test_a_form_is_no_json(server: Server, kind: str) -> None:
    check(server, server.http.post(CHAT, content=chat(), headers={"Content-Type": kind}), 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["text/plain", "application/json; charset=utf-8", ""])
def test_json_without_the_proper_type_is_taken(server: Server, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert server.http.post(CHAT, content=chat().encode(), headers=headers).status_code == 200


@pytest.mark.parametrize("options", [{"include_usage": "yes"}, 5, []])
def test_stream_options(server: Server, options: Any) -> None:
    check(server, server.chat(stream=True, stream_options=options), 400)
    check(server, server.chat(stream_options={"include_usage": True}), 400, param="stream_options")

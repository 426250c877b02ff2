"""Anthropic's Messages API with the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

if TYPE_CHECKING:
    from tests.api.conftest import Server

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def raw(server: Server, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """(event name, data) of a stream, comments left out."""
    events = []
    name = ""
    with server.http.stream("POST", "/v1/messages", json={"model": "echo", "max_tokens": 50, "stream": True, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append((name, json.loads(line[6:])))
    return events


def test_an_answer(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="echo", max_tokens=50, system="Be kind.", messages=say("hello there"))
    assert Message.model_validate(answer.model_dump()) and answer.id.startswith("msg_")
    assert [block.text for block in answer.content if block.type == "text"] == ["hello there"]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0
    extra = answer.model_dump()
    assert extra["warnings"] == [] and extra["receipt"]["loader"] == "echo"


def test_limits_and_stops(client: anthropic.Anthropic) -> None:
    short = client.messages.create(model="echo", max_tokens=1, messages=say("one two three four five six"))
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 1)
    cut = client.messages.create(model="echo", max_tokens=50, messages=say("one two three"), stop_sequences=["two"])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "two")
    assert cut.content[0].type == "text" and cut.content[0].text == "one "


def test_a_stream_is_what_the_client_expects(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="echo", max_tokens=50, messages=say("hello there, how are you?")) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == "hello there, how are you?"
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 1 and final.usage.input_tokens > 1


def test_every_event_is_of_the_published_kinds(server: Server) -> None:
    events = raw(server, messages=say("hello there"))
    names = [name for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    for name, data in events:
        assert data["type"] == name
        if name != "ping":
            EVENTS.validate_python(data)


def test_tools(client: anthropic.Anthropic) -> None:
    asked = client.messages.create(model="echo", max_tokens=99, messages=say(f"ok {CALL}"), tools=[WEATHER])
    assert asked.stop_reason == "tool_use"
    text, call = asked.content
    assert text.type == "text" and text.text.strip() == "ok"
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]}
    history: list[Any] = [*say("weather?"), {"role": "assistant", "content": asked.content}, result]
    assert client.messages.create(model="echo", max_tokens=99, messages=history, tools=[WEATHER]).stop_reason


def test_tool_choice_any_holds_the_answer_to_a_call(client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "weather"}
    answer = client.messages.create(model="echo", max_tokens=400, messages=say("hi"), tools=[WEATHER], tool_choice=choice)
    call = answer.content[-1]
    assert call.type == "tool_use" and call.name == "weather" and isinstance(call.input, dict) and "city" in call.input


def test_streamed_tools(server: Server, client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="echo", max_tokens=99, messages=say(CALL), tools=[WEATHER]) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert [(b.name, b.input) for b in final.content if b.type == "tool_use"] == [("weather", {"city": "Oslo"})]
    for name, data in raw(server, messages=say(CALL), tools=[WEATHER], max_tokens=99):
        if name != "ping":
            EVENTS.validate_python(data)


def test_content_blocks_and_prefill(client: anthropic.Anthropic) -> None:
    blocks: Any = [
        {"type": "text", "text": "one"},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "two"}},
    ]
    answer = client.messages.create(model="echo", max_tokens=99, messages=[{"role": "user", "content": blocks}])
    assert answer.content[0].type == "text" and "two" in answer.content[0].text
    prefill: list[Any] = [*say("count"), {"role": "assistant", "content": "one,"}]
    assert client.messages.create(model="echo", max_tokens=9, messages=prefill).content[0].type == "text"


def test_counting(client: anthropic.Anthropic) -> None:
    few = client.messages.count_tokens(model="echo", messages=say("hello"))
    many = client.messages.count_tokens(model="echo", messages=say("hello there, how are you?"), system="Be kind.")
    assert 0 < few.input_tokens < many.input_tokens
    answer = client.messages.create(model="echo", max_tokens=1, messages=say("hello"))
    assert answer.usage.input_tokens == few.input_tokens


def test_structured_output(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    body = {
        "model": "echo",
        "max_tokens": 99,
        "messages": say("x"),
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }
    answer = server.http.post("/v1/messages", json=body).json()
    assert isinstance(json.loads(answer["content"][0]["text"])["n"], int)


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as gone:
        client.messages.create(model="no such", max_tokens=5, messages=say("x"))
    assert gone.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model="echo", max_tokens=5, messages=say("x"), extra_body={"temperature": -1})
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(anthropic.BadRequestError, match="no image that can be read"):
        client.messages.create(model="echo", max_tokens=5, messages=[{"role": "user", "content": [image]}])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": "echo", "messages": say("x")}, "max_tokens"),
        ({"model": "echo", "max_tokens": 0, "messages": say("x")}, "max_tokens"),
        ({"model": "echo", "max_tokens": 5, "messages": []}, "messages"),
        ({"model": "echo", "max_tokens": 5, "messages": [{"role": "root", "content": "x"}]}, "messages.0.role"),
        ({"model": "echo", "max_tokens": 5, "messages": say("x"), "stop_sequences": [""]}, "stop_sequences"),
        ({"model": "echo", "max_tokens": 5, "messages": say("x"), "trust_remote_code": True}, "trust_remote_code"),
        ({"model": "echo", "max_tokens": 5, "messages": say("x"), "tools": [{"type": "web_search_20250305"}]}, "tools.0"),
    ],
)
def test_bad_bodies(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.http.post("/v1/messages", json=body)
    assert answer.status_code == 400
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert error["error"]["param"] == param and error["request_id"].startswith("req_")


def test_a_failure_in_mid_stream_is_an_error_event(server: Server) -> None:
    events = raw(server, messages=say("[[echo tokens=50 error_at=3]] words"))
    assert events[-1][0] == "error" and events[-1][1]["error"]["type"] == "api_error"


def test_unknown_fields_are_told(server: Server) -> None:
    body = {"model": "echo", "max_tokens": 5, "messages": say("x"), "wonder": 1, "metadata": {"user_id": "u"}}
    assert server.http.post("/v1/messages", json=body).json()["warnings"] == ["wonder is not known and has no effect."]


def test_models(client: anthropic.Anthropic) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert listed["echo"].type == "model" and listed["echo"].display_name == "echo"
    assert client.models.retrieve("echo").created_at.year >= 2026

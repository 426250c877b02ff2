"""/v1/responses with the real client: text, events, stored turns, tools, forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest

from modules.api.responses_store import ResponseStore

if TYPE_CHECKING:
    from tests.api.conftest import Server

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo", input="hello there", instructions="Be kind.", metadata={"a": "b"})
    assert answer.output_text == "hello there"
    assert (answer.status, answer.metadata, answer.instructions) == ("completed", {"a": "b"}, "Be kind.")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    cut = client.responses.create(model="echo", input="[[echo tokens=50]] x", max_output_tokens=5)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_events_come_in_order_and_add_up(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="echo", input="one two three four", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events if e.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "one two three four" == events[-1].response.output_text  # type: ignore[union-attr]


def test_a_response_follows_an_earlier_one(client: openai.OpenAI, server: Server) -> None:
    first = client.responses.create(model="echo", input="first words")
    second = client.responses.create(model="echo", input="second words", previous_response_id=first.id)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(second.id).output_text == "second words"
    assert [item.content for item in client.responses.input_items.list(first.id).data] == ["first words"]  # type: ignore[union-attr]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo", input="x", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    kept = client.responses.create(model="echo", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo", input="rome", tools=[TOOL], tool_choice="required")
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", '{"city":"rome"}')
    events = list(client.responses.create(model="echo", input="rome", tools=[TOOL], tool_choice="required", stream=True))
    written = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert written == '{"city":"rome"}'
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    after = client.responses.create(model="echo", previous_response_id=answer.id, input=result, tools=[TOOL])
    assert "sunny" in after.output_text


def test_a_form(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="echo", input="Bob, 42", text_format=Person).output_parsed
    assert parsed == Person(name="bob", age=42)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [{"type": "mcp_call"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}, "input.0.content.0"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_bad_bodies(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo", **fields)
    assert caught.value.param == param


def test_the_store_is_bounded_and_owned() -> None:
    store = ResponseStore(max_responses=3, max_bytes=2000)
    for number in range(5):
        store.put([], {"id": f"r{number}"}, [], "me")
    assert [store.get(f"r{number}", "me") is not None for number in range(5)] == [False, False, True, True, True]
    assert store.get("r4", "you") is None
    assert not store.delete("r4", "you")
    store.put([{"role": "user", "content": "x" * 1500}], {"id": "big"}, [], "me")
    store.put([{"role": "user", "content": "x" * 1500}], {"id": "bigger"}, [], "me")
    assert store.get("big", "me") is None
    assert store.get("bigger", "me") is not None
    store.put([{"role": "user", "content": "x" * 3000}], {"id": "too big"}, [], "me")
    assert store.get("too big", "me") is None

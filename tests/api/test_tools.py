"""Tools and structured output with the real client: echo is held to the form it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str = "weather 3", **fields: Any) -> Any:
    return client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}], **fields)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    tools: list[Any] = [WEATHER] if choice == "required" else [WEATHER, TIME]
    answer = ask(client, tools=tools, tool_choice=choice, seed=1)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["days"] == 3
    chunks = list(ask(client, tools=tools, tool_choice=choice, seed=1, stream=True))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert deltas[0].function.name == "get_weather"
    assert deltas[0].id
    assert all(delta.id is None for delta in deltas[1:])
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_required_call_picks_among_several(client: openai.OpenAI) -> None:
    names = {
        ask(client, tools=[WEATHER, TIME], tool_choice="required", seed=s).choices[0].message.tool_calls[0].function.name
        for s in range(6)
    }
    assert names <= {"get_weather", "get_time"}


def test_auto_and_none_leave_the_answer_free(client: openai.OpenAI) -> None:
    for choice in ("auto", "none", openai.omit):
        message = ask(client, "hello", tools=[WEATHER], tool_choice=choice).choices[0].message
        assert (message.content, message.tool_calls) == ("hello", None)


def test_a_call_that_the_model_writes_is_read(client: openai.OpenAI) -> None:
    """Echo repeats it: the way of a model that knows the <tool_call> form."""
    text = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
    answer = ask(client, text, tools=[TIME, WEATHER])
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"zone": "UTC"}'
    assert answer.choices[0].finish_reason == "tool_calls"
    assert ask(client, text).choices[0].message.content == text  # no tools, no calls


def test_results_of_calls_go_back_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "half past ten"},
    ]
    answer = client.chat.completions.create(model="echo", messages=messages, tools=[TIME])  # type: ignore[list-item]
    assert "half past ten" in str(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/x"}}}]},
            "tools.0.function.parameters",
        ),
    ],
)
def test_bad_tools_are_refused(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param


# --- forms --------------------------------------------------------------------------------------------------------


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="echo", messages=[{"role": "user", "content": "Ann, 41"}], response_format=Person, max_tokens=200
    )
    assert answer.choices[0].message.parsed == Person(name="ann", age=41)


def test_json_object_grammar_and_pattern(client: openai.OpenAI) -> None:
    assert json.loads(ask(client, response_format={"type": "json_object"}).choices[0].message.content) == {}
    assert ask(client, extra_body={"regex": "(on|off)[0-9]"}).choices[0].message.content[:1] == "o"
    assert ask(client, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"regex": "(?=x)y"}},
        {"extra_body": {"grammar": 'root ::= "a" | | nothing'}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_held_to(client: openai.OpenAI, fields: dict[str, Any], stream: bool) -> None:
    with pytest.raises(openai.APIError) as caught:
        list(ask(client, stream=stream, **fields))
    assert caught.value.code == "invalid_grammar"


# --- prefill, completions -----------------------------------------------------------------------------------------


def test_best_of_needs_logprobs_and_no_stream(client: openai.OpenAI) -> None:
    for fields in ({"best_of": 3}, {"best_of": 3, "stream": True}, {"best_of": 1, "n": 2}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="echo", prompt="x", **fields)  # type: ignore[call-overload]


def test_suffix_is_refused_by_a_model_without_the_marks(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="def f(", suffix="return x")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "suffix")


@pytest.mark.parametrize("path", ["audio/speech", "audio/transcriptions", "images/generations", "images/edits", "moderations"])
def test_what_is_not_here_says_so(server: Server, path: str) -> None:
    answer = server.http.post(f"/v1/{path}", json={})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_supported"


def test_paths_of_a_load_stay_in_the_model_folders(server: Server) -> None:
    for lora in (["/etc"], ["../../etc"], ["x\0y"]):
        body = {"model": "wren-6m", "loader": "transformers", "options": {"lora": lora}}
        answer = server.http.post("/ui-api/models/load", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "lora"
        assert "etc" not in answer.json()["error"]["message"]
    listed = server.http.get("/ui-api/models").json()
    assert all(not model["path"].startswith("/") for model in listed["models"])
    assert all(not resident["model"]["path"].startswith("/") for resident in listed["residents"])

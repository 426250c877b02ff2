"""The OpenAI endpoints with the real client, over a real worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert listed["echo"].model_dump()["state"] == "ready"
    assert client.models.retrieve("echo").id == "echo"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("hello there"), seed=5, temperature=0.5)
    assert answer.model == "echo"
    assert answer.choices[0].message.content == "hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    extra = answer.model_dump()
    assert extra["warnings"] == []
    assert extra["receipt"]["seed"] == 5
    assert extra["receipt"]["applied"] == {"seed": 5, "temperature": 0.5}


@pytest.mark.parametrize("text", ["plain words", "emoji 👩‍👩‍👧 and 漢字 and é", "tab\tand\nnewline", '"quotes" \\ and </script>'])
def test_the_stream_equals_the_whole(client: openai.OpenAI, text: str) -> None:
    whole = client.chat.completions.create(model="echo", messages=say(text)).choices[0].message.content
    chunks = list(client.chat.completions.create(model="echo", messages=say(text), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_usage_in_the_stream_comes_last_and_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=say("one two three"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4  # three words and the end
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_n_gives_n_choices_with_their_own_indices(client: openai.OpenAI) -> None:
    text = "[[echo random=1]] some words to shuffle"
    whole = client.chat.completions.create(model="echo", messages=say(text), n=3, seed=1, temperature=1)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert len({c.message.content for c in whole.choices}) > 1
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="echo", messages=say(text), n=3, seed=1, temperature=1, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {c.index: c.message.content for c in whole.choices}


def test_max_tokens_stop_and_prefill(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(model="echo", messages=say("a b c d e f"), max_completion_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("a b c", "length")
    stopped = client.chat.completions.create(model="echo", messages=say("one two three"), stop=[" three", "zzz"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one two", "stop")
    begun = [*say("question"), {"role": "assistant", "content": "The answer"}]
    assert client.chat.completions.create(model="echo", messages=begun).choices[0].message.content


def test_content_parts_and_developer_role(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": " part two"}]},
    ]
    assert client.chat.completions.create(model="echo", messages=parts).choices[0].message.content == "part one part two"


def test_completions(client: openai.OpenAI) -> None:
    one = client.completions.create(model="echo", prompt="alpha beta", max_tokens=20)
    assert (one.object, one.choices[0].text) == ("text_completion", "alpha beta")
    many = client.completions.create(model="echo", prompt=["one", "two"], n=2, max_tokens=20)
    assert [(c.index, c.text) for c in many.choices] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]
    echoed = client.completions.create(model="echo", prompt="alpha", echo=True, max_tokens=20)
    assert echoed.choices[0].text == "alphaalpha"
    tokens = client.completions.create(model="echo", prompt=[104, 105], max_tokens=20)
    assert tokens.choices[0].text == "hi"
    default = client.completions.create(model="echo", prompt="[[echo tokens=100]] x")
    assert default.choices[0].finish_reason == "length"
    assert default.usage is not None and default.usage.completion_tokens == 16
    streamed = client.completions.create(model="echo", prompt=["one", "two"], max_tokens=20, stream=True)
    texts: dict[int, str] = {}
    for chunk in streamed:
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == {0: "one", 1: "two"}


def test_samplers_the_backend_lacks_are_named_not_dropped(client: openai.OpenAI) -> None:
    extra: dict[str, Any] = {"mirostat_mode": 2, "rep_pen": 1.2, "typical_p": 1.0, "made_up": 1, "user": "u"}
    answer = client.chat.completions.create(model="echo", messages=say("x"), extra_body=extra).model_dump()
    assert len(answer["warnings"]) == 3, answer["warnings"]  # the neutral typical_p needs no warning
    assert set(answer["receipt"]["ignored"]) == {"mirostat_mode", "repetition_penalty"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=say("x"), extra_body={**extra, "strict": True})
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param in ("mirostat_mode", "repetition_penalty")


def test_what_the_backend_can_not_is_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=say("x"), logprobs=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "logprobs")


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "json_object"}}, r"\s*\{.*\}\s*"),
        ({"extra_body": {"grammar": 'root ::= "a"'}}, "a"),
        ({"extra_body": {"regex": "a+"}}, "a+"),
    ],
)
def test_a_form_is_kept_to(client: openai.OpenAI, fields: dict[str, Any], form: str) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("aaa"), max_tokens=200, **fields)
    assert re.fullmatch(form, answer.choices[0].message.content or "", re.DOTALL)


def test_context_overflow_is_refused_before_the_stream_opens(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="echo", messages=say("word " * 9000), stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_max_tokens_beyond_the_context_is_clamped(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("[[echo tokens=9000]] x"), max_tokens=100_000)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == 8192


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=say("x"))
    assert caught.value.code == "model_not_found"


async def test_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="echo", messages=say("asynchronous words"), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) == "asynchronous words"

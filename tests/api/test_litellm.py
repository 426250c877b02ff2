"""LiteLLM against this server, as docs/clients/litellm.md says: chat, streams, tools, errors, embeddings."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network for prices

litellm = pytest.importorskip("litellm")

if TYPE_CHECKING:
    from tests.api.conftest import Server


# litellm's own use of pydantic, about which this server can do nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning")


@pytest.fixture(scope="module")
def settings(server: Server) -> dict[str, Any]:
    return {"model": "openai/echo", "api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """litellm takes the thread's event loop, makes one where there is none, and leaves it and its clients open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.run_until_complete(litellm.close_litellm_async_clients())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    asyncio.set_event_loop(None)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat(settings: dict[str, Any]) -> None:
    answer = litellm.completion(**settings, messages=say("hello there"), temperature=0.5, seed=5)
    assert answer.choices[0].message.content == "hello there" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_stream(settings: dict[str, Any]) -> None:
    parts = list(
        litellm.completion(**settings, messages=say("wörld 🙂 again"), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "wörld 🙂 again"
    assert [part.usage.completion_tokens for part in parts if getattr(part, "usage", None)][-1] > 0


def test_text_completion(settings: dict[str, Any]) -> None:
    answer = litellm.text_completion(**(settings | {"model": "text-completion-openai/echo"}), prompt="Once more", max_tokens=16)
    assert "Once more" in answer.choices[0].text


def test_a_tool_call(settings: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": schema}}
    answer = litellm.completion(**settings, messages=say("How is it there?"), tools=[tool], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Paris"}


def test_a_form(settings: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema}}
    answer = litellm.completion(**settings, messages=say("Fill it in."), response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"ok": True}


def test_many_at_once(settings: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    texts = [f"number {number}" for number in range(8)]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**settings, messages=say(text)) for text in texts))

    answers = loop.run_until_complete(ask())
    assert [answer.choices[0].message.content for answer in answers] == texts


def test_errors_are_litellms_own(settings: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="nosuch"):
        litellm.completion(**(settings | {"model": "openai/nosuch"}), messages=say("x"))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**settings, messages=say("x"), temperature=-3)

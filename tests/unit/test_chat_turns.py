"""Prompts: what a model sees of a conversation, and what is left out when its context is too small."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modules.chat.store import Node
from modules.chat.templates import TemplateRenderer
from modules.chat.turns import OPENING, AnswerSettings, PromptBuilder, build_messages
from modules.errors import ContextLengthExceeded, InvalidParameter, TemplateError
from modules.schema import ChatInput, ModelInfo
from tests.unit.fake_engine import SPEC

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def node(role: Any, text: str, status: Any = "complete") -> Node:
    return Node(f"{role}-{text}", None, role, text, 0.0, status, ())


class Client:
    """One token a character."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.encoded = 0

    async def count(self, text: str, add_special: bool = False) -> int:
        return len(await self.encode(text, add_special))

    async def encode(self, text: str, add_special: bool = False) -> list[int]:
        assert not add_special
        self.encoded += 1
        return [ord(c) for c in text]


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


class Builder:
    def __init__(self, renderer: TemplateRenderer, context: int, template: str | None = TEMPLATE) -> None:
        self.warnings: list[str] = []
        self.client = Client()
        info = self.info = ModelInfo("m", "/m", "echo", "hf", context_length=context, bos_token="<s>")
        self.builder = PromptBuilder(renderer, template, info, self.client, self.warnings)  # type: ignore[arg-type]

    async def text(self, messages: list[dict[str, str]], max_tokens: int | None = None, continued: bool = False) -> str:
        request = await self.builder.request(messages, AnswerSettings(max_tokens=max_tokens), continued=continued)
        assert not request.add_special and (request.prompt is None) != (request.token_ids is None)
        return request.prompt if request.prompt is not None else "".join(map(chr, request.token_ids or ()))


def dialogue(turns: int, size: int = 10) -> list[dict[str, str]]:
    """user, assistant, …, user; every text has `size` characters and names its place."""
    roles = ["user" if n % 2 == 0 else "assistant" for n in range(2 * turns - 1)]
    return [{"role": role, "content": f"{n}".ljust(size, "x")} for n, role in enumerate(roles)]


def test_messages_of_a_path() -> None:
    path = [node("user", "q1"), node("assistant", "", "failed"), node("user", "q2"), node("assistant", "a2")]
    assert build_messages("  ", path) == [
        {"role": "user", "content": "q1\n\nq2"}, {"role": "assistant", "content": "a2"},
    ]  # fmt: skip
    assert build_messages("Be kind.", [node("system", "Be brief."), node("user", "q")]) == [
        {"role": "system", "content": "Be kind.\n\nBe brief."}, {"role": "user", "content": "q"},
    ]  # fmt: skip
    assert build_messages("", [node("user", "q"), node("assistant", " \n")]) == [{"role": "user", "content": "q"}]
    kept = build_messages("", [node("user", "q"), node("assistant", " ")], continued=True)
    assert kept[-1] == {"role": "assistant", "content": " "}


async def test_what_fits_is_not_counted_or_cut(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 4096)
    text = await builder.text(dialogue(5))
    assert text.count("<user>") == 5 and builder.client.encoded == 0 and builder.warnings == []
    assert (await Builder(renderer, 0).text(dialogue(500, 100))).count("<user>") == 500, "an unknown context cuts nothing"


async def test_oldest_turns_go_first_and_the_system_prompt_stays(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 1000)
    messages = [{"role": "system", "content": "SYSTEM"}, *dialogue(40)]
    text = await builder.text(messages, max_tokens=100)
    assert text.startswith("<system>SYSTEM<user>") and text.endswith("78xxxxxxxx<assistant>")
    assert len(text) <= 900
    assert len(builder.warnings) == 1
    dropped = int(builder.warnings[0].split()[1])
    assert dropped % 2 == 0 and text.count("<user>") == 40 - dropped // 2
    assert builder.client.encoded < 12, "found by halving"


async def test_the_cut_stays_where_it_is_for_several_turns(renderer: TemplateRenderer) -> None:
    begins = []
    for turns in range(40, 52):
        text = await Builder(renderer, 1000).text(dialogue(turns), max_tokens=100)
        begins.append(text[:20])
    assert len(set(begins)) <= 5, "or the KV cache would be of no use"


async def test_room_for_the_answer_is_a_quarter_at_most(renderer: TemplateRenderer) -> None:
    text = await Builder(renderer, 1000).text(dialogue(40), max_tokens=100_000)
    assert 500 < len(text) <= 750
    assert len(await Builder(renderer, 1000).text(dialogue(40), None)) <= 750


async def test_a_message_that_is_too_long_by_itself(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 200)
    with pytest.raises(ContextLengthExceeded, match="200"):
        await builder.text([*dialogue(3)[:-1], {"role": "user", "content": "x" * 500}], max_tokens=10)
    with pytest.raises(ContextLengthExceeded, match="system prompt"):
        await Builder(renderer, 200).text([{"role": "system", "content": "x" * 500}, *dialogue(1)], max_tokens=10)
    # Over the budget but within the context: it is tried with what room is left.
    text = await Builder(renderer, 200).text([*dialogue(4)[:-1], {"role": "user", "content": "y" * 160}], max_tokens=100)
    assert text == "<user>" + "y" * 160 + "<assistant>"


async def test_exactly_at_the_edge(renderer: TemplateRenderer) -> None:
    head = len("<user><assistant>")
    assert await Builder(renderer, 200).text([{"role": "user", "content": "x" * (199 - head)}], max_tokens=1)
    with pytest.raises(ContextLengthExceeded):
        await Builder(renderer, 200).text([{"role": "user", "content": "x" * (200 - head)}], max_tokens=1)


async def test_wide_characters_are_counted_by_the_model(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 400)
    await builder.text([{"role": "user", "content": "漢" * 150}], max_tokens=10)
    assert builder.client.encoded == 1, "150 characters, but 450 bytes might be as many tokens"


async def test_continue_while_turns_are_dropped(renderer: TemplateRenderer) -> None:
    messages = [*dialogue(40), {"role": "assistant", "content": "and then"}]
    text = await Builder(renderer, 600).text(messages, max_tokens=50, continued=True)
    assert text.endswith("78xxxxxxxx<assistant>and then")


async def test_nothing_to_answer(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidParameter):
        await Builder(renderer, 100).text([{"role": "system", "content": "s"}])


async def test_templates_without_a_system_role(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 4096, STRICT)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    assert await builder.text(messages) == "<user>Be kind.\n\nq<assistant>"
    assert len(builder.warnings) == 1 and "system prompt" in builder.warnings[0]
    builder = Builder(renderer, 4096, STRICT)
    greeting = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "q"}]
    assert await builder.text(greeting) == f"<user>{OPENING}<assistant>Hello!<user>q<assistant>"
    with pytest.raises(TemplateError, match="Always"):
        await Builder(renderer, 4096, "{{ raise_exception('Always') }}").text(messages)


async def test_no_template_means_the_fallback_and_its_stop(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 4096, None)
    request = await builder.builder.request(dialogue(1), AnswerSettings(stop=("END",)), continued=False)
    assert request.prompt == "<s>User: 0xxxxxxxxx\nAssistant:" and request.stop.stop == ("END", "\nUser:")
    with_template = await Builder(renderer, 4096).builder.request(
        dialogue(1), AnswerSettings({"temperature": 0.5, "top_p": 1.0, "ban_eos_token": True}, 7, ("END",)), continued=False
    )
    assert with_template.stop.stop == ("END",) and with_template.stop.max_tokens == 7 and with_template.stop.ignore_eos
    assert with_template.sampling == {"temperature": 0.5, "ban_eos_token": True}, "what is neutral is not sent"


async def test_an_engine_that_renders_itself_gets_the_messages(renderer: TemplateRenderer) -> None:
    builder = Builder(renderer, 1000)
    builder.client.spec = dataclasses.replace(SPEC, features=frozenset({"messages"}))
    builder.builder = PromptBuilder(renderer, None, builder.info, builder.client, builder.warnings)  # type: ignore[arg-type]
    few = [{"role": "system", "content": "SYSTEM"}, *dialogue(3)]
    request = await builder.builder.request(few, AnswerSettings(stop=("END",)), continued=False)
    assert (request.prompt, request.token_ids, request.chat) == (None, None, ChatInput(tuple(few)))
    assert request.stop.stop == ("END",), "the fallback's stop belongs to the fallback"
    many = [{"role": "system", "content": "SYSTEM"}, *dialogue(400)]
    request = await builder.builder.request(many, AnswerSettings(max_tokens=100), continued=False)
    assert request.chat is not None and 2 < len(request.chat.messages) < 60
    assert request.chat.messages[0] == many[0] and request.chat.messages[-1] == many[-1]
    assert builder.warnings and "left out" in builder.warnings[0]
    unclear = [{"role": "user", "content": "x" * 5000}]
    request = await builder.builder.request(unclear, AnswerSettings(), continued=False)
    assert request.chat == ChatInput(tuple(unclear)), "what was only estimated is for the server to refuse"

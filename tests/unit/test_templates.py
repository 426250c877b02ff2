"""Chat templates: what real ones need, and what hostile ones get (catalogue B12)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from modules.chat.templates import FALLBACK_STOP, TemplateRenderer, check_variables
from modules.errors import InvalidParameter, TemplateError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "templates"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
TURNS = [*HELLO, {"role": "assistant", "content": "Hi, I am"}]


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


async def test_ordinary_template(renderer: TemplateRenderer) -> None:
    prompt = await renderer.render(CHATML, HELLO)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert await renderer.render(CHATML, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


async def test_one_process_serves_many_renders_in_milliseconds(renderer: TemplateRenderer) -> None:
    await renderer.warm()
    pid = renderer.pid
    begin = time.perf_counter()
    texts = await asyncio.gather(*(renderer.render(CHATML, [{"role": "user", "content": str(n)}]) for n in range(50)))
    assert [f"user\n{n}<" in text for n, text in enumerate(texts)] == [True] * 50
    assert renderer.pid == pid
    assert time.perf_counter() - begin < 5


async def test_continue_leaves_the_turn_open(renderer: TemplateRenderer) -> None:
    prompt = await renderer.render(CHATML, TURNS, continue_final=True)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi, I am"
    # A template without a generation prompt: the message itself is rendered and cut.
    prompt = await renderer.render(INST, TURNS, bos_token="<s>", eos_token="</s>", continue_final=True)
    assert prompt == "<s>[INST] Hello [/INST] Hi, I am"


async def test_continue_keeps_trailing_space(renderer: TemplateRenderer) -> None:
    turns = [*HELLO, {"role": "assistant", "content": "Hi, \n"}]
    for template in (CHATML, INST):
        assert (await renderer.render(template, turns, continue_final=True)).endswith("Hi, \n")


async def test_continue_needs_an_assistant_message(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateError, match="assistant"):
        await renderer.render(CHATML, HELLO, continue_final=True)
    with pytest.raises(TemplateError, match="can't be continued"):
        await renderer.render("{{ messages[0].content }}", TURNS, continue_final=True)


async def test_fallback(renderer: TemplateRenderer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *TURNS, {"role": "user", "content": "Who?"}]
    prompt = await renderer.render(None, messages, bos_token="<s>")
    assert prompt == "<s>Be kind.\n\nUser: Hello\nAssistant: Hi, I am\nUser: Who?\nAssistant:"
    assert FALLBACK_STOP[0] == "\nUser:"
    assert await renderer.render("", HELLO) == "User: Hello\nAssistant:"


async def test_what_real_templates_use(renderer: TemplateRenderer) -> None:
    template = (
        "{%- for m in messages -%}{%- if loop.index0 > 0 %}{% break %}{% endif -%}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{%- endfor -%}"
        "|{{ tools | tojson }}|{{ strftime_now('%Y') | length }}|{{ missing }}|{{ messages is defined }}"
    )
    messages = [{"role": "user", "content": " <é> "}, *HELLO]
    prompt = await renderer.render(template, messages, tools=[{"name": "a<b>é"}])
    assert prompt == '<é>|[{"name": "a<b>é"}]|4||True'
    assert await renderer.render("{{ tools is none }}{{ documents is none }}", HELLO) == "TrueTrue"
    assert await renderer.render("{{ {'b': 1} | tojson(indent=2) }}", HELLO) == '{\n  "b": 1\n}'


async def test_unicode_crosses(renderer: TemplateRenderer) -> None:
    text = "naïve 👩‍👩‍👧 漢字 \u202e\x00"
    assert await renderer.render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text
    with pytest.raises(TemplateError, match="Unicode"):
        await renderer.render("{{ '%c' % 55296 }}", HELLO)


async def test_raise_exception_gives_the_templates_own_words(renderer: TemplateRenderer) -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        await renderer.render("{{ raise_exception('Conversation roles must alternate') }}", HELLO)


def test_reserved_variables_are_refused() -> None:
    assert check_variables({"enable_thinking": False}) == {"enable_thinking": False}
    for name in ("messages", "tokenize", "continue_final", "a b"):
        with pytest.raises(InvalidParameter, match=name):
            check_variables({name: 1})


SSTI = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[0] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('touch /tmp/pwned') }}",
    "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ strftime_now.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ ''|attr('__class__') }}",
    "{{ 'a'.format.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ (messages|map('attr', '__class__')|list)[0].mro() }}",
    "{% set x = ''.__class__ %}{{ x.mro() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{% from 'os' import system %}",
    "{{ config.items() }}",
    "{{ request.application.__globals__ }}",
    "{{ nope.deeper }}",
    "{{ nope() }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{% for x in %}",
    "{{ unclosed",
    "{% unknown_tag %}",
]


async def test_escapes_are_template_errors(renderer: TemplateRenderer) -> None:
    for template in SSTI:
        try:
            text = await renderer.render(template, HELLO)
        except TemplateError as error:
            assert error.code == "template_error" and error.http_status == 400
            assert "Traceback" not in str(error)
        else:
            # The sandbox answers an attribute it hides with "undefined", which prints as nothing.
            assert text.strip() == "", template
    assert await renderer.render(CHATML, HELLO)


HEAVY = {
    "a long string": "{{ 'x' * 1000000000 }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "nested loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a growing list": "{% set ns = namespace(l=[1]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that doubles": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(900) }}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "many parentheses": "{{ " + "(" * 90 + "1" + ")" * 90 + " }}" + "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a template of 10 MB": "x" * 10_000_000,
}


@pytest.mark.parametrize("name", HEAVY)
async def test_no_template_hangs(renderer: TemplateRenderer, name: str) -> None:
    await renderer.warm()
    begin = time.perf_counter()
    with pytest.raises(TemplateError):
        await renderer.render(HEAVY[name], HELLO)
    assert time.perf_counter() - begin < 12, "the 2 s cap (10 s on a busy machine)"
    assert await renderer.render(CHATML, HELLO), "the next render works"
    assert psutil.Process().memory_info().rss < 2**30


async def test_a_killed_helper_comes_back(renderer: TemplateRenderer) -> None:
    await renderer.warm()
    first = renderer.pid
    assert first is not None
    psutil.Process(first).kill()
    assert await renderer.render(CHATML, HELLO)
    assert renderer.pid != first


async def test_close_ends_the_helper() -> None:
    renderer = TemplateRenderer()
    await renderer.warm()
    pid = renderer.pid
    await renderer.close()
    assert pid is not None and not psutil.pid_exists(pid)


@pytest.mark.shared
async def test_real_templates(renderer: TemplateRenderer) -> None:
    if not SHARED.is_dir():
        pytest.skip("no shared templates beside the checkout")
    templates = {path.stem: path.read_text(encoding="utf-8") for path in SHARED.glob("chujiezheng/chat_templates/*.jinja")}
    for number, line in enumerate((SHARED / "ollama/testdata/templates.jsonl").read_text(encoding="utf-8").splitlines()):
        templates |= {f"{name}-{number}": text for name, text in json.loads(line).items()}
    assert len(templates) > 40
    user_only = {}
    for name, template in templates.items():
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        prompt = await renderer.render(template, [*turns, {"role": "user", "content": "AGAIN"}], True, "<s>", "</s>")
        assert prompt.index("QUESTION") < prompt.index("ANSWER") < prompt.index("AGAIN"), name
        user_only[name] = await renderer.render(template, turns[:1], True, "<s>", "</s>")
        assert "QUESTION" in user_only[name]
        continued = await renderer.render(template, turns, True, "<s>", "</s>", continue_final=True)
        assert continued.endswith("ANSWER"), name

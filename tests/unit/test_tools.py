"""Tool calls read out of text in every dialect, however the text is cut; tools shown to models that know none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modules.api.answer import AnswerReader, Reasoning, Text, ToolCallArguments, ToolCallStart
from modules.errors import UnsupportedParameter
from modules.reasoning import KNOWN as MARKS
from modules.reasoning import ReasoningSplitter, marks_of
from modules.tools.constrain import force
from modules.tools.dialects import HERMES, KNOWN, Dialect, dialect_of
from modules.tools.prompting import inline
from modules.tools.types import Function, Toolset

ARGUMENTS = {"city": 'Köln "am" Rhein}', "days": 3, "nested": {"a": [1, {"b": None}]}}
CALL = json.dumps(ARGUMENTS, ensure_ascii=False)
BY_NAME = {dialect.name: dialect for _, dialect in KNOWN}


def written(dialect: Dialect) -> str:
    """One call as a model of this family writes it."""
    texts = {
        "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {CALL}}}\n</tool_call>',
        "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{CALL}<|tool_call_end|><|tool_calls_section_end|>",
        "deepseek-r1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{CALL}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        f"{CALL}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "harmony": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{CALL}<|call|>",
        "mistral": f"[TOOL_CALLS]weather[ARGS]{CALL}",
        "mistral-list": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CALL}}}]',
        "command": f'<|START_ACTION|>[\n {{"tool_call_id": "0", "tool_name": "weather", "parameters": {CALL}}}\n]<|END_ACTION|>',
        "functionary": f"<function=weather>{CALL}</function>",
        "nemotron": f'<TOOLCALL>[{{"name": "weather", "arguments": {CALL}}}]</TOOLCALL>',
        "internlm": f'<|action_start|><|plugin|>\n{{"name": "weather", "parameters": {CALL}}}<|action_end|>',
        "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {CALL}}}]',
        "llama": f'{{"name": "weather", "parameters": {CALL}}}',
        "glm": '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln "am" Rhein}</arg_value>\n<arg_key>days</arg_key>\n'
        '<arg_value>3</arg_value>\n<arg_key>nested</arg_key>\n<arg_value>{"a": [1, {"b": null}]}</arg_value>\n</tool_call>',
        "qwen-coder": '<tool_call>\n<function=weather>\n<parameter=city>\nKöln "am" Rhein}\n</parameter>\n<parameter=days>\n3\n'
        '</parameter>\n<parameter=nested>\n{"a": [1, {"b": null}]}\n</parameter>\n</function>\n</tool_call>',
    }
    return texts[dialect.name]


def read(
    dialect: Dialect | None, text: str, size: int, names: tuple[str, ...] = ("weather", "time"), **more: Any
) -> tuple[str, list[Any]]:
    """(text, calls) after feeding `text` in pieces of `size`; the arguments' pieces must add up to the whole."""
    reader = AnswerReader(dialect=dialect, names=frozenset(names), **more)
    parts = [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])] + reader.finish()
    pieces: dict[int, str] = {}
    for part in parts:
        if isinstance(part, ToolCallStart):
            pieces[part.index] = ""
        elif isinstance(part, ToolCallArguments):
            pieces[part.index] += part.text
    assert [call.arguments for call in reader.calls] == list(pieces.values())
    calls = [(call.name, json.loads(call.arguments)) for call in reader.calls]
    return "".join(part.text for part in parts if isinstance(part, Text)), calls


@pytest.mark.parametrize("dialect", {d.name: d for _, d in KNOWN}.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_call_is_read_in_every_dialect(dialect: Dialect, size: int) -> None:
    text, calls = read(dialect, written(dialect), size)
    assert calls == [("weather", ARGUMENTS)]
    assert not text.strip()


@pytest.mark.parametrize("name", ["hermes", "kimi", "deepseek-v3", "qwen-coder", "functionary", "glm"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_text_before_and_several_calls(name: str, size: int) -> None:
    one = written(BY_NAME[name])
    text, calls = read(BY_NAME[name], f"Let me look.\n\n{one}\n{one}", size)
    assert text.strip() == "Let me look."
    assert calls == [("weather", ARGUMENTS)] * 2


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_list_of_calls(size: int) -> None:
    body = '[{"name": "weather", "arguments": {"a": 1}}, {"arguments": {"b": [2]}, "name": "time"}, {"name": "time"}]'
    _, calls = read(BY_NAME["mistral-list"], f"[TOOL_CALLS]{body}", size)
    assert calls == [("weather", {"a": 1}), ("time", {"b": [2]}), ("time", {})]


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "no call at all, but < and <tool and <tool_cal",
        'a call of nobody: <tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> as text',
        "a broken one: <tool_call>\nhello\n</tool_call>",
        "an open end <tool_call>",
    ],
)
def test_what_only_looks_like_a_call_stays_text(text: str, size: int) -> None:
    got, calls = read(HERMES, text, size)
    assert calls == []
    assert got == text


@pytest.mark.parametrize("size", [1, 1000])
def test_json_that_is_no_call_stays_text_where_calls_are_bare(size: int) -> None:
    text = '{"answer": 42, "list": [1, 2]}'
    assert read(BY_NAME["llama"], text, size) == (text, [])


def test_arguments_come_while_they_are_written() -> None:
    reader = AnswerReader(dialect=HERMES, names=frozenset({"weather"}))
    assert reader.feed('<tool_call>\n{"name": "weath') == []
    (start,) = reader.feed('er", ')
    assert isinstance(start, ToolCallStart)
    assert start.name == "weather"
    assert [p.text for p in reader.feed('"arguments": {"city": "Pa') if isinstance(p, ToolCallArguments)] == ['{"city": "Pa']
    assert [p.text for p in reader.feed('ris"}') if isinstance(p, ToolCallArguments)] == ['ris"}']


def test_only_one_call_where_parallel_ones_are_off() -> None:
    one = written(HERMES)
    assert len(read(HERMES, one + one, 9, parallel=False)[1]) == 1


def test_a_cut_off_call_keeps_what_was_written() -> None:
    reader = AnswerReader(dialect=HERMES, names=frozenset({"weather"}))
    reader.feed('<tool_call>{"name": "weather", "arguments": {"city": "Par')
    reader.finish()
    assert reader.calls[0].arguments == '{"city": "Par'


# --- which dialect ------------------------------------------------------------------------------------------------


def test_a_template_tells_its_dialect() -> None:
    assert dialect_of(None) is HERMES
    assert dialect_of("{{ messages }}") is HERMES
    for marks, dialect in KNOWN:
        assert dialect_of("{% if tools %}" + " ".join(marks)).kind == dialect.kind, dialect.name
    assert dialect_of("{% if tools %}[TOOL_CALLS] x [ARGS]").name == "mistral"
    assert dialect_of("{% if tools %}<tool_call><function=x><parameter=y>").name == "qwen-coder"


# --- forced -------------------------------------------------------------------------------------------------------

WEATHER = Function(
    "weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
)
TIME = Function("time")


def test_a_forced_call_is_a_schema_after_the_mark() -> None:
    held = force(Toolset((WEATHER, TIME), "weather"), HERMES)
    assert held.opening == "<tool_call>\n"
    assert held.schema["properties"]["name"] == {"const": "weather"}
    assert held.schema["properties"]["arguments"]["additionalProperties"] is False
    assert len(force(Toolset((WEATHER, TIME), "required"), HERMES).schema["anyOf"]) == 2
    assert force(Toolset((WEATHER,), "required"), BY_NAME["mistral"]).opening == "[TOOL_CALLS]weather[ARGS]"
    with pytest.raises(UnsupportedParameter) as caught:
        force(Toolset((WEATHER, TIME), "required"), BY_NAME["mistral"])
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama", "mistral-list", "kimi", "functionary", "command"])
def test_what_a_forced_answer_holds_is_read_as_a_call(name: str) -> None:
    """The prompt has the opening, the answer only the rest."""
    dialect = BY_NAME[name]
    held = force(Toolset((WEATHER,), "weather"), dialect)
    arguments = {"city": "Rom"}
    value: Any = arguments if dialect.kind == "named" else {dialect.name_key: "weather", dialect.arguments_key: arguments}
    text = json.dumps([value] if dialect.listed else value)
    _, calls = read(dialect, text, 2, call_open=held.opening)
    assert calls == [("weather", arguments)]


# --- prompting ----------------------------------------------------------------------------------------------------


def test_tools_as_text_for_a_template_that_knows_none() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rom"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "windy"},
    ]
    shown = inline(messages, Toolset((WEATHER,)))
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "user"]
    assert shown[0]["content"].startswith("Be brief.")
    assert '"name": "weather"' in shown[0]["content"]
    assert read(HERMES, shown[2]["content"], 3)[1] == [("weather", {"city": "Rom"})] * 2
    assert shown[3]["content"].count("<tool_response>") == 2
    assert inline(messages, Toolset((WEATHER,), "none"))[0]["content"] == "Be brief."


# --- reasoning ----------------------------------------------------------------------------------------------------


def split(text: str, size: int, *, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(MARKS[0], inside=inside)
    pieces = [piece for at in range(0, len(text), size) for piece in splitter.feed(text[at : at + size])] + splitter.finish()
    return tuple("".join(t for kind, t in pieces if kind == wanted) for wanted in ("reasoning", "text"))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nhm, 1 < 2\n\nso\n</think>\n\nYes.", False, ("hm, 1 < 2\n\nso", "Yes.")),
        ("hm\n</think>\n\nYes.\n", True, ("hm", "Yes.\n")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("Yes, <think> is a tag.", False, ("", "Yes, <think> is a tag.")),
        ("<thin air>", False, ("", "<thin air>")),
        ("never ends </thin", True, ("never ends </thin", "")),
        ("", False, ("", "")),
    ],
)
def test_reasoning_is_told_apart(text: str, inside: bool, expected: tuple[str, str], size: int) -> None:
    assert split(text, size, inside=inside) == expected


def test_a_template_tells_its_marks() -> None:
    assert marks_of("... <think> ... </think>") is MARKS[0]
    assert marks_of("{{ content.split('</think>')[-1] }}") is MARKS[0]
    assert marks_of("<|user|>hello<|end|>") is None  # Phi ends every turn so
    harmony = marks_of("<|channel|>analysis<|message|> <|end|>")
    assert harmony is not None
    assert harmony.special
    assert marks_of(None) is None


def test_channels_are_reasoning_text_and_calls() -> None:
    """gpt-oss: thoughts, then a call, in channels."""
    marks = marks_of("<|channel|>analysis<|message|> <|end|>")
    assert marks is not None
    text = (
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city":"Rom"}<|call|>'
    )
    for size in (1, 6, 1000):
        reader = AnswerReader(dialect=BY_NAME["harmony"], splitter=ReasoningSplitter(marks), names=frozenset({"weather"}))
        parts = [p for at in range(0, len(text), size) for p in reader.feed(text[at : at + size])] + reader.finish()
        assert "".join(p.text for p in parts if isinstance(p, Reasoning)) == "Need the weather."
        assert "".join(p.text for p in parts if isinstance(p, Text)).strip() == ""
        assert [(c.name, c.arguments) for c in reader.calls] == [("weather", '{"city":"Rom"}')]
    final = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    reader = AnswerReader(dialect=BY_NAME["harmony"], splitter=ReasoningSplitter(marks), names=frozenset())
    parts = [p for at in range(0, len(final), 4) for p in reader.feed(final[at : at + 4])] + reader.finish()
    assert "".join(p.text for p in parts if isinstance(p, Text)) == "Hello!"

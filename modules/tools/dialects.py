"""How model families write tool calls, and which way a chat template asks for.

Three kinds cover them: "object" (a JSON object or list of them, with the name inside), "named" (the name, a separator, then the
arguments as JSON) and "tags" (the name and each argument in tags of their own).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to write calls.

    `open` comes before a call (or a list of them), `close` after it. "named" has the name between `open` and `separator`;
    what a pattern in `name_pattern` leaves out of the name (a prefix, a counter) is not the function's. `bare`: the JSON may
    also stand at the very beginning of the answer, without the mark. `special`: the marks are special tokens, which a
    tokenizer hides unless asked. `listed`: the object kind writes a list. `noise`: other marks around calls and text, dropped.
    """

    name: str
    kind: Literal["object", "named", "tags"]
    open: str
    close: str = ""
    separator: str = ""
    name_pattern: str = r"\s*(?P<name>[\w.\-]+)\s*"
    bare: bool = False
    special: bool = False
    listed: bool = False
    arguments_key: str = "arguments"
    name_key: str = "name"
    noise: tuple[str, ...] = ()


HERMES = Dialect("hermes", "object", "<tool_call>", "</tool_call>")

# What a template must hold -> its dialect. The first match counts, so the more telling marks come first.
KNOWN: tuple[tuple[tuple[str, ...], Dialect], ...] = (
    (
        ("<|tool_call_argument_begin|>",),
        Dialect(
            "kimi",
            "named",
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
            name_pattern=r"\s*(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?\s*",
            special=True,
            noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ),
    ),
    (
        ("<｜tool▁calls▁begin｜>", "```json"),
        Dialect(
            "deepseek-r1",
            "named",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```<｜tool▁call▁end｜>",
            "\n```json\n",
            special=True,
            noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    (
        ("<｜tool▁calls▁begin｜>",),
        Dialect(
            "deepseek-v3",
            "named",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            special=True,
            noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    (
        ("<|channel|>", "<|call|>"),
        Dialect(
            "harmony",
            "named",
            "<|channel|>commentary to=functions.",
            "<|call|>",
            "<|message|>",
            name_pattern=r"(?P<name>[\w.\-]+)\s*(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>\s*)?(?:json)?\s*",
            special=True,
            noise=("<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|start|>assistant", "<|end|>"),
        ),
    ),
    (("[TOOL_CALLS]", "[ARGS]"), Dialect("mistral", "named", "[TOOL_CALLS]", "", "[ARGS]", special=True)),
    (("[TOOL_CALLS]",), Dialect("mistral-list", "object", "[TOOL_CALLS]", "", special=True, listed=True)),
    (
        ("<|START_ACTION|>",),
        Dialect(
            "command",
            "object",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            special=True,
            listed=True,
            name_key="tool_name",
            arguments_key="parameters",
        ),
    ),
    (("<arg_key>",), Dialect("glm", "tags", "<tool_call>", "</tool_call>")),
    (("<function=", "<parameter="), Dialect("qwen-coder", "tags", "<tool_call>", "</tool_call>")),
    (("<function=",), Dialect("functionary", "named", "<function=", "</function>", ">")),
    (("<TOOLCALL>",), Dialect("nemotron", "object", "<TOOLCALL>", "</TOOLCALL>", listed=True)),
    (("<|action_start|>",), Dialect("internlm", "object", "<|action_start|><|plugin|>", "<|action_end|>", special=True)),
    (("<|tool_call|>",), Dialect("granite", "object", "<|tool_call|>", "", special=True, listed=True)),
    (("<tool_call>",), HERMES),
    (("<|python_tag|>",), Dialect("llama", "object", "<|python_tag|>", "", bare=True, special=True, arguments_key="parameters")),
    (('"parameters"', '"name"'), Dialect("llama", "object", "<|python_tag|>", "", bare=True, arguments_key="parameters")),
)


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model itself."""
    return template is not None and re.search(r"\btools\b", template) is not None


def is_channelled(template: str | None) -> bool:
    """Whether every answer comes in channels (gpt-oss), so that it must be read even where no tool is offered."""
    return "<|channel|>analysis<|message|>" in (template or "")


def dialect_of(template: str | None) -> Dialect:
    """How a model with this template writes calls; the widespread <tool_call> form where nothing says."""
    if template is not None and (knows_tools(template) or is_channelled(template)):
        for marks, dialect in KNOWN:
            if all(mark in template for mark in marks):
                return dialect
    return HERMES

"""Tools for a model whose chat template knows none: told in the system message, calls and results as marked text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modules.tools.types import Toolset

_INTRODUCTION = """You can call functions. Each line describes one as JSON:
{functions}

To call a function, answer with only this, and nothing after it:
<tool_call>
{{"name": "FUNCTION", "arguments": {{"PARAMETER": VALUE}}}}
</tool_call>{several}
The result then comes as <tool_response>. When no function helps, answer in words."""
_SEVERAL = "\nFor several calls, write several such blocks."


def describe(toolset: Toolset) -> str:
    """What the system message says about the tools."""
    lines = "\n".join(json.dumps(f.openai()["function"], ensure_ascii=False) for f in toolset.offered)
    return _INTRODUCTION.format(functions=lines, several=_SEVERAL if toolset.parallel else "")


def inline(messages: Sequence[dict[str, Any]], toolset: Toolset | None) -> list[dict[str, Any]]:
    """The messages with tools, calls and results as text that any template can show."""
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if result and result[-1]["role"] == "user" and result[-1]["content"].endswith("</tool_response>"):
                result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n{text}"}  # templates want turns to alternate
            else:
                result.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = "\n".join(call_text(call) for call in message["tool_calls"])
            result.append({"role": "assistant", "content": f"{message['content']}\n{calls}".strip()})
        else:
            result.append(message)
    if toolset is not None and toolset.offered:
        told = describe(toolset)
        if result and result[0]["role"] == "system":
            result[0] = {**result[0], "content": f"{result[0]['content']}\n\n{told}"}
        else:
            result.insert(0, {"role": "system", "content": told})
    return result


def call_text(call: dict[str, Any]) -> str:
    """One call of an earlier turn, as the model would have written it."""
    function = call["function"]
    body = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"

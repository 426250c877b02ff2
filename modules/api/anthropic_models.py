"""Anthropic's bodies as Turns: content blocks, tools, system, thinking."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modules.api.openai_models import check_stops, toolset_of
from modules.api.turn import Turn, split_extras
from modules.errors import InvalidParameter, UnsupportedParameter
from modules.image_urls import image_source
from modules.images import from_base64
from modules.schema import StopParams
from modules.structured import check_schema

MAX_BLOCKS = 10_000
# Fields of the protocol that change nothing about a local model's answer.
SILENT = frozenset("metadata service_tier inference_geo betas context_management container speed cache_control".split())


class Message(BaseModel):
    """`content` is text or a list of content blocks, checked by `anthropic_turn`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)


class CountRequest(BaseModel):
    """What counting tokens and answering have in common."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str
    messages: list[Message] = Field(min_length=1, max_length=100_000)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1, le=2**31 - 1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None


def anthropic_turn(body: CountRequest, *, strict: bool) -> Turn:
    """Check a body. Raises InvalidParameter or UnsupportedParameter."""
    extras = {name: value for name, value in (body.model_extra or {}).items() if name not in SILENT}
    if extras.pop("mcp_servers", None):
        raise UnsupportedParameter("MCP servers are not called from here.", hint="Offer their tools.", param="mcp_servers")
    values, warnings = split_extras(extras)
    limit = getattr(body, "max_tokens", None)
    stops = check_stops(getattr(body, "stop_sequences", None), "stop_sequences")
    stop = StopParams(max_tokens=limit, stop=stops, ignore_eos=bool(values.get("ban_eos_token")))
    turn = Turn(values, stop, warnings, strict)
    system = _text(body.system, "system") if body.system else ""
    turn.messages = [{"role": "system", "content": system}] if system else []
    for index, message in enumerate(body.messages):
        _add(turn.messages, message, f"messages.{index}")
    _add_tools(turn, body)
    if body.thinking is not None:
        turn.template_variables["enable_thinking"] = body.thinking.type != "disabled"
        if body.thinking.budget_tokens is not None and body.thinking.type == "enabled":
            warnings.append("thinking.budget_tokens has no effect here.")
    _add_output(turn, body)
    return turn


def _add_tools(turn: Turn, body: CountRequest) -> None:
    flat = []
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type", "custom") != "custom" or "input_schema" not in tool:
            raise UnsupportedParameter(
                "Only tools of your own (a name and an input_schema) can be used here.", param=f"tools.{index}"
            )
        flat.append({"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]})
        flat[-1]["strict"] = tool.get("strict")
    given = body.tool_choice or {"type": "auto"}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": {"name": given.get("name")}}
    if given.get("type") not in kinds:
        raise InvalidParameter("tool_choice.type must be auto, any, tool or none.", param="tool_choice.type")
    choice = kinds[given["type"]]
    turn.tools = toolset_of(flat, choice, parallel=given.get("disable_parallel_tool_use") is not True)


def _add_output(turn: Turn, body: CountRequest) -> None:
    """Structured output, and the effort that newer clients send beside it."""
    config = body.output_config or {}
    wanted = body.output_format or config.get("format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        schema = wanted.get("schema")
        if not isinstance(schema, dict):
            raise InvalidParameter("The output format needs a schema.", param="output_config.format.schema")
        turn.json_schema = check_schema(schema, "output_config.format.schema")
    elif wanted is not None:
        raise UnsupportedParameter("The output format must be json_schema.", param="output_config.format")
    if config.get("effort") in ("low", "medium", "high"):
        turn.template_variables["reasoning_effort"] = config["effort"]


# --- content blocks ------------------------------------------------------------------------------------------------


def _add(messages: list[dict[str, Any]], message: Message, param: str) -> None:
    """One message as one or more of ours: the results of tools are messages of their own and come first."""
    if isinstance(message.content, str):
        _append(messages, {"role": message.role, "content": message.content})
        return
    if len(message.content) > MAX_BLOCKS:
        raise InvalidParameter(f"A message may hold at most {MAX_BLOCKS} blocks.", param=f"{param}.content")
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        where, kind = f"{param}.content.{number}", block.get("type")
        if kind == "tool_result" and message.role == "user":
            messages.append(_result(block, where))
        elif kind == "tool_use" and message.role == "assistant":
            calls.append(_call(block, where))
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "image" and message.role == "user":
            parts.append({"type": "image", "image": _image(block, where)})
        elif kind != "redacted_thinking":
            parts.append({"type": "text", "text": _block_text(block, where)})
    if message.role == "user" and not parts:
        return
    entry: dict[str, Any] = {"role": message.role, "content": "".join(p["text"] for p in parts if p["type"] == "text")}
    if any(part["type"] == "image" for part in parts):
        entry["parts"] = parts
    if calls:
        entry["tool_calls"] = calls
    if thoughts:
        entry["reasoning_content"] = "\n".join(thoughts)
    _append(messages, entry)


def _append(messages: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Messages of one side in a row are one turn, as Anthropic reads them; many templates allow no other."""
    last = messages[-1] if messages else {}
    if last.get("role") == entry["role"] and not last.get("tool_calls"):
        if "parts" in last or "parts" in entry:
            both = (message.get("parts") or [{"type": "text", "text": message["content"]}] for message in (last, entry))
            last["parts"] = [part for parts in both for part in parts]
        last["content"] = "\n\n".join(text for text in (last["content"], entry["content"]) if text)
        last.update({key: value for key, value in entry.items() if key not in ("role", "content", "parts")})
    else:
        messages.append(entry)


def _image(block: dict[str, Any], param: str) -> str:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "base64" and isinstance(source, dict) and isinstance(source.get("data"), str):
        return from_base64(source["data"], f"{param}.source.data")
    if kind == "url" and isinstance(source, dict) and isinstance(source.get("url"), str):
        return image_source(source["url"], f"{param}.source.url")
    raise InvalidParameter("An image needs its source: base64 with data, or url.", param=f"{param}.source")


def _result(block: dict[str, Any], param: str) -> dict[str, Any]:
    call = block.get("tool_use_id")
    if not isinstance(call, str) or not call:
        raise InvalidParameter("A tool_result needs the tool_use_id it answers.", param=f"{param}.tool_use_id")
    content = block.get("content")
    text = _text(content, f"{param}.content") if content else ""
    return {"role": "tool", "tool_call_id": call, "content": f"Error: {text}" if block.get("is_error") is True else text}


def _call(block: dict[str, Any], param: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(block.get("id"), str) or not isinstance(arguments, dict):
        raise InvalidParameter("A tool_use needs id, name and input.", param=param)
    return {"id": block["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: Any, param: str) -> str:
    """Text, or the text of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InvalidParameter("This must be text or a list of content blocks.", param=param)
    return "\n".join(_block_text(block, f"{param}.{index}") for index, block in enumerate(content))


def _block_text(block: dict[str, Any], param: str) -> str:
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    source = block.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text" and isinstance(source.get("data"), str):
        title = block.get("title")
        return f"<document{f' title={json.dumps(title)}' if isinstance(title, str) else ''}>\n{source['data']}\n</document>\n"
    if kind in ("image", "document", "search_result", "file"):
        raise UnsupportedParameter("Files, search results and images outside a user's message are not read.", param=param)
    if kind == "text":
        raise InvalidParameter("A text block needs its text.", param=f"{param}.text")
    raise InvalidParameter("There is no such content block here.", param=f"{param}.type")

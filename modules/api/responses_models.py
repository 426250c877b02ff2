"""The body of /v1/responses, and its input items as canonical messages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modules.api.openai_models import MAX_FUNCTIONS, MaxTokens, content_of, text_of, toolset_of
from modules.api.openai_turns import hold_to, thinking_variables
from modules.api.turn import Turn, split_extras, tool_arguments
from modules.errors import InvalidParameter, UnsupportedParameter
from modules.schema import StopParams

MAX_ITEMS = 10_000


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None


class ResponsesRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: MaxTokens | None = None
    tools: list[Any] | None = Field(None, max_length=MAX_FUNCTIONS)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    include: list[str] | None = None
    conversation: Any = None
    prompt: Any = None
    user: str | None = None
    strict: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def response_turn(body: ResponsesRequest, earlier: list[dict[str, Any]], *, strict: bool) -> Turn:
    """The body as a Turn after the `earlier` messages. Raises InvalidParameter or UnsupportedParameter."""
    for name in ("background", "conversation", "prompt"):
        if getattr(body, name):
            raise UnsupportedParameter(f"{name} is not supported.", hint="Leave it out.", param=name)
    values, warnings = split_extras(body.model_extra or {})
    messages = [*earlier, *input_messages(body.input)]
    if body.instructions:  # of this response only: those of earlier ones are not carried on
        messages = [{"role": "system", "content": body.instructions}, *messages]
    stop = StopParams(max_tokens=body.max_output_tokens, ignore_eos=bool(values.get("ban_eos_token")))
    turn = Turn(values, stop, warnings, strict if body.strict is None else body.strict, messages=messages)
    turn.continue_final = False
    turn.tools = toolset_of(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
    turn.template_variables = thinking_variables(body.reasoning.effort if body.reasoning else None, None)
    if "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs:
        turn.logprobs = body.top_logprobs or 0
    wanted = body.text.format if body.text else None
    if wanted is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise InvalidParameter("text.format needs its schema.", param="text.format.schema")
        hold_to(turn, schema=wanted.schema_ if wanted.type == "json_schema" else {"type": "object"}, param="text.format")
    return turn


def input_messages(given: Any) -> list[dict[str, Any]]:
    """`input` as canonical messages. Raises InvalidParameter with the item's index."""
    if isinstance(given, str):
        if not given:
            raise InvalidParameter("input is empty.", param="input")
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= MAX_ITEMS:
        raise InvalidParameter(f"input must be text or a list of 1 to {MAX_ITEMS} items.", param="input")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        _add_item(messages, item, f"input.{index}")
    if not messages:
        raise InvalidParameter("input holds nothing to answer.", param="input")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, param: str) -> None:
    if not isinstance(item, dict):
        raise InvalidParameter("An input item must be an object.", param=param)
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise InvalidParameter("role must be user, assistant, system or developer.", param=f"{param}.role")
        content = content_of(item.get("content"), f"{param}.content", images=role == "user")
        messages.append({"role": "system" if role == "developer" else role, **content})
    elif kind == "function_call":
        name, call_id = item.get("name"), item.get("call_id")
        if not isinstance(name, str) or not isinstance(call_id, str):
            raise InvalidParameter("A function_call needs its name and call_id.", param=param)
        arguments = tool_arguments(item.get("arguments"), f"{param}.arguments")
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise InvalidParameter("A function_call_output needs the call_id it answers.", param=f"{param}.call_id")
        output = text_of(item.get("output"), f"{param}.output")
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    elif kind != "reasoning":  # earlier thoughts are not shown to the model again
        raise UnsupportedParameter("This kind of input item can't be used here.", param=f"{param}.type")

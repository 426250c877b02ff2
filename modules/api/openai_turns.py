"""OpenAI's bodies as Turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.api.openai_models import messages_of, toolset_of
from modules.api.turn import MAX_TOTAL_TOKENS, Turn
from modules.chat.templates import check_variables
from modules.errors import InvalidParameter, UnsupportedParameter
from modules.schema import StopParams
from modules.structured import check_gbnf, check_regex, check_schema

if TYPE_CHECKING:
    from modules.api.openai_models import ChatRequest, Common, CompletionRequest


def chat_turn(body: ChatRequest, *, strict: bool) -> Turn:
    """Check a chat body. Raises InvalidParameter or UnsupportedParameter."""
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    turn = common_turn(body, limit, strict)
    turn.messages = messages_of(body)
    if not any(m["content"] or m.get("parts") for m in turn.messages) and all(m["role"] == "system" for m in turn.messages):
        raise InvalidParameter("messages holds nothing to answer.", param="messages")
    turn.continue_final = _continued(body, turn.messages)
    turn.template_variables = thinking_variables(body.reasoning_effort, body.enable_thinking)
    turn.template_variables |= check_variables(body.chat_template_kwargs or {})
    tools, choice = body.tools, body.tool_choice
    if not tools and body.functions:  # the older form of the same
        tools = [{"type": "function", "function": function} for function in body.functions]
        choice = body.function_call
    turn.tools = toolset_of(tools, choice, parallel=body.parallel_tool_calls)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs: true.", param="top_logprobs")
    turn.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    structure(turn, body, body.response_format)
    return turn


def thinking_variables(effort: str | None, enabled: bool | None) -> dict[str, Any]:
    """Reasoning wishes as the variables that templates know: `enable_thinking` (Qwen, GLM), `reasoning_effort` (gpt-oss)."""
    variables: dict[str, Any] = {}
    if effort is not None:
        variables["reasoning_effort"] = {"none": "low", "minimal": "low", "xhigh": "high"}.get(effort, effort)
        variables["enable_thinking"] = effort not in ("none", "minimal")
    if enabled is not None:
        variables["enable_thinking"] = enabled
    return variables


def _continued(body: ChatRequest, messages: list[dict[str, Any]]) -> bool | None:
    """Whether the last message, the assistant's, is to be continued; None leaves it to its content."""
    asked = body.continue_final_message
    if asked is None and body.add_generation_prompt is False:
        asked = True
    if asked and messages[-1]["role"] != "assistant":
        raise InvalidParameter("Only a last message of the assistant can be continued.", param="continue_final_message")
    return asked


def completion_turns(body: CompletionRequest, *, strict: bool) -> list[Turn]:
    """One turn for each prompt. Raises InvalidParameter or UnsupportedParameter."""
    n = body.n or 1
    if body.best_of is not None and body.best_of < n:
        raise InvalidParameter("best_of must be at least n.", param="best_of")
    if body.best_of is not None and body.best_of > n and body.stream:
        raise InvalidParameter("best_of can't be streamed: the best answer is known at the end.", param="best_of")
    if body.suffix and body.echo:
        raise InvalidParameter("suffix and echo can't be used together.", param="suffix")
    turns = []
    limit = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this endpoint
    for prompt in body.prompts():
        turn = common_turn(body, limit, strict, allow_zero=bool(body.echo))
        turn.logprobs, turn.echo = body.logprobs, bool(body.echo)
        turn.add_special = True if body.add_special is None else body.add_special
        if isinstance(prompt, str):
            turn.prompt, turn.suffix = prompt, body.suffix or None
        elif body.suffix:
            raise UnsupportedParameter("suffix needs a prompt of text.", param="suffix")
        else:
            turn.token_ids = tuple(prompt)
        structure(turn, body, body.response_format)
        turns.append(turn)
    return turns


def common_turn(body: Common, limit: int | None, strict: bool, *, allow_zero: bool = False) -> Turn:
    """What both endpoints share. Raises InvalidParameter."""
    values, warnings = body.extras()
    least = 0 if allow_zero else 1
    if limit is not None and limit < least:
        raise InvalidParameter(f"max_tokens must be at least {least}.", param="max_tokens")
    many = max(body.n or 1, getattr(body, "best_of", None) or 1)
    if many * (limit or 1) > MAX_TOTAL_TOKENS:
        raise InvalidParameter(f"n times max_tokens must be at most {MAX_TOTAL_TOKENS}.", param="n")
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream: true.", param="stream_options")
    stop = StopParams(
        max_tokens=limit,
        min_tokens=body.min_tokens or 0,
        stop=body.stops(),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(values.get("ban_eos_token") or body.ignore_eos),
    )
    turn = Turn(values, stop, warnings, strict if body.strict is None else body.strict)
    turn.return_token_ids = bool(body.return_token_ids)
    return turn


def structure(turn: Turn, body: Common, response_format: Any) -> None:
    """The form the answer is held to. Raises InvalidParameter for two at once, InvalidGrammar for a bad one."""
    grammar = body.grammar or body.grammar_string or None
    schema = body.json_schema
    if response_format is not None and response_format.type == "json_object":
        schema = {"type": "object"}
    elif response_format is not None and response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise InvalidParameter("response_format needs its json_schema.", param="response_format.json_schema")
        schema = response_format.json_schema.schema_
    hold_to(turn, schema=schema, grammar=grammar, regex=body.regex)


def hold_to(
    turn: Turn,
    *,
    schema: dict[str, Any] | None = None,
    grammar: str | None = None,
    regex: str | None = None,
    param: str = "response_format",
) -> None:
    """Hold the answer to at most one form. Raises InvalidParameter for two at once, InvalidGrammar for a bad one."""
    if sum(item is not None for item in (grammar, schema, regex)) > 1:
        raise InvalidParameter("Only one of response_format, json_schema, grammar and regex can be used.", param=param)
    turn.grammar = check_gbnf(grammar) if grammar is not None else None
    turn.json_schema = check_schema(schema, param) if schema is not None else None
    turn.regex = check_regex(regex) if regex is not None else None

"""The bodies of the OpenAI endpoints, strict: true and "12" are no integers, and nothing is taken that has no meaning.

Sampling parameters are not listed here: every name and alias of modules.sampling is accepted as an extra field and checked
by that table. What else is extra is either refused (what the operator owns) or named in the answer's `warnings`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modules.api.turn import shown, split_extras, tool_arguments
from modules.errors import InvalidParameter, UnsupportedParameter
from modules.image_urls import image_source
from modules.structured import check_schema
from modules.tools.types import Function, Toolset

MAX_STOPS, MAX_STOP_CHARS = 64, 256
MAX_FUNCTIONS = 128
_IMAGES = ("image_url", "input_image")
ModelT = TypeVar("ModelT", bound=BaseModel)
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Message(BaseModel):
    """`content` is text or a list of parts; it is checked by `text_of`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[Any] | None = Field(None, max_length=MAX_FUNCTIONS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Common(BaseModel):
    """What both endpoints take. `ignore_eos` goes on past an end token, as vLLM does; `ban_eos_token` lets none be picked."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, le=2**31 - 1)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=128)
    stop: Any = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] | None = Field(None, max_length=MAX_STOPS)
    grammar: str | None = None
    grammar_string: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    strict: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop sequences. Raises InvalidParameter."""
        return check_stops(self.stop)

    def extras(self) -> tuple[dict[str, Any], list[str]]:
        """(checked sampling parameters, warnings about fields without effect). Raises InvalidParameter."""
        return split_extras(self.model_extra or {})


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1, max_length=100_000)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = Field(None, max_length=MAX_FUNCTIONS)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, max_length=MAX_FUNCTIONS)
    function_call: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Common):
    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: str | None = None
    add_special: bool | None = None
    response_format: ResponseFormat | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or token ids. Raises InvalidParameter."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise InvalidParameter("prompt must be a string, a list of strings, or token ids.", param="prompt")
        if all(_is_token(item) for item in prompt):
            return [prompt]
        if len(prompt) > 128:
            raise InvalidParameter("prompt may hold at most 128 prompts.", param="prompt")
        for index, item in enumerate(prompt):
            tokens = isinstance(item, list) and item and all(_is_token(token) for token in item)
            if not isinstance(item, str) and not tokens:
                raise InvalidParameter("A prompt must be a string or a list of token ids.", param=f"prompt.{index}")
        return list(prompt)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_stops(stop: Any, param: str = "stop") -> tuple[str, ...]:
    """Stop sequences: one string or a list of them. Raises InvalidParameter."""
    given = [stop] if isinstance(stop, str) else stop
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise InvalidParameter(f"{param} must be a string or a list of strings.", param=param)
    if len(given) > MAX_STOPS or any(not 0 < len(item) <= MAX_STOP_CHARS for item in given):
        raise InvalidParameter(f"{param} must hold at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.", param=param)
    return tuple(given)


def parse(model: type[ModelT], body: dict[str, Any]) -> ModelT:
    """The checked body. Raises InvalidParameter for the first thing wrong, with its path as `param`."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = [str(part) for part in first["loc"] if not _type_word(part)]
        param = shown(".".join(path)) or None
        if first["type"] == "missing":
            raise InvalidParameter(f"{param} is missing.", param=param) from None
        raise InvalidParameter(f"{param}: {_sentence(first['msg'])}", param=param) from None


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Raises InvalidParameter or UnsupportedParameter with the index."""
    result: list[dict[str, Any]] = []
    for index, message in enumerate(request.messages):
        param = f"messages.{index}"
        role = "system" if message.role == "developer" else message.role
        if role == "tool" and not message.tool_call_id:
            raise InvalidParameter("A tool message needs the tool_call_id it answers.", param=f"{param}.tool_call_id")
        if message.content is None and not (role == "assistant" and message.tool_calls):
            raise InvalidParameter("A message needs content.", param=f"{param}.content")
        if message.name is not None and re.search(r"[\x00-\x1f\x7f]", message.name):
            raise InvalidParameter("A name holds a control character.", param=f"{param}.name")
        entry: dict[str, Any] = {"role": role, **content_of(message.content, f"{param}.content", images=role == "user")}
        if message.name:
            entry["name"] = message.name
        if message.tool_calls:
            entry["tool_calls"] = _calls_of(message.tool_calls, f"{param}.tool_calls")
        if message.reasoning_content and role == "assistant":
            entry["reasoning_content"] = message.reasoning_content
        if message.tool_call_id:
            entry["tool_call_id"] = message.tool_call_id
        result.append(entry)
    return result


def _calls_of(calls: list[Any], param: str) -> list[dict[str, Any]]:
    """Calls of an earlier turn, as templates take them: arguments as an object."""
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidParameter("A tool call needs its function's name.", param=f"{param}.{index}")
        arguments = tool_arguments(function.get("arguments"), f"{param}.{index}.function.arguments")
        made = {"id": str(call.get("id") or ""), "type": "function"}
        checked.append({**made, "function": {"name": function["name"], "arguments": arguments}})
    return checked


def toolset_of(tools: list[Any] | None, choice: Any, *, parallel: bool | None = None, param: str = "tools") -> Toolset | None:
    """OpenAI's tools and tool_choice, checked. Also Responses' flat form. Raises InvalidParameter or UnsupportedParameter."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidParameter("tool_choice needs tools.", param="tool_choice")
        return None
    functions = tuple(_function_of(tool, f"{param}.{index}") for index, tool in enumerate(tools))
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise InvalidParameter("Two tools have the same name.", param=param)
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        allowed = choice.get("type")
        if allowed not in ("function", None) or name not in names:
            raise InvalidParameter("tool_choice names a function that is not among tools.", param="tool_choice")
        return Toolset(functions, str(name), parallel is not False)
    if choice not in (None, "auto", "none", "required"):
        raise InvalidParameter('tool_choice must be "auto", "none", "required" or name a function.', param="tool_choice")
    return Toolset(functions, choice or "auto", parallel is not False)


def _function_of(tool: Any, param: str) -> Function:
    if not isinstance(tool, dict):
        raise InvalidParameter("A tool must be an object.", param=param)
    if tool.get("type", "function") != "function":
        raise UnsupportedParameter("Only tools of type function can be used here.", param=f"{param}.type")
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,64}", name):
        raise InvalidParameter("A function's name must be 1 to 64 letters, digits, dots, _ or -.", param=f"{param}.function.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidParameter("A function's parameters must be a JSON schema.", param=f"{param}.function.parameters")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidParameter("A function's description must be text.", param=f"{param}.function.description")
    schema = check_schema(parameters, f"{param}.function.parameters") if parameters else {"type": "object", "properties": {}}
    return Function(name, description or "", schema, bool(function.get("strict")))


def content_of(content: Any, param: str, *, images: bool = True) -> dict[str, Any]:
    """{"content"} of a message as text, and {"parts"} where it holds images. Raises as `text_of`, and InvalidImage."""
    if not images or not isinstance(content, list) or not any(isinstance(p, dict) and p.get("type") in _IMAGES for p in content):
        return {"content": text_of(content, param)}
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        where = f"{param}.{index}"
        if isinstance(part, dict) and part.get("type") in _IMAGES:
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise InvalidParameter('An image needs its URL: {"image_url": {"url": "data:image/png;base64,…"}}.', param=where)
            parts.append({"type": "image", "image": image_source(url, where)})
        else:
            parts.append({"type": "text", "text": _part_text(part, where)})
    return {"content": "".join(part["text"] for part in parts if part["type"] == "text"), "parts": parts}


def text_of(content: Any, param: str) -> str:
    """A message's content as text. Raises UnsupportedParameter for images, audio and files, InvalidParameter for the rest."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidParameter("content must be text or a list of parts.", param=param)
    return "".join(_part_text(part, f"{param}.{index}") for index, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in (*_IMAGES, "image", "input_audio", "file", "input_file"):
        what = "Images are read in messages of the user" if kind in (*_IMAGES, "image") else "Audio and files are not read"
        raise UnsupportedParameter(f"{what}.", param=param)
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        raise InvalidParameter('A part must be {"type": "text", "text": …}.', param=param)
    return text


def _type_word(part: Any) -> bool:
    """pydantic names the branch of a union in the path."""
    return isinstance(part, str) and (part in ("str", "int", "bool", "float", "dict") or "[" in part)


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:].rstrip(".") + "."

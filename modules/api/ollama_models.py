"""Ollama's bodies as Turns, and its ways of writing times, sizes and models."""

from __future__ import annotations

import hashlib
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from modules.api.foreign_fields import llama_sampling
from modules.api.openai_models import check_stops, toolset_of
from modules.api.openai_turns import thinking_variables
from modules.api.turn import Turn, tool_arguments
from modules.download.hub import folder_of
from modules.download.plan import gguf_label
from modules.errors import InvalidParameter, ModelNotFound, UnsupportedParameter
from modules.images import from_base64
from modules.schema import StopParams
from modules.structured import check_schema

if TYPE_CHECKING:
    from modules.residents import Resident
    from modules.schema import ModelFiles
    from modules.services import Services

# Ollama's own defaults of what its clients leave out.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
_AT_LOAD = "is set where the model is loaded."
NO_EFFECT = {
    "num_ctx": _AT_LOAD,
    "num_gpu": _AT_LOAD,
    "num_batch": "",
    "num_thread": _AT_LOAD,
    "num_keep": "",
    "main_gpu": "",
    "low_vram": "",
    "use_mmap": "",
    "use_mlock": "",
    "numa": "",
    "penalize_newline": "",
    "f16_kv": "",
    "vocab_only": "",
    "logits_all": "",
    "embedding_only": "",
    "draft_num_predict": "",
}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"-?(?:\d+(?:\.\d*)?(?:ns|us|µs|ms|s|m|h))+")
_ROLES = frozenset({"system", "user", "assistant", "tool"})

# The hub's host may stand before it; which hub is asked is the operator's choice.
_REPOSITORY = re.compile(r"(?:[^/:]+\.[^/]+/)?(?P<repository>[^/:]+/[^/:]+)(?::(?P<tag>[^/:]+))?")


class Common(BaseModel):
    """What /api/chat and /api/generate share."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str
    stream: bool | None = None
    format: Any = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(Common):
    messages: list[Message] = Field(default_factory=list, max_length=100_000)
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Common):
    prompt: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    context: list[int] | None = Field(None, max_length=1_000_000)


class ShowRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str | None = None
    name: str | None = None


class PullRequest(ShowRequest):
    stream: bool | None = None


class EmbedRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str
    input: str | list[str] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: int | None = Field(None, ge=1, le=1_000_000)
    keep_alive: float | str | None = None


class OldEmbedRequest(BaseModel):
    """/api/embeddings, the older form."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str
    prompt: str
    keep_alive: float | str | None = None


def chat_turn(body: ChatRequest, *, strict: bool) -> Turn:
    """Raises InvalidParameter or UnsupportedParameter."""
    turn = _turn(body, strict)
    turn.messages = [_message(message, f"messages.{index}") for index, message in enumerate(body.messages)]
    turn.tools = toolset_of(body.tools, None)
    return turn


def generate_turn(body: GenerateRequest, *, strict: bool) -> Turn:
    """A raw prompt, or one question in the model's template. Raises InvalidParameter or UnsupportedParameter."""
    turn = _turn(body, strict)
    if body.template is not None and body.template.strip():
        raise UnsupportedParameter(
            "template is set by the server's operator.", hint='Send "raw": true instead.', param="template"
        )
    if body.images and (body.raw or body.suffix):
        raise UnsupportedParameter("Images need the model's template.", hint='Leave "raw" out.', param="images")
    if body.raw or body.suffix:
        turn.prompt, turn.suffix = body.prompt or "", body.suffix or None
        return turn
    system = [{"role": "system", "content": body.system}] if body.system else []
    turn.messages = [*system, {"role": "user", **_content(body.prompt or "", body.images, "images")}]
    return turn


def _turn(body: Common, strict: bool) -> Turn:
    options = dict(body.options or {})
    limit, stops = options.pop("num_predict", None), check_stops(options.pop("stop", None) or None, "options.stop")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not -2 <= limit < 2**31):
        raise InvalidParameter("num_predict must be a whole number, -1 for no limit.", param="options.num_predict")
    if options.get("seed") == 0 and options.get("temperature") is None:
        options.pop("seed")  # how several of its clients write "none"
    values, warnings = llama_sampling({**DEFAULTS, **options}, NO_EFFECT)
    limit = None if limit is None or limit < 0 else max(limit, 1)
    turn = Turn(values, StopParams(max_tokens=limit, stop=stops, ignore_eos=bool(values.get("ban_eos_token"))), warnings, strict)
    if body.format is not None and body.format != "":
        turn.json_schema = _schema(body.format)
    if isinstance(body.think, str):
        if body.think not in ("low", "medium", "high"):
            raise InvalidParameter("think must be true, false, low, medium or high.", param="think")
        turn.template_variables = thinking_variables(body.think, None)
    elif body.think is not None:
        turn.template_variables = thinking_variables(None, body.think)
    turn.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return turn


def _schema(given: Any) -> dict[str, Any]:
    if given == "json":
        return {"type": "object"}
    if isinstance(given, dict):
        return check_schema(given, "format")
    raise InvalidParameter('format must be "json" or a JSON schema.', param="format")


def _message(message: Message, param: str) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise InvalidParameter("role must be system, user, assistant or tool.", param=f"{param}.role")
    if message.images and message.role != "user":
        raise UnsupportedParameter("Images are read in messages of the user.", param=f"{param}.images")
    entry: dict[str, Any] = {"role": message.role, **_content(message.content or "", message.images, f"{param}.images")}
    if message.thinking and message.role == "assistant":
        entry["reasoning_content"] = message.thinking
    if message.tool_calls:
        entry["tool_calls"] = [_call(call, f"{param}.tool_calls.{index}") for index, call in enumerate(message.tool_calls)]
    if message.role == "tool":
        entry["tool_call_id"] = message.tool_call_id or message.tool_name or "call"
        if message.tool_name:
            entry["name"] = message.tool_name
    return entry


def _call(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidParameter("A tool call needs its function's name.", param=param)
    arguments = tool_arguments(function.get("arguments"), f"{param}.function.arguments")
    return {"id": str(call.get("id") or ""), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _content(text: str, images: list[str] | None, param: str) -> dict[str, Any]:
    """Ollama's images are base64 and come before the words."""
    if not images:
        return {"content": text}
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": from_base64(image, f"{param}.{index}")} for index, image in enumerate(images)
    ]
    return {"content": text, "parts": [*parts, {"type": "text", "text": text}]}


def seconds_of(keep_alive: float | str | None) -> float | None:
    """Ollama's durations in seconds: 300, "5m", "1h30m", 0, -1 (for ever, as infinity). Raises InvalidParameter."""
    if keep_alive is None or keep_alive == "":
        return None
    if isinstance(keep_alive, str):
        if re.fullmatch(r"-?\d{1,9}", keep_alive):
            value = float(keep_alive)
        elif len(keep_alive) < 64 and _DURATION.fullmatch(keep_alive):
            value = sum(float(n) * _SECONDS[unit] for n, unit in re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", keep_alive))
            value = -value if keep_alive.startswith("-") else value
        else:
            raise InvalidParameter('keep_alive must be seconds or a duration such as "5m".', param="keep_alive")
    else:
        value = float(keep_alive)
    return float("inf") if value < 0 else value


# --- models --------------------------------------------------------------------------------------------------------


def find(services: Services, name: str) -> str:
    """The model's own name. Ollama's clients put a tag behind a name that has none, and call a model of the hub OWNER/NAME:TAG.

    Reads the disk; raises ModelNotFound.
    """
    try:
        return services.library.find(name).id
    except ModelNotFound:
        if (asked := repository_of(name)) is not None:
            repository, tag = asked
            folder = folder_of(repository)
            for model in services.library.list():
                inside = model.id == folder or model.id.startswith(f"{folder}/")
                if inside and tag in ("latest", gguf_label(model.path).upper()):
                    return model.id
        if not name.endswith(":latest"):
            raise
        return services.library.find(name.removesuffix(":latest")).id


def repository_of(name: str) -> tuple[str, str] | None:
    """A repository of the hub and the tag; None for a name without an owner, which would be of Ollama's own registry."""
    found = _REPOSITORY.fullmatch(name)
    if found is None:
        return None
    tag = found["tag"] or "latest"
    return found["repository"], tag if tag == "latest" else tag.upper()


def stamp(seconds: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def entry(model: ModelFiles) -> dict[str, Any]:
    """One row of /api/tags."""
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": stamp(_modified(model)),
        "size": model.size_bytes,
        # Ollama's is of the file's content; here it only has to be the same as long as the model is.
        "digest": hashlib.sha256(f"{model.id}\0{model.size_bytes}".encode()).hexdigest(),
        "details": details(model),
    }


def _modified(model: ModelFiles) -> float:
    if model.format == "echo":
        return 0.0
    try:
        return Path(model.path).stat().st_mtime
    except OSError:  # gone since it was listed
        return 0.0


def details(model: ModelFiles) -> dict[str, Any]:
    family = model.architecture or model.format
    return {
        "parent_model": model.base_model or "",
        "format": model.format,
        "family": family,
        "families": [family],
        "parameter_size": _short_count(model.parameters),
        "quantization_level": model.quantization.method if model.quantization else "",
    }


def _short_count(parameters: int | None) -> str:
    if not parameters:
        return ""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)


def model_info(model: ModelFiles, resident: Resident | None) -> dict[str, Any]:
    """GGUF's names for what is known, whatever the file is."""
    family = model.architecture or model.format
    context = resident.info.context_length if resident and resident.info else model.context_length
    info: dict[str, Any] = {"general.architecture": family, "general.parameter_count": model.parameters}
    info[f"{family}.context_length"] = context
    if model.license:
        info["general.license"] = model.license
    return {key: value for key, value in info.items() if value is not None}

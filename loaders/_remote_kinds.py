"""What each kind of server takes beyond OpenAI's common fields, and under which names; pure tables and mappings.

Sources: each server's own API reference (docs/remote.md names the versions tried).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modules import sampling as table

if TYPE_CHECKING:
    from modules.schema import StopParams

Unlimited = Literal["omit", "context", "room", "null"]


@dataclass(frozen=True)
class Kind:
    """One kind of server.

    `samplers`: our name -> its field. `explicit`: neutral values always sent, since its own defaults are others.
    `features` of the loader that it has. `stops`: the most stop sequences it takes (None: any). `token_prompts`: a prompt may be
    token ids. `token_ids`: it names the ids of what it wrote (`return_token_ids`). `unlimited`: how a raw completion without
    max_tokens is asked for; "room" counts the prompt, "context" leaves the cutting to it. `continues`: fields that let it go on
    with a last message of the assistant; None: it can't. `tokenizer` names its routes (see loaders._remote_text).
    """

    name: str
    title: str
    samplers: Mapping[str, str]
    features: frozenset[str]
    explicit: Mapping[str, Any] = field(default_factory=dict)
    stop_fields: Mapping[str, str] = field(default_factory=dict)
    stops: int | None = None
    token_prompts: bool = False
    token_ids: bool = False
    unlimited: Unlimited = "omit"
    continues: Mapping[str, Any] | None = None
    tokenizer: str | None = None


_OPENAI = {name: name for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")}
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0}
_DRY = {name: name for name in ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers")}
_XTC = {name: name for name in ("xtc_probability", "xtc_threshold")}
_MIROSTAT = {"mirostat_tau": "mirostat_tau", "mirostat_eta": "mirostat_eta"}
_CHAT = frozenset({"messages", "vision"})  # vision: of a model that sees (`_remote_identify.Found.sees`)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "switchyard",
            "Switchyard",
            {name: name for name in table.PARAMETERS},
            _CHAT | {"logprobs", "echo", "grammar", "json_schema", "regex", "embeddings", "score"},
            stop_fields={"min_tokens": "min_tokens", "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos"},
            stops=64,
            token_prompts=True,
            token_ids=True,
            unlimited="context",
            continues={"continue_final_message": True},
            tokenizer="switchyard",
        ),
        Kind(
            "vllm",
            "vLLM",
            {
                **_OPENAI,
                **{name: name for name in ("top_k", "min_p", "repetition_penalty", "logit_bias", "skip_special_tokens")},
            },
            _CHAT | {"logprobs", "echo", "grammar", "json_schema", "regex", "embeddings", "score"},
            explicit={**_NEUTRAL, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            stop_fields={"min_tokens": "min_tokens", "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos"},
            token_prompts=True,
            token_ids=True,
            unlimited="room",
            continues={"continue_final_message": True, "add_generation_prompt": False},
            tokenizer="vllm",
        ),
        Kind(
            "llama-server",
            "llama-server",
            {
                **_OPENAI,
                **_DRY,
                **_XTC,
                **_MIROSTAT,
                **{name: name for name in ("top_k", "min_p", "typical_p", "top_n_sigma", "logit_bias", "dry_penalty_last_n")},
                "repetition_penalty": "repeat_penalty",
                "repetition_penalty_range": "repeat_last_n",
                "mirostat_mode": "mirostat",
            },
            _CHAT | {"logprobs", "grammar", "json_schema"},
            explicit={**_NEUTRAL, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0},
            stop_fields={"ignore_eos": "ignore_eos"},
            token_prompts=True,
            continues={},
            tokenizer="llama-server",
        ),
        Kind(
            "llama-cpp-python",
            "llama-cpp-python's server",
            {
                **_OPENAI,
                **_MIROSTAT,
                **{name: name for name in ("top_k", "min_p", "mirostat_mode", "logit_bias")},
                "repetition_penalty": "repeat_penalty",
            },
            _CHAT | {"logprobs", "grammar"},
            explicit={**_NEUTRAL, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
            unlimited="null",
            tokenizer="llama-cpp-python",
        ),
        Kind(
            "tgi",
            "TGI",
            {name: name for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")},
            _CHAT | {"logprobs"},
            stops=4,
            unlimited="room",
            tokenizer="tgi",
        ),
        Kind("ollama", "Ollama", _OPENAI, _CHAT, explicit=_NEUTRAL, continues={}),
        Kind(
            "tabbyapi",
            "tabbyAPI",
            {
                **_OPENAI,
                **_DRY,
                **_XTC,
                **_MIROSTAT,
                **{name: name for name in ("top_k", "min_p", "tfs", "top_a", "repetition_penalty", "smoothing_factor")},
                **{name: name for name in ("mirostat_mode", "logit_bias", "skip_special_tokens")},
                "typical_p": "typical",
                "repetition_penalty_range": "penalty_range",
                "dry_penalty_last_n": "dry_range",
            },
            _CHAT | {"logprobs", "grammar", "json_schema", "regex"},
            explicit={**_NEUTRAL, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            stop_fields={"min_tokens": "min_tokens", "ignore_eos": "ban_eos_token"},
            tokenizer="tabbyapi",
        ),
        Kind("openai", "OpenAI-compatible server", {**_OPENAI, "logit_bias": "logit_bias"}, _CHAT | {"logprobs"}, stops=4),
    )
}

# Some servers say off in a way of their own.
_OFF = {"repetition_penalty_range": (0, -1), "dry_penalty_last_n": (0, -1), "top_k": (-1, 0)}


def to_native(kind: Kind, sampling: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of the request body, active parameter it can't take -> reason)."""
    wanted = {name: value for name, value in sampling.items() if name != "seed" or value >= 0}
    honoured, ignored = table.split_supported(wanted, kind.samplers, kind.title)
    if kind.name == "switchyard":  # the same table on both sides, which says itself what its backend lacks
        return {name: _plain(value) for name, value in table.without_neutral(honoured).items()}, ignored
    fields = dict(kind.explicit)
    active = table.active(honoured)
    for name, value in honoured.items():
        if name in active or name in ("temperature", "top_p", "seed"):
            said, meant = _OFF.get(name, (None, None))
            fields[kind.samplers[name]] = meant if said is not None and value == said else _plain(value)
    if fields.get("top_p") == 1.0 and kind.name == "tgi":  # it takes only what is below 1
        del fields["top_p"]
    return fields, ignored


def stop_fields(kind: Kind, stop: StopParams) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """(fields, what can't be taken -> reason, stop sequences that are left to us)."""
    fields: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    values = {"min_tokens": stop.min_tokens, "stop_token_ids": list(stop.stop_token_ids), "ignore_eos": stop.ignore_eos}
    for name, value in values.items():
        if value and name in kind.stop_fields:
            fields[kind.stop_fields[name]] = value
        elif value:
            ignored[name] = f"{kind.title} does not have {name}."
    taken = stop.stop if kind.stops is None else stop.stop[: kind.stops]
    if taken:
        fields["stop"] = list(taken)
    return fields, ignored, stop.stop[len(taken) :]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def form_fields(kind: Kind, *, chat: bool, grammar: str | None, schema: Any, regex: str | None) -> dict[str, Any] | None:
    """The fields that hold an answer to a form, {} for no form, None where this server has no such thing."""
    if grammar is None and schema is None and regex is None:
        return {}
    if kind.name == "switchyard":
        return {"grammar": grammar} if grammar else {"regex": regex} if regex else {"json_schema": schema}
    if schema is not None and (chat or kind.name == "vllm") and kind.name not in ("llama-cpp-python", "tabbyapi"):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}
    if schema is not None and kind.name == "llama-cpp-python":
        return {"response_format": {"type": "json_object", "schema": schema}} if chat else None
    if schema is not None:
        return {"json_schema": schema} if kind.name in ("llama-server", "tabbyapi") else None
    if kind.name == "vllm":
        return {"structured_outputs": {"grammar": grammar} if grammar else {"regex": regex}}
    if kind.name == "tabbyapi":
        return {"grammar_string": grammar} if grammar else {"regex_pattern": regex}
    return {"grammar": grammar} if grammar and kind.name in ("llama-server", "llama-cpp-python") else None

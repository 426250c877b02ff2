"""llama-server's own bodies as Turns, and its answers' fixed parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from modules.api.foreign_fields import llama_sampling
from modules.api.openai_models import check_stops
from modules.api.turn import Turn
from modules.errors import InvalidParameter
from modules.schema import StopParams
from modules.structured import check_gbnf, check_schema

if TYPE_CHECKING:
    from modules.api.job import Outcome
    from modules.generation import Run
    from modules.schema import TokenLogprob

MAX_PROMPTS = 128
MAX_IDS = 1_000_000
# llama-server's own defaults of what its clients leave out.
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
_NEVER = "has no effect here."
NO_EFFECT = {
    "cache_prompt": "",
    "id_slot": "",
    "slot_id": "",
    "n_keep": "",
    "n_cache_reuse": "",
    "n_discard": "",
    "min_keep": "",
    "timings_per_token": "",
    "return_progress": "",
    "post_sampling_probs": _NEVER,
    "response_fields": _NEVER,
    "t_max_predict_ms": _NEVER,
    "t_max_prompt_ms": _NEVER,
    "n_indent": _NEVER,
    "penalty_prompt": _NEVER,
    "penalize_nl": _NEVER,
    "preserved_tokens": "",
    "grammar_lazy": "",
    "grammar_triggers": "",
    "image_data": _NEVER,
}


class CompletionRequest(BaseModel):
    """Sampling parameters come beside these, under llama-server's names or any other of ours."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    prompt: Any = None
    model: str | None = None
    n_predict: int | None = Field(None, ge=-2, le=2**31 - 1)
    max_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    stop: Any = None
    stream: bool | None = None
    n_probs: int | None = Field(None, ge=0, le=100)
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    return_tokens: bool | None = None


class InfillRequest(CompletionRequest):
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[dict[str, Any]] | None = None


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    content: str = ""
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    tokens: list[int] = Field(max_length=MAX_IDS)
    model: str | None = None


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    content: str | list[str] | None = None
    input: str | list[str] | None = None
    model: str | None = None


def completion_turns(body: CompletionRequest, *, strict: bool) -> list[Turn]:
    """One turn for each prompt. Raises InvalidParameter or UnsupportedParameter."""
    return [_turn(body, prompt, strict) for prompt in _prompts(body.prompt)]


def infill_turn(body: InfillRequest, *, strict: bool) -> Turn:
    """Files around it come first, then what stands before the gap."""
    extra = ""
    for index, file in enumerate(body.input_extra or ()):
        if not isinstance(file.get("text"), str):
            raise InvalidParameter("A file needs its text.", param=f"input_extra.{index}.text")
        extra += f"{file['text']}\n"
    middle = body.prompt if isinstance(body.prompt, str) else ""
    turn = _turn(body, extra + body.input_prefix + middle, strict)
    turn.suffix = body.input_suffix or "\n"
    return turn


def _turn(body: CompletionRequest, prompt: str | list[int], strict: bool) -> Turn:
    values, warnings = llama_sampling({**DEFAULTS, **(body.model_extra or {})}, NO_EFFECT)
    limit = body.n_predict if body.n_predict is not None else body.max_tokens
    zero = limit == 0  # evaluates the prompt only, to warm the cache
    limit = None if limit is None or limit < 0 else max(limit, 1)
    stops = check_stops(body.stop or None)
    turn = Turn(values, StopParams(max_tokens=limit, stop=stops, ignore_eos=bool(values.get("ban_eos_token"))), warnings, strict)
    if zero:
        warnings.append("n_predict 0 is taken as 1.")
    if isinstance(prompt, str):
        turn.prompt = prompt
    else:
        turn.token_ids = tuple(prompt)
    if body.grammar and body.json_schema:
        raise InvalidParameter("Only one of grammar and json_schema can be used.", param="json_schema")
    turn.grammar = check_gbnf(body.grammar) if body.grammar else None
    turn.json_schema = check_schema(body.json_schema, "json_schema") if body.json_schema else None
    turn.logprobs = body.n_probs or None
    return turn


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""

    def one(item: Any) -> bool:
        return isinstance(item, str) or (isinstance(item, list) and bool(item) and all(map(_is_token, item)))

    if one(prompt):
        return [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > MAX_PROMPTS or not all(map(one, prompt)):
        raise InvalidParameter(f"prompt must be a text, token ids, or a list of 1 to {MAX_PROMPTS} of either.", param="prompt")
    return list(prompt)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


# --- answers -------------------------------------------------------------------------------------------------------


def timings_of(run: Run) -> dict[str, Any]:
    """Milliseconds and tokens per second, as llama.cpp prints them."""
    usage, timings = run.usage, run.timings
    fresh, made = max(0, usage.prompt_tokens - usage.cached_tokens), usage.completion_tokens
    prompt_ms, made_ms = timings.prefill_s * 1000, timings.decode_s * 1000
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / fresh if fresh else 0.0,
        "prompt_per_second": timings.prefill_rate(usage) or 0.0,
        "predicted_n": made,
        "predicted_ms": made_ms,
        "predicted_per_token_ms": made_ms / made if made else 0.0,
        "predicted_per_second": timings.decode_rate(usage) or 0.0,
    }


def probabilities(items: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> list[dict[str, Any]]:
    """`completion_probabilities`: the token that was chosen and the likeliest ones."""

    def one(token_id: int, text: str, value: float) -> dict[str, Any]:
        return {"id": token_id, "token": text, "bytes": list(text.encode("utf-8", "replace")), "logprob": value}

    return [
        {**one(item.token_id, item.text, item.logprob), "top_logprobs": [one(*candidate) for candidate in item.top]}
        for item in items
    ]


def ending(outcome: Outcome) -> dict[str, Any]:
    if outcome.finish_reason == "length":
        return {"stop_type": "limit", "stopping_word": ""}
    if outcome.stop_match:
        return {"stop_type": "word", "stopping_word": outcome.stop_match}
    return {"stop_type": "eos" if outcome.finish_reason == "stop" else "none", "stopping_word": ""}

"""From an OpenAI body to a GenerationRequest, once the model is known: template, limits, structured output, context."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules import sampling
from modules.api.openai_models import MAX_TOTAL_TOKENS, ChatRequest, Common, CompletionRequest, messages_of
from modules.chat.templates import FALLBACK_STOP, check_variables
from modules.errors import ContextLengthExceeded, InvalidParameter, UnsupportedParameter
from modules.schema import GenerationRequest, LoaderSpec, StopParams
from modules.structured import check_gbnf, check_regex, check_schema

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.residents import Resident
    from modules.services import Services

# Text of fewer bytes than this can't have more tokens than bytes plus a BOS and a prefix space, in any tokenizer here.
SPARE_TOKENS = 8


@dataclass
class Plan:
    """What a body asks for, checked as far as that is possible without a model. One per prompt."""

    sampling: dict[str, Any]
    stop: StopParams
    warnings: list[str]
    strict: bool
    logprobs: int | None = None
    echo: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    messages: list[dict[str, Any]] | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    add_special: bool = True
    echo_text: str = ""

    async def prepare(self, services: Services, resident: Resident, client: EngineClient) -> GenerationRequest:
        """The request for this very model. Raises AppError: overflow, unsupported parts, template errors."""
        spec = services.specs[resident.loader]
        self._check_features(spec)
        stop = self.stop
        prompt, token_ids = self.prompt, self.token_ids
        info = resident.info
        if self.messages is not None:
            prompt = await self._render(services, resident)
            if info is None or not info.chat_template:
                stop = dataclasses.replace(stop, stop=(*stop.stop, *FALLBACK_STOP))
        context = info.context_length if info is not None else 0
        if token_ids is not None:
            vocabulary = info.vocab_size if info is not None else 0
            if any(not 0 <= token < (vocabulary or 2**31) for token in token_ids):
                raise InvalidParameter("A token id is outside the model's vocabulary.", param="prompt")
            _check_context(len(token_ids), context)
        elif context and len(prompt or "") * 4 + SPARE_TOKENS > context and _bytes(prompt) + SPARE_TOKENS > context:
            token_ids = tuple(await client.encode(prompt or "", self.add_special))
            _check_context(len(token_ids), context)
            prompt = None
        if token_ids is not None and self.echo_text == "" and self.echo and self.logprobs is None:
            self.echo_text = await client.decode(token_ids)
        return GenerationRequest(
            secrets.token_hex(12),
            prompt=None if token_ids is not None else prompt,
            token_ids=token_ids,
            sampling=self.sampling,
            stop=stop,
            add_special=self.add_special,
            logprobs=self.logprobs,
            echo=self.echo and self.logprobs is not None,
            grammar=self.grammar,
            json_schema=self.json_schema,
            regex=self.regex,
        )

    async def _render(self, services: Services, resident: Resident) -> str:
        messages = self.messages or []
        info = resident.info
        return await services.templates.render(
            services.chat_template(resident),
            messages,
            True,
            info.bos_token if info else None,
            info.eos_token if info else None,
            continue_final=messages[-1]["role"] == "assistant" and bool(messages[-1]["content"]),
            **self.template_variables,
        )

    def _check_features(self, spec: LoaderSpec) -> None:
        needed = {
            "logprobs": self.logprobs is not None,
            "echo": self.echo and self.logprobs is not None,
            "grammar": self.grammar is not None,
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
        }
        for feature, asked in needed.items():
            if asked and feature not in spec.features:
                param = {"json_schema": "response_format"}.get(feature, feature)
                raise UnsupportedParameter(
                    f"{spec.title} does not have {feature}.",
                    hint="Leave it out or load the model with another backend.",
                    param=param,
                )
        if self.strict:
            sampling.require_supported(self.sampling, spec.samplers, spec.title)

    def for_choice(self, index: int) -> Plan:
        """The plan of the n-th choice: another seed, or all choices would be alike."""
        seed = self.sampling.get("seed", -1)
        if index == 0 or seed < 0:
            return self
        return dataclasses.replace(self, sampling={**self.sampling, "seed": (seed + index) % 2**63})


def _bytes(text: str | None) -> int:
    return len((text or "").encode("utf-8"))


def _check_context(tokens: int, context: int) -> None:
    if context and tokens >= context:
        raise ContextLengthExceeded(
            f"This model's context holds {context} tokens; the prompt has {tokens}, which leaves no room for an answer.",
            hint="Shorten the messages or load the model with a larger context.",
            param="messages",
        )


def plan_chat(body: ChatRequest, *, strict: bool) -> Plan:
    """Check a chat body. Raises InvalidParameter or UnsupportedParameter."""
    if body.tools and body.tool_choice != "none":
        raise UnsupportedParameter(
            "Tools are not supported yet.", hint='Leave tools out or send tool_choice "none".', param="tools"
        )
    if body.functions:
        raise UnsupportedParameter("functions is the old form of tools, which are not supported yet.", param="functions")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    plan = _plan(body, limit, strict)
    plan.messages = messages_of(body)
    if not any(m["content"] for m in plan.messages) and all(m["role"] == "system" for m in plan.messages):
        raise InvalidParameter("messages holds nothing to answer.", param="messages")
    plan.template_variables = check_variables(body.chat_template_kwargs or {})
    plan.add_special = False
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs: true.", param="top_logprobs")
    plan.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    _structured(plan, body, body.response_format)
    return plan


def plan_completions(body: CompletionRequest, *, strict: bool) -> list[Plan]:
    """One plan for each prompt. Raises InvalidParameter or UnsupportedParameter."""
    if body.suffix:
        raise UnsupportedParameter("suffix is not supported.", hint="Leave it out.", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedParameter("best_of must equal n.", hint="Leave it out.", param="best_of")
    plans = []
    limit = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this endpoint
    for prompt in body.prompts():
        plan = _plan(body, limit, strict, allow_zero=bool(body.echo))
        plan.logprobs, plan.echo = body.logprobs, bool(body.echo)
        plan.add_special = True if body.add_special is None else body.add_special
        if isinstance(prompt, str):
            plan.prompt = prompt
            plan.echo_text = prompt if body.echo and body.logprobs is None else ""
        else:
            plan.token_ids = tuple(prompt)
        _structured(plan, body, body.response_format)
        plans.append(plan)
    return plans


def _plan(body: Common, limit: int | None, strict: bool, *, allow_zero: bool = False) -> Plan:
    values, warnings = body.extras()
    least = 0 if allow_zero else 1
    if limit is not None and limit < least:
        raise InvalidParameter(f"max_tokens must be at least {least}.", param="max_tokens")
    if (body.n or 1) * (limit or 1) > MAX_TOTAL_TOKENS:
        raise InvalidParameter(f"n times max_tokens must be at most {MAX_TOTAL_TOKENS}.", param="n")
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream: true.", param="stream_options")
    stop = StopParams(
        max_tokens=limit,
        min_tokens=body.min_tokens or 0,
        stop=body.stops(),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(values.get("ban_eos_token")),
    )
    return Plan(values, stop, warnings, strict if body.strict is None else body.strict)


def _structured(plan: Plan, body: Common, response_format: Any) -> None:
    grammar = body.grammar or body.grammar_string or None
    schema = body.json_schema
    if response_format is not None and response_format.type == "json_object":
        schema = {"type": "object"}
    elif response_format is not None and response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise InvalidParameter("response_format needs its json_schema.", param="response_format.json_schema")
        schema = response_format.json_schema.schema_
    if sum(item is not None for item in (grammar, schema, body.regex)) > 1:
        raise InvalidParameter(
            "Only one of response_format, json_schema, grammar and regex can be used.", param="response_format"
        )
    plan.grammar = check_gbnf(grammar) if grammar is not None else None
    plan.json_schema = check_schema(schema) if schema is not None else None
    plan.regex = check_regex(body.regex) if body.regex is not None else None

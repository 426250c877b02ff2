"""What a request asks for, free of any protocol, and the GenerationRequest it becomes once the model is known.

Every protocol's adapter fills a Turn per prompt and hands them to `modules.api.job.Job`. Here alone is the template rendered,
tools are shown, reasoning is looked for, features are checked and the context is counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules import sampling
from modules.api.answer import AnswerReader
from modules.api.infill import infill_prompt
from modules.chat.templates import FALLBACK_STOP
from modules.chat.vision import check_sees, images_of, shape, without_pixels
from modules.errors import ContextLengthExceeded, InvalidParameter, UnsupportedParameter
from modules.image_urls import fetched
from modules.reasoning import THINK, ReasoningSplitter, begins_inside, marks_of
from modules.schema import ChatInput, GenerationRequest, LoaderSpec, ModelInfo, StopParams, features_of, samplers_of
from modules.tools.constrain import force
from modules.tools.dialects import HERMES, dialect_of, is_channelled, knows_tools
from modules.tools.prompting import inline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.engine_client import EngineClient
    from modules.reasoning import Marks
    from modules.residents import Resident
    from modules.services import Services
    from modules.tools.dialects import Dialect
    from modules.tools.types import Toolset

# Text of fewer bytes than this can't have more tokens than bytes plus a BOS and a prefix space, in any tokenizer here.
SPARE_TOKENS = 8
MAX_TOTAL_TOKENS = 4_000_000
# Bookkeeping of OpenAI's own is taken in silence; what would matter elsewhere gets a warning.
BOOKKEEPING = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
NO_EFFECT = frozenset("store service_tier verbosity modalities prediction truncation include".split())
# The operator's: paths, trust and templates are set where the server is, never by a request.
OWNED_BY_OPERATOR = frozenset(
    "trust_remote_code model_dir model_path extra_flags loader lora lora_path lora_dir chat_template instruction_template "
    "instruction_template_str user_id api_key disk_cache_dir options".split()
)


@dataclass
class Turn:
    """One prompt and how to go on with it, checked as far as that is possible without a model.

    Exactly one of `messages`, `prompt` and `token_ids` is set. Messages are canonical: role system, user, assistant or tool;
    `content` text, with `parts` beside it where there are images (`modules.chat.vision`); `tool_calls` with
    `function.arguments` as an object; `tool_call_id`; `reasoning_content`. `continue_final` None goes on with a last message that
    is the assistant's. At most one of `grammar` (GBNF), `json_schema`, `regex`.
    """

    sampling: dict[str, Any]
    stop: StopParams
    warnings: list[str] = field(default_factory=list)
    strict: bool = False
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    add_special: bool = True
    continue_final: bool | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)
    tools: Toolset | None = None
    split_reasoning: bool = True
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    return_token_ids: bool = False

    @property
    def constrained(self) -> bool:
        return self.grammar is not None or self.json_schema is not None or self.regex is not None

    def for_choice(self, index: int) -> Turn:
        """The n-th choice: another seed, or all choices would be alike."""
        seed = self.sampling.get("seed", -1)
        if index == 0 or seed < 0:
            return self
        return dataclasses.replace(self, sampling={**self.sampling, "seed": (seed + index) % 2**63})

    async def prepare(self, services: Services, resident: Resident, client: EngineClient) -> Prepared:
        """The request for this very model. Raises AppError: overflow, unsupported parts, template errors."""
        spec = services.specs[resident.loader]
        made = Prepared(self, stop=self.stop)
        made.images = images_of(self.messages or ())
        if made.images:
            check_sees(resident.info)
            made.images = tuple([await fetched(image, services.config.fetch_images) for image in made.images])
        if self.messages is not None and "messages" in features_of(spec, resident.info):
            _converse(made)
        elif self.messages is not None:
            await _render(made, services, resident)
        else:
            made.prompt, made.token_ids = self.prompt, self.token_ids
            if self.suffix:
                made.prompt = await infill_prompt(client, self.prompt or "", self.suffix)
        _check_features(self, made, spec, resident.info)
        await _fit(made, resident, client)
        return made


@dataclass
class Prepared:
    """A turn for one model: `request` for its worker, `reader()` for what the worker answers. `echo_text` is shown first."""

    turn: Turn
    stop: StopParams
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    json_schema: dict[str, Any] | None = None
    show_special: bool = False
    dialect: Dialect | None = None
    call_open: str = ""
    marks: Marks | None = None
    inside: bool = False
    echo_text: str = ""
    chat: ChatInput | None = None
    images: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def request(self) -> GenerationRequest:
        turn = self.turn
        values = {**turn.sampling, "skip_special_tokens": False} if self.show_special else turn.sampling
        return GenerationRequest(
            secrets.token_hex(12),
            prompt=None if self.token_ids is not None else self.prompt,
            token_ids=self.token_ids,
            chat=self.chat,
            sampling=values,
            stop=self.stop,
            add_special=turn.add_special and turn.messages is None,
            logprobs=turn.logprobs,
            echo=turn.echo and turn.logprobs is not None,
            grammar=turn.grammar if self.json_schema is None else None,
            json_schema=self.json_schema or turn.json_schema,
            regex=turn.regex if self.json_schema is None else None,
            images=self.images,
        )

    def reader(self) -> AnswerReader:
        tools = self.turn.tools
        names = frozenset(f.name for f in tools.offered) if tools is not None else frozenset()
        return AnswerReader(
            dialect=self.dialect,
            splitter=ReasoningSplitter(self.marks, inside=self.inside) if self.marks is not None else None,
            names=names,
            call_open=self.call_open,
            parallel=tools.parallel if tools is not None else True,
        )


def _converse(made: Prepared) -> None:
    """Messages for an engine that renders them itself, and how to read its answer: as loaders._remote_read writes it."""
    turn, messages = made.turn, made.turn.messages or []
    tools = turn.tools
    offered = tools.offered if tools is not None else ()
    continued = turn.continue_final
    if continued is None:
        continued = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"])
    made.chat = ChatInput(
        without_pixels(messages),
        tools=tuple(function.openai() for function in offered),
        tool_choice=tools.choice if tools is not None and offered else "auto",
        parallel_tools=tools.parallel if tools is not None else True,
        continued=continued,
        variables=dict(turn.template_variables),
    )
    if turn.split_reasoning and not turn.constrained:
        made.marks = THINK
    if offered:
        made.dialect = HERMES


async def _render(made: Prepared, services: Services, resident: Resident) -> None:
    """Messages -> prompt, and how to read what comes back."""
    turn, info = made.turn, resident.info
    template = services.chat_template(resident)
    messages, variables = _with_tools(turn, template, dict(turn.template_variables))
    continued = turn.continue_final
    if continued is None:
        continued = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"])
    made.prompt = await services.templates.render(
        template,
        shape(messages, template, info),
        True,
        info.bos_token if info else None,
        info.eos_token if info else None,
        continue_final=continued,
        **variables,
    )
    if not template:
        made.stop = dataclasses.replace(made.stop, stop=(*made.stop.stop, *FALLBACK_STOP))
    marks = marks_of(template) if turn.split_reasoning else None
    tools = turn.tools
    forced = tools is not None and tools.forced and bool(tools.offered) and not continued
    if marks is not None:
        inside = begins_inside(made.prompt, marks)
        if inside and (turn.constrained or forced):
            # A constrained answer can't think first: the constraint holds from its first token on.
            made.prompt = f"{made.prompt.rstrip()}\n\n{marks.close}\n\n"
            made.warnings.append("The model's reasoning was skipped: the answer is held to a form.")
        elif not turn.constrained and not forced:
            made.marks, made.inside, made.show_special = marks, inside, marks.special
    if is_channelled(template) and not turn.constrained and turn.split_reasoning:
        made.dialect = dialect_of(template)
    if tools is not None and tools.offered:
        made.dialect = dialect_of(template)
        if forced:
            made.dialect = HERMES if made.dialect.kind == "tags" else made.dialect
            held = force(tools, made.dialect)
            made.prompt += held.opening
            made.call_open, made.json_schema = held.opening, held.schema
    if made.dialect is not None:
        made.show_special = made.show_special or made.dialect.special


def _with_tools(turn: Turn, template: str | None, variables: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and variables for a template: tools its own way where it knows them, else as text."""
    messages = turn.messages or []
    used = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    offered = turn.tools.offered if turn.tools is not None else ()
    if not used and not offered:
        return messages, variables
    if knows_tools(template):
        if offered:
            variables["tools"] = [function.openai() for function in offered]
        return messages, variables
    return inline(messages, turn.tools), variables


def _check_features(turn: Turn, made: Prepared, spec: LoaderSpec, info: ModelInfo | None) -> None:
    needed = {
        "logprobs": (turn.logprobs is not None, "logprobs"),
        "echo": (turn.echo and turn.logprobs is not None, "echo"),
        "grammar": (turn.grammar is not None, "grammar"),
        "json_schema": (turn.json_schema is not None or made.json_schema is not None, "response_format"),
        "regex": (turn.regex is not None, "regex"),
    }
    features = features_of(spec, info)
    for feature, (asked, param) in needed.items():
        if asked and feature not in features:
            raise UnsupportedParameter(
                f"{spec.title} does not have {feature}.",
                hint="Leave it out or load the model with another backend.",
                param="tool_choice" if feature == "json_schema" and turn.json_schema is None else param,
            )
    if turn.strict:
        sampling.require_supported(turn.sampling, samplers_of(spec, info), spec.title)


async def _fit(made: Prepared, resident: Resident, client: EngineClient) -> None:
    """Check the prompt against the vocabulary and the context; count only where it might not fit."""
    turn, info = made.turn, resident.info
    context = info.context_length if info is not None else 0
    if info is not None and "tokenizer" in info.lacks:
        context = 0  # nothing can be counted: the server has the last word
    prompt = made.prompt or ""
    param = "messages" if turn.messages is not None else "prompt"
    if made.token_ids is not None:
        vocabulary = info.vocab_size if info is not None else 0
        if any(not 0 <= token < (vocabulary or 2**31) for token in made.token_ids):
            raise InvalidParameter("A token id is outside the model's vocabulary.", param="prompt")
        _check_context(len(made.token_ids), context, param)
    elif made.images:
        pass  # the worker counts: an image becomes as many tokens as the model makes of it
    elif context and len(prompt) * 4 + SPARE_TOKENS > context and len(prompt.encode()) + SPARE_TOKENS > context:
        made.token_ids = tuple(await client.encode(prompt, turn.add_special and turn.messages is None))
        _check_context(len(made.token_ids), context, param)
    if turn.echo and turn.logprobs is None:
        made.echo_text = turn.prompt if turn.prompt is not None else await client.decode(made.token_ids or ())


def _check_context(tokens: int, context: int, param: str) -> None:
    if context and tokens >= context:
        raise ContextLengthExceeded(
            f"This model's context holds {context} tokens; the prompt has {tokens}, which leaves no room for an answer.",
            hint="Shorten the messages or load the model with a larger context.",
            param=param,
        )


# --- for the adapters ------------------------------------------------------------------------------------------------


def split_extras(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A body's further fields -> (checked sampling parameters, warnings about fields without effect).

    Raises InvalidParameter for a bad value, and for what only the server's operator may set.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in fields.items():
        if name in OWNED_BY_OPERATOR or name.startswith("__"):
            raise InvalidParameter(f"{shown(name)} is set by the server's operator, not by a request.", param=shown(name))
        if name in sampling.PARAMETERS or name in sampling.ALIASES:
            values[name] = value
        elif name not in BOOKKEEPING and value is not None:
            known = "has no effect here" if name in NO_EFFECT else "is not known and has no effect"
            warnings.append(f"{shown(name)} {known}.")
    return sampling.check(values), warnings[:32]


def tool_arguments(arguments: Any, param: str) -> Any:
    """The arguments of a call in the history, as templates take them: an object. Text that is no JSON stays text."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        raise InvalidParameter("arguments must be JSON text.", param=param)
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def shown(name: str) -> str:
    """A client's own field name, fit for a message."""
    return re.sub(r"[^\w.\-]", "?", name)[:64]

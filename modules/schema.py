"""The generate interface as data: requests, events, models and loaders.

Only the standard library is imported here: these types cross the pipe to workers whose environments may be years old.
All are frozen dataclasses; `to_wire` and `from_wire` turn them into JSON-safe dicts and back.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar

T = TypeVar("T")

FinishReason = Literal["stop", "length", "cancelled"]
ModelFormat = Literal[
    "hf", "gguf", "gptq", "exl2", "exl3", "awq", "rwkv", "flexgen", "lora", "remote", "echo", "mmproj", "unknown"
]


# --- a request -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StopParams:
    """When to stop. `max_tokens` None means up to the end of the context."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation for an engine that has a chat template of its own (feature "messages"): what would have been rendered.

    `messages` as in `modules.api.turn.Turn`, their images in the request's `images`, in order. `tools` are OpenAI's;
    `tool_choice` is its word or a function's name. `continued`: the last message, the assistant's, is to be gone on with.
    `variables` are for the template.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    parallel_tools: bool = True
    continued: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. Exactly one of `prompt`, `token_ids` and `chat` is set.

    `sampling` holds only parameters of `modules.sampling.PARAMETERS`, already checked; a missing one is neutral.
    `add_special` lets the tokenizer add BOS: true for raw prompts, false for text a chat template rendered.
    `logprobs` is the number of alternatives per token (0: only the chosen one), None for none.
    `echo` asks for the prompt's own tokens (and log-probabilities) before the generated ones.
    At most one of `grammar` (GBNF), `json_schema` and `regex` is set. `images` are files in base64, in the order in which the
    prompt names them by the model's `image_token`.
    """

    request_id: str
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: StopParams = field(default_factory=StopParams)
    add_special: bool = True
    logprobs: int | None = None
    echo: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    chat: ChatInput | None = None
    images: tuple[str, ...] = ()


# --- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities after the samplers' temperature-free softmax; `top` maps token text to logprob."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in the worker. Rates are None when nothing was timed."""

    prefill_s: float = 0.0
    decode_s: float = 0.0

    def prefill_rate(self, usage: Usage) -> float | None:
        tokens = usage.prompt_tokens - usage.cached_tokens
        return tokens / self.prefill_s if self.prefill_s > 0 and tokens > 0 else None

    def decode_rate(self, usage: Usage) -> float | None:
        """Tokens per second after the first one, whose time belongs to the prefill."""
        steps = usage.completion_tokens - 1
        return steps / self.decode_s if self.decode_s > 0 and steps > 0 else None


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    request_id: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """`text` is the delta that is safe to show; it may be empty while text is held back (half a code point, a
    possible stop sequence). `token_ids` are the tokens decoded since the last event; -1 is one a remote server does not name."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a generation. `applied` are the sampling parameters the engine used, in its own terms;
    `ignored` maps each parameter it could not honour to the reason."""

    request_id: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings = field(default_factory=Timings)
    stop_match: str | None = None
    peak_memory_bytes: int | None = None
    applied: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    seed: int | None = None


Event = PrefillProgress | TokenEvent | Done


# --- models and loaders ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quantization:
    """`method` is the field's word: gptq, awq, exl2, bnb, or a GGUF type such as Q4_K_M."""

    method: str
    bits: float | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What modules.detect found on disk, from the content and headers alone. `problem` says why it can't be loaded. `projector`
    is the file that reads images for this one; `size_bytes` and `files` hold it too."""

    id: str
    path: str
    format: ModelFormat
    size_bytes: int = 0
    architecture: str | None = None
    quantization: Quantization | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    parameters: int | None = None
    has_chat_template: bool = False
    base_model: str | None = None
    license: str | None = None
    bundled: bool = False
    vision: bool = False
    projector: str | None = None
    files: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded engine reports. `device_map` maps a device to the share of the weights on it. `slots` is how many generations
    it runs at once where that depends on its options; 0: as its loader says. `lacks` are features and samplers of its loader that
    this one model does without (a remote server that offers less); "tokenizer" among them: it has none that can be asked.
    `image_token` stands for an image in a prompt; None: the model reads no images, and `no_images` says why where there is more
    to say. `image_tokens` is about how many of the context an image takes. `image_inline`: the engine puts in what the model
    wants around an image, so `image_token` goes into the text of a message, whatever its template does with images."""

    name: str
    path: str
    loader: str
    format: str
    architecture: str | None = None
    quantization: Quantization | None = None
    dtype: str | None = None
    context_length: int = 0
    vocab_size: int = 0
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    device_map: dict[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    engine: str | None = None
    notes: tuple[str, ...] = ()
    slots: int = 0
    lacks: tuple[str, ...] = ()
    image_token: str | None = None
    image_tokens: int = 0
    image_inline: bool = False
    no_images: str = ""


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One load option: a form control, a command line flag and a documented default in one place.

    `kind`: bool, int, float, str, choice, path or paths. `aliases` are names other products use for it.
    """

    name: str
    kind: Literal["bool", "int", "float", "str", "choice", "path", "paths"]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    aliases: tuple[str, ...] = ()
    advanced: bool = False


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """A backend as the registry sees it, readable without importing the backend.

    `formats` maps a model format to a priority: the highest is offered first.
    `engine` is "package.module:Class", imported in the worker only. `overlay` names the environment it runs in
    (`modules.overlays`), or None for the parent's own. `probe` are the modules that must import in the overlay.
    `samplers` are the names in `modules.sampling.PARAMETERS` that it honours.
    `features` are the optional parts of the interface: logprobs, echo, grammar, json_schema, regex, lora, embeddings, score,
    vision (of models that see), messages (it takes conversations as they are and renders them itself).
    `slots` is how many generations one worker runs at once; the others wait in its queue. `builtin` are models that need no
    file.
    """

    name: str
    title: str
    engine: str
    summary: str
    formats: dict[str, int]
    samplers: frozenset[str]
    options: tuple[OptionSpec, ...] = ()
    features: frozenset[str] = frozenset()
    overlay: str | None = None
    probe: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ("linux", "darwin", "win32")
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs_cuda: bool = False
    slots: int = 1
    builtin: tuple[ModelFiles, ...] = ()
    notes: tuple[str, ...] = ()

    def option(self, name: str) -> OptionSpec | None:
        return next((o for o in self.options if o.name == name or name in o.aliases), None)


def features_of(spec: LoaderSpec, info: ModelInfo | None) -> frozenset[str]:
    """What a loader can do with this very model."""
    return spec.features.difference(info.lacks) if info is not None else spec.features


def samplers_of(spec: LoaderSpec, info: ModelInfo | None) -> frozenset[str]:
    """The sampling parameters that a loader honours with this very model."""
    return spec.samplers.difference(info.lacks) if info is not None else spec.samplers


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """`stage` is shown as it is: "Reading weights". `fraction` is None while it is unknown."""

    stage: str
    fraction: float | None = None


# --- wire form -------------------------------------------------------------------------------------------------


def to_wire(value: Any) -> Any:
    """A JSON-safe copy: dataclasses become dicts, tuples and sets become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_wire(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_wire(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_wire(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_wire(item) for item in value)
    return value


def from_wire(cls: type[T], data: dict[str, Any]) -> T:
    """Rebuild a dataclass from `to_wire`'s dict.

    Unknown keys raise TypeError: both ends are of one version, and the handshake has checked it.
    """
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    unknown = data.keys() - hints.keys()
    if unknown:
        raise TypeError(f"{cls.__name__} has no field {sorted(unknown)}")
    return cls(**{key: _revive(hints[key], item) for key, item in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _revive(hint: Any, item: Any) -> Any:
    if item is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return _revive(options[0], item) if len(options) == 1 else item
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_wire(hint, item)
    if origin is tuple:
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_revive(args[0], part) for part in item)
        return tuple(_revive(arg, part) for arg, part in zip(args, item, strict=True))
    if origin is frozenset:
        return frozenset(item)
    return item

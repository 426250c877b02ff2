"""What the loaders share that get logits from their library and pick the tokens themselves: options, parameters, the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from modules import sampling as table
from modules.engine import CancelToken, Engine
from modules.errors import ContextLengthExceeded
from modules.schema import Event, GenerationRequest, LoaderSpec, OptionSpec

if TYPE_CHECKING:
    from loaders._hf_text import TextCodec

BEAMS = frozenset({"num_beams", "length_penalty", "early_stopping"})
GUIDANCE = frozenset({"guidance_scale", "negative_prompt"})
# They need hidden states, or a cache that goes back: more of the model than its next row of logits.
NEED_THE_MODEL = BEAMS | {"penalty_alpha", "prompt_lookup_num_tokens"}

Encode = Callable[[str, bool], list[int]]

THREADS = OptionSpec("threads", "int", 0, "CPU threads; 0 is one per core.", minimum=0, maximum=1024)


def ctx_size(text: str = "Context length in tokens; 0 is the model's own.") -> OptionSpec:
    """The option every loader calls alike."""
    aliases = ("n_ctx", "max_seq_len", "context_length", "ctx-size")
    return OptionSpec("ctx_size", "int", 0, text, minimum=0, maximum=10_000_000, aliases=aliases)


def prefill_chunk(default: int) -> OptionSpec:
    text = "Tokens per step of the prefill."
    return OptionSpec("prefill_chunk", "int", default, text, minimum=16, maximum=65_536, advanced=True)


def guidance_of(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of guidance that are on; empty without it."""
    return {name: value for name, value in table.active(sampling).items() if name in GUIDANCE}


def negative_ids(guidance: Mapping[str, Any], encode: Encode, prompt: Sequence[int], context: int, answer: int) -> list[int]:
    """The negative prompt's ids; without one the prompt's last token stands for it, as in HF transformers.

    Raises ContextLengthExceeded where the longest answer does not fit behind it.
    """
    negative = encode(guidance["negative_prompt"], False) if "negative_prompt" in guidance else []
    negative = negative or list(prompt[-1:])
    if len(negative) + answer > context:
        raise ContextLengthExceeded(
            "The negative prompt leaves no room for the answer.", hint="Shorten it.", param="negative_prompt"
        )
    return negative


def native_parameters(spec: LoaderSpec, sampling: dict[str, Any]) -> dict[str, Any]:
    """{"sampler": parameters for `modules.samplers.SamplerChain`, "ignored": what can't be honoured -> why}."""
    honoured, ignored = table.split_supported(sampling, spec.samplers, spec.title)
    return {"sampler": honoured, "ignored": ignored}


class Runner(Protocol):
    """A loaded model at work."""

    @property
    def text(self) -> TextCodec: ...
    def generate(
        self, request: GenerationRequest, cancel: CancelToken, sampler: dict[str, Any], ignored: dict[str, str]
    ) -> Iterator[Event | None]: ...
    def score(self, token_ids: Sequence[int]) -> list[float]: ...
    def embed(self, token_ids: Sequence[int]) -> list[float]: ...
    def device_memory(self) -> int | None: ...


class LogitsEngine(Engine):
    """An engine around a runner, which `load` makes. `packages` are those whose versions the handshake tells."""

    packages: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._runner: Any = None

    @classmethod
    def versions(cls) -> dict[str, str]:
        from importlib import metadata  # a worker's need: the parent reads every loader's table at its start

        found = {}
        for package in cls.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    @classmethod
    def to_native(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        """Sampling parameters as this loader runs them; see `native_parameters`."""
        return native_parameters(cls.spec, sampling)

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "load comes first"
        runner: Runner = self._runner
        return runner

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        native = self.to_native(request.sampling)
        yield from self.runner.generate(request, cancel, native["sampler"], native["ignored"])

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.runner.text.encode(text, add_special)

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return self.runner.text.decode(token_ids, skip_special)

    def token_text(self, token_id: int) -> str:
        return self.runner.text.token_text(token_id)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return self.runner.score(token_ids)

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        return self.runner.embed(token_ids) if "embeddings" in self.spec.features else super().embed(token_ids)

    def memory_bytes(self) -> int | None:
        return self.runner.device_memory() if self._runner else None

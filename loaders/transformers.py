"""Transformers: Hugging Face folders of safetensors, in full precision or bitsandbytes 8 and 4 bits, with LoRA adapters.

This module is the spec and the thin engine; `_hf_load` reads the model, `_hf_generate` runs it. The decode loop is our own, not
`generate()` with a streamer in a second thread: one computing thread, one look at the cancel token per token, and the KV
cache kept for the next turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from modules import sampling as table
from modules.engine import CancelToken, Engine, Progress
from modules.errors import UnsupportedParameter
from modules.schema import Event, GenerationRequest, LoaderSpec, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from loaders._hf_generate import HfRunner

_BEAMS = frozenset({"num_beams", "length_penalty", "early_stopping"})
_NOT_YET = frozenset({"penalty_alpha"})
# What beam search honours beside its own parameters, under generate()'s names.
_WITH_BEAMS = {
    "repetition_penalty": "repetition_penalty",
    "encoder_repetition_penalty": "encoder_repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
_ANY_WAY = frozenset({"seed", "skip_special_tokens", "ban_eos_token"})

SPEC = LoaderSpec(
    name="transformers",
    title="Transformers",
    engine="loaders.transformers:TransformersEngine",
    summary="Hugging Face models as they come (safetensors), on CPU or GPU, also in 8 and 4 bits by bitsandbytes.",
    formats={"hf": 100},
    samplers=frozenset(table.PARAMETERS) - _NOT_YET,
    options=(
        OptionSpec(
            "ctx_size",
            "int",
            0,
            "Context length in tokens; 0 is the model's own.",
            minimum=0,
            maximum=10_000_000,
            aliases=("n_ctx", "max_seq_len", "context_length"),
        ),
        OptionSpec(
            "dtype",
            "choice",
            "auto",
            "Number format of the weights. auto: the checkpoint's on a GPU; on a CPU float32 where it fits, else bfloat16.",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
        OptionSpec("load_in_8bit", "bool", False, "Quantise to 8 bits while loading (bitsandbytes).", aliases=("load-in-8bit",)),
        OptionSpec("load_in_4bit", "bool", False, "Quantise to 4 bits while loading (bitsandbytes).", aliases=("load-in-4bit",)),
        OptionSpec("quant_type", "choice", "nf4", "4-bit number format.", choices=("nf4", "fp4"), advanced=True),
        OptionSpec(
            "use_double_quant", "bool", False, "4-bit: quantise the scales, too (saves 0.4 bits a weight).", advanced=True
        ),
        OptionSpec(
            "compute_dtype",
            "choice",
            "auto",
            "4-bit: number format of the arithmetic.",
            choices=("auto", "float32", "bfloat16", "float16"),
            advanced=True,
        ),
        OptionSpec("cpu", "bool", False, "Stay on the CPU even if there is a GPU."),
        OptionSpec(
            "device_map",
            "choice",
            "auto",
            "How layers are spread over several devices.",
            choices=("auto", "balanced", "balanced_low_0", "sequential"),
            advanced=True,
        ),
        OptionSpec(
            "gpu_memory", "str", "", "GiB of weights per GPU, separated by commas: 10,8. Empty: what is free.", advanced=True
        ),
        OptionSpec("cpu_memory", "float", 0.0, "GiB of weights in main memory; 0 is what is free.", minimum=0, advanced=True),
        OptionSpec("disk", "bool", False, "Keep what does not fit on disk (slow).", advanced=True),
        OptionSpec("disk_cache_dir", "path", "", "Folder for the weights kept on disk; empty is a temporary one.", advanced=True),
        OptionSpec("lora", "paths", (), "LoRA adapters (PEFT folders)."),
        OptionSpec(
            "lora_weights", "str", "", "One weight per adapter, separated by commas: 1,0.5. Empty: 1 each.", advanced=True
        ),
        OptionSpec(
            "attn_implementation",
            "choice",
            "auto",
            "Attention kernel.",
            choices=("auto", "sdpa", "eager", "flash_attention_2"),
            aliases=("attn-implementation",),
            advanced=True,
        ),
        OptionSpec("threads", "int", 0, "CPU threads; 0 is one per core.", minimum=0, maximum=1024),
        OptionSpec("prefill_chunk", "int", 512, "Tokens per step of the prefill.", minimum=16, maximum=65_536, advanced=True),
    ),
    features=frozenset({"logprobs", "echo", "lora", "score", "embeddings", "grammar", "json_schema", "regex"}),
    overlay="transformers",
    probe=("torch", "transformers", "accelerate", "safetensors"),
    devices=("cpu", "cuda", "mps"),
    notes=("Beam search gives its text in one piece at the end.",),
)


def to_native(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as this loader runs them.

    "sampler" goes to `modules.samplers.SamplerChain`; with beams "generate" holds keyword arguments of `generate()` instead.
    "ignored" maps what can't be honoured to the reason.
    """
    honoured, ignored = table.split_supported(sampling, SPEC.samplers, SPEC.title)
    if honoured.get("num_beams", 1) == 1:
        return {"sampler": {k: v for k, v in honoured.items() if k not in _BEAMS}, "ignored": ignored}
    active = table.active(honoured)
    generate = {"num_beams": active["num_beams"], "do_sample": False}
    generate |= {name: honoured[name] for name in ("length_penalty", "early_stopping") if name in honoured}
    generate |= {_WITH_BEAMS[name]: value for name, value in active.items() if name in _WITH_BEAMS}
    lost = active.keys() - _BEAMS - _WITH_BEAMS.keys() - _ANY_WAY
    ignored |= {name: "Beam search takes the likeliest text and does not sample." for name in lost}
    return {"generate": generate, "ignored": ignored}


class TransformersEngine(Engine):
    spec = SPEC

    def __init__(self) -> None:
        self._runner: HfRunner | None = None

    @classmethod
    def versions(cls) -> dict[str, str]:
        found = {}
        for package in ("transformers", "torch", "accelerate", "peft", "bitsandbytes"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._hf_generate import HfRunner
        from loaders._hf_load import load

        loaded = load(path, options, progress)
        self._runner = HfRunner(loaded, prefill_chunk=options["prefill_chunk"])
        return loaded.info

    @property
    def runner(self) -> HfRunner:
        assert self._runner is not None, "load comes first"
        return self._runner

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        native = to_native(request.sampling)
        if "generate" in native:
            if request.grammar is not None or request.json_schema is not None or request.regex is not None:
                raise UnsupportedParameter("Beam search can't be held to a form.", hint="Leave num_beams out.", param="num_beams")
            yield from self.runner.beam_search(request, cancel, native["generate"], native["ignored"])
        else:
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
        return self.runner.embed(token_ids)

    def memory_bytes(self) -> int | None:
        return self.runner.device_memory() if self._runner else None

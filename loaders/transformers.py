"""Transformers: Hugging Face folders of safetensors, in full precision or bitsandbytes 8 and 4 bits, with LoRA adapters.

This module is the spec and the thin engine; `_hf_load` reads the model, `_hf_generate` runs it. The decode loop is our own, not
`generate()` with a streamer in a second thread: one computing thread, one look at the cancel token per token, and the KV
cache kept for the next turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from loaders._estimate import FLOAT32_SHARE, TRANSFORMERS_BASE, context_of, layer_cache, prefill_bytes
from loaders._logits import BEAMS, THREADS, LogitsEngine, ctx_size, native_parameters, prefill_chunk
from modules import sampling as table
from modules.errors import UnsupportedParameter
from modules.plan.types import DTYPE_BYTES, Machine, Memory, Setting, Shape
from modules.schema import LoaderSpec, OptionSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from modules.engine import CancelToken, Progress
    from modules.schema import Event, GenerationRequest, ModelInfo

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
    samplers=frozenset(table.PARAMETERS),
    options=(
        ctx_size(),
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
        THREADS,
        prefill_chunk(512),
    ),
    features=frozenset({"logprobs", "echo", "lora", "score", "embeddings", "grammar", "json_schema", "regex", "vision"}),
    overlay="transformers",
    probe=("torch", "transformers", "accelerate", "safetensors"),
    devices=("cpu", "cuda", "mps"),
    notes=(
        "Models with a vision part read images.",
        "Beam search gives its text in one piece at the end.",
    ),
)

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of the machine's bandwidth. bfloat16 is slow where the processor has no instructions for it.
EFFICIENCY = {"float32": 0.8, "float16": 0.35, "bfloat16": 0.35, "8 bits": 0.15, "4 bits": 0.35}
_BFLOAT16_SETS, _BFLOAT16_EFFICIENCY = frozenset({"avx512_bf16", "amx_bf16"}), 0.65
# Without AVX-512, bitsandbytes expands each matrix for each token.
_EXPANDED_EFFICIENCY = 0.0125
_LAYER_S = 0.0006


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator."""
    gpu = bool(machine.gpus) and not options["cpu"]
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if gpu or 4 * shape.parameters >= FLOAT32_SHARE * machine.ram_available_bytes else "float32"
    width = DTYPE_BYTES[dtype]
    ends = (shape.embedding + shape.output) * width
    if shape.quantization is not None:  # bitsandbytes, FP8 and others as they are stored
        weights = sum(shape.stored.values())
    elif options["load_in_4bit"]:
        weights = ends + int(shape.matrices * (0.516 if options["use_double_quant"] else 0.5625))
    elif options["load_in_8bit"]:
        weights = ends + shape.matrices
    else:
        weights = ends + shape.matrices * width
    # Weights in the file's own format are used where they are mapped; of the embedding only the rows that are looked up.
    stored = max(shape.stored, key=lambda name: shape.stored[name], default="")
    plain = shape.quantization is None and not options["load_in_4bit"] and not options["load_in_8bit"]
    in_file = plain and not gpu and not options["lora"] and _STORED.get(stored) == dtype
    looked_up = 0 if shape.tied else shape.embedding * width
    loading = 4 * shape.largest
    if shape.quantization is None and options["load_in_8bit"]:  # bitsandbytes holds what it has read beside it (measured)
        loading += shape.matrices * max(width - 1, 0)
    context = context_of(shape, options)
    cache = shape.cache_elements(context) * width + shape.state
    compute = prefill_bytes(shape, min(int(options["prefill_chunk"]), context), context) + layer_cache(shape, context, width)
    read = int((weights - looked_up) * shape.active) + cache // 2
    on_gpu = weights + cache + compute if gpu else 0
    # Layers that the GPUs have no room for stay in main memory, except with bitsandbytes.
    left = min(max(on_gpu - machine.vram_free_bytes, 0), weights) if plain else 0
    return Memory(
        weights=left if gpu else 0 if in_file else weights,
        mapped=weights - looked_up if in_file else 0,
        cache=0 if gpu else cache,
        compute=0 if gpu else compute,
        base=TRANSFORMERS_BASE,
        loading=loading,
        vram=on_gpu - left,
        read=read,
        efficiency=_efficiency(dtype, options, machine),
        step_s=_LAYER_S * shape.layers,
    )


def _efficiency(dtype: str, options: Mapping[str, Any], machine: Machine) -> float:
    if options["load_in_8bit"]:
        return EFFICIENCY["8 bits"]
    if options["load_in_4bit"]:
        expanded = (not machine.gpus or options["cpu"]) and not any(name.startswith("avx512") for name in machine.instructions)
        return _EXPANDED_EFFICIENCY if expanded else EFFICIENCY["4 bits"]
    if dtype == "bfloat16" and _BFLOAT16_SETS & set(machine.instructions):
        return _BFLOAT16_EFFICIENCY
    return EFFICIENCY[dtype]


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """Number formats, and bitsandbytes' 8 and 4 bits for what is not quantised yet."""
    if shape.quantization is not None:
        return [Setting({})]
    found = [
        Setting({"dtype": "float32"}, "float32"),
        Setting({"dtype": "bfloat16"}, "bfloat16"),
        Setting({"load_in_8bit": True}, "8 bits", loss=1, quantization="bnb-8bit"),
        Setting({"load_in_4bit": True}, "4 bits", loss=2, quantization="bnb-4bit"),
    ]
    return found[1:] if machine.gpus else found


class TransformersEngine(LogitsEngine):
    spec = SPEC
    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch", "accelerate", "peft", "bitsandbytes")

    @classmethod
    def to_native(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        """With beams, "generate" holds keyword arguments of transformers' `generate()` in place of "sampler"."""
        native = native_parameters(cls.spec, sampling)
        honoured, ignored = native["sampler"], native["ignored"]
        if honoured.get("num_beams", 1) == 1:
            return {"sampler": {k: v for k, v in honoured.items() if k not in BEAMS}, "ignored": ignored}
        active = table.active(honoured)
        generate = {"num_beams": active["num_beams"], "do_sample": False}
        generate |= {name: honoured[name] for name in ("length_penalty", "early_stopping") if name in honoured}
        generate |= {_WITH_BEAMS[name]: value for name, value in active.items() if name in _WITH_BEAMS}
        lost = active.keys() - BEAMS - _WITH_BEAMS.keys() - _ANY_WAY
        ignored |= {name: "Beam search takes the likeliest text and does not sample." for name in lost}
        return {"generate": generate, "ignored": ignored}

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._hf_generate import HfRunner
        from loaders._hf_load import load

        loaded = load(path, options, progress)
        self._runner = HfRunner(loaded, prefill_chunk=options["prefill_chunk"])
        return loaded.info

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        native = self.to_native(request.sampling)
        if "sampler" in native:
            yield from self.runner.generate(request, cancel, native["sampler"], native["ignored"])
            return
        if request.images:
            raise UnsupportedParameter("Beam search reads no images.", hint="Leave num_beams out.", param="num_beams")
        if request.grammar is not None or request.json_schema is not None or request.regex is not None:
            raise UnsupportedParameter("Beam search can't be held to a form.", hint="Leave num_beams out.", param="num_beams")
        from loaders._hf_beams import beam_search

        yield from beam_search(self._runner, request, cancel, native["generate"], native["ignored"])

"""ExLlama: 4-bit GPTQ and EXL2 checkpoints through exllamav2, EXL3 through exllamav3. CUDA only: both compile CUDA kernels.

This module is the spec, what it refuses, and the thin engine. `_exllama_load` reads the model and maps the options,
`_exllama_nets` puts both packages behind one forward call, and `_hf_generate` runs it: so samplers, stop rules, the prefix
cache and scores are the same as everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loaders import transformers as hf
from loaders._estimate import context_of
from loaders._logits import BEAMS, LogitsEngine, ctx_size, prefill_chunk
from modules.plan.types import MIB, Machine, Memory, Setting, Shape
from modules.schema import LoaderSpec, ModelFiles, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.engine import Progress

CACHE_TYPES = ("fp16", "q8", "q6", "q4")

SPEC = LoaderSpec(
    name="exllama",
    title="ExLlama",
    engine="loaders.exllama:ExllamaEngine",
    summary="4-bit GPTQ and EXL2 checkpoints through exllamav2, EXL3 through exllamav3, on NVIDIA GPUs.",
    formats={"exl3": 100, "exl2": 100, "gptq": 80},
    samplers=hf.SPEC.samplers - BEAMS - {"penalty_alpha"},  # exllama gives no hidden states
    options=(
        ctx_size(),
        OptionSpec(
            "kv_cache",
            "choice",
            "fp16",
            "Number format of the KV cache; q8, q6 and q4 take 1/2, 3/8 and 1/4 of fp16's memory.",
            choices=CACHE_TYPES,
        ),
        OptionSpec(
            "gpu_split",
            "str",
            "",
            "GiB to use on each GPU, separated by commas: 20,7. Empty: filled one after the other.",
            aliases=("gpu-split",),
        ),
        OptionSpec(
            "tensor_parallel",
            "bool",
            False,
            "Every GPU computes a part of each layer.",
            aliases=("enable_tp", "enable-tp"),
        ),
        OptionSpec(
            "alpha_value",
            "float",
            1.0,
            "NTK factor for contexts beyond the trained one (exllamav2).",
            minimum=1.0,
            maximum=1000.0,
            advanced=True,
        ),
        OptionSpec(
            "compress_pos_emb",
            "float",
            1.0,
            "Divisor of the positions, for models trained with it (exllamav2).",
            minimum=1.0,
            maximum=1000.0,
            advanced=True,
        ),
        OptionSpec(
            "num_experts_per_token",
            "int",
            0,
            "Experts a mixture model asks for each token; 0 is the model's own (exllamav2).",
            minimum=0,
            maximum=1024,
            advanced=True,
        ),
        OptionSpec("no_flash_attn", "bool", False, "Do without flash-attention (exllamav2).", advanced=True),
        OptionSpec("no_xformers", "bool", False, "Do without xformers (exllamav2).", advanced=True),
        OptionSpec("no_sdpa", "bool", False, "Do without torch's attention kernel (exllamav2).", advanced=True),
        OptionSpec("lora", "paths", (), "LoRA adapters (PEFT folders)."),
        OptionSpec(
            "lora_weights", "str", "", "One weight per adapter, separated by commas: 1,0.5. Empty: 1 each.", advanced=True
        ),
        prefill_chunk(2048),
    ),
    features=frozenset({"logprobs", "echo", "lora", "score", "grammar", "json_schema", "regex"}),
    overlay="exllama",
    probe=("torch", "tokenizers", "exllamav2|exllamav3"),
    platforms=("linux", "win32"),
    devices=("cuda",),
    needs_cuda=True,
    notes=("The first load compiles the CUDA kernels (minutes): it needs the CUDA toolkit (nvcc) and a C++ compiler.",),
)


def refusal(files: ModelFiles) -> str | None:
    """Why this loader does not take a model of a format that it takes in general, in one line."""
    quantization = files.quantization
    if files.format == "gptq" and quantization and quantization.bits not in (None, 4):
        return f"takes GPTQ of 4 bits; this has {quantization.bits:g}. GPTQ-for-LLaMA takes 2, 3, 4 and 8."
    return None


_CACHE_WIDTHS = {"fp16": 2.0, "q8": 1.0, "q6": 0.75, "q4": 0.5}
_BASE, _GPU_BASE = 1500 * MIB, 600 * MIB  # CUDA's libraries in main memory; its context and the work buffers on each GPU


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator. Arithmetic only: no GPU was at hand to measure on."""
    cache = int(shape.cache_elements(context_of(shape, options)) * _CACHE_WIDTHS[options["kv_cache"]])
    compute = 2 * int(options["prefill_chunk"]) * (3 * (shape.ffn or 4 * shape.hidden) + 4 * shape.hidden) + 4 * shape.vocab
    return Memory(
        weights=0,
        base=_BASE,
        loading=4 * shape.largest,
        vram=shape.file_bytes + cache + compute + _GPU_BASE * max(len(machine.gpus), 1),
        grows=False,
    )


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """The cache's number formats."""
    losses = {"fp16": 0, "q8": 1, "q6": 2, "q4": 3}
    return [Setting({"kv_cache": name}, f"{name} cache", loss=loss) for name, loss in losses.items()]


class ExllamaEngine(LogitsEngine):
    spec = SPEC
    packages = ("exllamav2", "exllamav3", "torch")

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._exllama_load import load
        from loaders._hf_generate import HfRunner

        loaded = load(path, options, progress)
        self._runner = HfRunner(loaded, prefill_chunk=options["prefill_chunk"])
        return loaded.info

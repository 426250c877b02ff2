"""RWKV: recurrent models of versions 4 to 7, from their own files, with the rwkv package.

This module is the spec and the thin engine; `_rwkv_load` reads the model, `_rwkv_run` runs it, `_rwkv_states` keeps states,
`_rwkv_text` holds the tokenizers. The recurrent state is the prefix cache: what has been read once is not read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loaders._estimate import context_of
from loaders._logits import NEED_THE_MODEL, THREADS, LogitsEngine, ctx_size, prefill_chunk
from modules import sampling as table
from modules.plan.types import Machine, Memory, Setting, Shape
from modules.schema import LoaderSpec, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.engine import Progress

SPEC = LoaderSpec(
    name="rwkv",
    title="RWKV",
    engine="loaders.rwkv:RwkvEngine",
    summary="RWKV models of versions 4 to 7 (.safetensors): recurrent networks whose memory does not grow with the text.",
    formats={"rwkv": 100},
    samplers=frozenset(table.PARAMETERS) - NEED_THE_MODEL,
    options=(
        OptionSpec(
            "strategy",
            "str",
            "auto",
            "Device and number format: cpu fp32, cpu bf16, cuda fp16, cuda bf16. Versions 4 to 6 also take fp16i8 and fp32i8 "
            "(8-bit weights) and layer splits: cuda fp16i8 *10 -> cpu fp32. auto: cuda fp16 on a GPU, else cpu fp32.",
            aliases=("rwkv_strategy",),
        ),
        ctx_size("Tokens of prompt and answer; 0 is what the model was trained on, or 4096. An RWKV reads on beyond it, worse."),
        OptionSpec(
            "tokenizer",
            "choice",
            "auto",
            "Tokenizer. auto: tokenizer.json in the model's folder; else by the size of the vocabulary: 65536 world, 50277 20b "
            "(20B_tokenizer.json beside the model), 256 bytes.",
            choices=("auto", "world", "20b", "bytes"),
        ),
        OptionSpec(
            "state_cache_mb",
            "int",
            256,
            "MB of memory for states of text already read, so that another turn, a regenerated answer or an edited message only "
            "costs its new tokens; 0 keeps the last one only.",
            minimum=0,
            maximum=1_000_000,
        ),
        OptionSpec(
            "state_every",
            "int",
            256,
            "Tokens between two states that are kept inside a long text.",
            minimum=16,
            maximum=1_000_000,
            advanced=True,
        ),
        OptionSpec(
            "cuda_kernel",
            "bool",
            False,
            "Compile the package's own CUDA kernels for a faster prefill; needs a CUDA toolkit and a C++ compiler.",
            aliases=("rwkv_cuda_on",),
            advanced=True,
        ),
        OptionSpec(
            "ln_x_eps",
            "float",
            0.0,
            "Versions 5 and 6: epsilon of the norm after the heads. 0 is the package's 0.00064; a model that was trained without "
            "the usual division by 8 needs 0.00001.",
            minimum=0,
            maximum=1,
            advanced=True,
        ),
        THREADS,
        prefill_chunk(256),
    ),
    features=frozenset({"logprobs", "echo", "score", "grammar", "json_schema", "regex"}),
    overlay="rwkv",
    probe=("torch", "rwkv", "safetensors", "tokenizers"),
    devices=("cpu", "cuda"),
    notes=("A .pth file is a pickle: turn it into .safetensors with `server.py convert FILE --to safetensors --allow-pickle`.",),
)

EFFICIENCY, _LAYER_S = 0.75, 0.0005
_BASE = 270 << 20
_HALF = 0.55  # of the bandwidth: torch's products of 16-bit matrices on a CPU without instructions for them
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1}


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator. Of a strategy with several parts the first counts."""
    words = str(options["strategy"]).strip().split() or ["auto"]
    gpu = words[0].startswith("cuda") or (words[0] == "auto" and bool(machine.gpus))
    number = words[1] if len(words) > 1 else ("fp16" if gpu else "fp32")
    width = _WIDTHS["i8" if number.endswith("i8") else number[:4] if number[:4] in _WIDTHS else "fp32"]
    ends = shape.embedding + shape.output
    weights = shape.matrices * width + ends * (_WIDTHS.get(number[:4], 4))
    context = context_of(shape, options)
    states = max(context // int(options["state_every"]) + 2, 2) * (shape.state + 4 * context)
    cache = shape.state + min(states, int(options["state_cache_mb"]) * 1_000_000)
    compute = 4 * (int(options["prefill_chunk"]) * (12 * shape.hidden) + 2 * shape.vocab)
    return Memory(
        weights=0 if gpu else weights,
        cache=cache,
        compute=compute,
        base=_BASE,
        loading=4 * shape.largest,
        vram=weights if gpu else 0,
        read=weights - shape.embedding * width,
        efficiency=EFFICIENCY * (_HALF if number == "bf16" and not gpu else 1),
        step_s=_LAYER_S * shape.layers,
    )


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """float32, bfloat16 and, before version 7, 8-bit weights."""
    device = "cuda fp16" if machine.gpus else "cpu fp32"
    found = [Setting({"strategy": device}, device), Setting({"strategy": "cpu bf16"}, "bfloat16")]
    if shape.version != "7":
        found.append(Setting({"strategy": f"{device}i8"}, "8 bits", loss=1, quantization="int8"))
    return found


class RwkvEngine(LogitsEngine):
    spec = SPEC
    packages = ("rwkv", "torch")

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._rwkv_load import load
        from loaders._rwkv_run import RwkvRunner

        loaded = load(path, options, progress)
        self._runner = RwkvRunner(loaded, options)
        return loaded.info

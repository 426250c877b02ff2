"""GPTQ-for-LLaMA: the product's own runtime for GPTQ checkpoints of every age and width, on any architecture of Transformers.

This module is the spec and the thin engine. `_gptq_load` reads the checkpoint, `_gptq_choose` gives each packed layer a kernel
(`_gptq_linear`: torch's; `_gptq_cpu`: our own, in C; `_gptq_triton`), and `_gptq_decoder` or the Transformers loader's
`_hf_generate` runs the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from loaders import transformers as hf
from loaders._estimate import SMALL_BYTES, TRANSFORMERS_BASE, context_of, layer_cache, prefill_bytes
from loaders._logits import THREADS, ctx_size, prefill_chunk
from modules.plan.types import Machine, Memory, Setting, Shape
from modules.schema import LoaderSpec, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.engine import Progress

SPEC = LoaderSpec(
    name="gptq_for_llama",
    title="GPTQ-for-LLaMA",
    engine="loaders.gptq_for_llama:GptqEngine",
    summary="GPTQ checkpoints of 2, 3, 4 and 8 bits, old and new layouts, on this product's own kernels (CPU and CUDA).",
    formats={"gptq": 90},
    samplers=hf.SPEC.samplers,
    options=(
        ctx_size(),
        OptionSpec(
            "kernel",
            "choice",
            "auto",
            "How packed layers are computed. int8: own kernel, activations rounded to 8 bits, fastest; exact: own kernel, "
            "float32 activations; int4: torch's kernel, bf16 activations; dense: float32 in memory, exact; unpack: dequantised "
            "at each call, exact and slow; triton: CUDA. auto: exact for small models, else int8; Triton on CUDA.",
            choices=("auto", "int8", "exact", "int4", "dense", "unpack", "triton"),
        ),
        OptionSpec("cpu", "bool", False, "Stay on the CPU even if there is a GPU."),
        THREADS,
        prefill_chunk(512),
    ),
    features=frozenset({"logprobs", "echo", "score", "embeddings", "grammar", "json_schema", "regex"}),
    overlay="transformers",
    probe=("torch", "transformers", "accelerate", "safetensors"),
    devices=("cpu", "cuda"),
    notes=("Pickled checkpoints (.pt) are refused until `convert --allow-pickle` has written them as .safetensors.",),
)

_LAYER_S = 0.0002
EFFICIENCY = {"int8": 0.55, "exact": 0.45, "int4": 0.4, "dense": 0.8}


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine, base: int = TRANSFORMERS_BASE) -> Memory:
    """See modules.plan.planner.Estimator. The packed matrices stay packed but with the kernels that unpack them to float32."""
    gpu = bool(machine.gpus) and not options["cpu"]
    kernel = options["kernel"]
    if kernel == "auto":
        kernel = "triton" if gpu else "exact" if 4 * shape.packed <= SMALL_BYTES else "int8"
    groups = shape.packed // max(shape.group_size, 1)
    packed = shape.packed * 4 if kernel == "dense" else shape.packed_bytes + 2 * groups
    if kernel == "unpack":
        packed = shape.packed + 8 * groups
    rounded = kernel == "int8"  # the output layer, too, which then has a scale for 32 inputs
    output = shape.output or (shape.embedding if shape.tied and rounded else 0)
    kept = 4 if shape.tied and not rounded else 2
    ends = shape.embedding * kept + (output * 9 // 8 if rounded else output * 4)
    plain = 4 * max(shape.matrices - shape.packed, 0)
    weights = packed + ends + plain
    context = context_of(shape, options)
    cache = 4 * shape.cache_elements(context)
    compute = prefill_bytes(shape, min(int(options["prefill_chunk"]), context), context) + layer_cache(shape, context, 4)
    read = packed + plain + (output * 9 // 8 if rounded else 4 * (output or shape.embedding)) + cache // 2
    return Memory(
        weights=0 if gpu else weights,
        cache=0 if gpu else cache,
        compute=0 if gpu else compute,
        base=base,
        # A layer unpacked; the output layer as float32 and its 8-bit codes, before it is rounded; for the exact kernel what the
        # allocator has not given back by then (measured).
        loading=max(8 * shape.largest, 9 * output // 2 if rounded else 3 * shape.packed // 4 if kernel == "exact" else 0),
        vram=weights + cache // 2 + compute if gpu else 0,
        read=read,
        efficiency=EFFICIENCY.get(kernel),
        step_s=_LAYER_S * shape.layers,
    )


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """The kernel is the loader's choice; with a GPU that is too small, the CPU."""
    return [Setting({}), Setting({"cpu": True}, "on the CPU")] if machine.gpus else [Setting({})]


class GptqEngine(hf.TransformersEngine):
    spec = SPEC
    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._gptq_decoder import make_runner
        from loaders._gptq_load import load

        runner = make_runner(load(path, options, progress), options["prefill_chunk"])
        self._runner = runner
        return runner.info

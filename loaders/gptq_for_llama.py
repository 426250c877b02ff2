"""GPTQ-for-LLaMA: the product's own runtime for GPTQ checkpoints of every age and width, on any architecture of Transformers.

This module is the spec and the thin engine. `_gptq_load` reads the checkpoint, `_gptq_choose` gives each packed layer a kernel
(`_gptq_linear`: torch's; `_gptq_cpu`: our own, in C; `_gptq_triton`), and `_gptq_decoder` or the Transformers loader's
`_hf_generate` runs the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from loaders import transformers as hf
from loaders._logits import THREADS, ctx_size, prefill_chunk
from modules.schema import LoaderSpec, ModelInfo, OptionSpec

if TYPE_CHECKING:
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


class GptqEngine(hf.TransformersEngine):
    spec = SPEC
    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._gptq_decoder import make_runner
        from loaders._gptq_load import load

        runner = make_runner(load(path, options, progress), options["prefill_chunk"])
        self._runner = runner
        return runner.info

"""GPTQ-for-LLaMA: the product's own runtime for GPTQ checkpoints of every age and width, on any architecture of Transformers.

This module is the spec and the thin engine; `_gptq_load` reads the checkpoint, `_gptq_linear` holds the kernels, and the
Transformers loader's `_hf_generate` runs the model.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from loaders import transformers as hf
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
            "kernel",
            "choice",
            "auto",
            "How packed layers are computed. int4: packed, bf16 activations; dense: float32 in memory, exact; unpack: packed, "
            "exact, slow; triton: CUDA. auto: dense for small models, else int4; Triton on CUDA.",
            choices=("auto", "int4", "dense", "unpack", "triton"),
        ),
        OptionSpec("cpu", "bool", False, "Stay on the CPU even if there is a GPU."),
        OptionSpec("threads", "int", 0, "CPU threads; 0 is one per core.", minimum=0, maximum=1024),
        OptionSpec("prefill_chunk", "int", 512, "Tokens per step of the prefill.", minimum=16, maximum=65_536, advanced=True),
    ),
    features=frozenset({"logprobs", "echo", "score", "embeddings", "grammar", "json_schema", "regex"}),
    overlay="transformers",
    probe=("torch", "transformers", "accelerate", "safetensors"),
    devices=("cpu", "cuda"),
    notes=("Pickled checkpoints (.pt) are refused; get them as .safetensors.",),
)


class GptqEngine(hf.TransformersEngine):
    spec = SPEC

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {package: metadata.version(package) for package in ("transformers", "torch")}

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._gptq_load import load
        from loaders._hf_generate import HfRunner

        loaded = load(path, options, progress)
        self._runner = HfRunner(loaded, prefill_chunk=options["prefill_chunk"])
        return loaded.info

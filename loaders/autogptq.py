"""AutoGPTQ: GPTQ checkpoints through the auto-gptq package, or through GPTQModel, its successor, where auto-gptq has no wheel.

The package builds the model and reads the checkpoint; its packed layers are then replaced by this product's kernels, because
its own CPU kernel dequantises every layer for every token. `kernel=package` keeps the package's.

This module is the spec and the thin engine; `_autogptq_load` is the loading, `_autogptq_package` all that is particular to
auto-gptq, `_autogptq_successor` to GPTQModel. `_gptq_decoder` and `_hf_generate` run the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from loaders import gptq_for_llama
from loaders import transformers as hf
from loaders.gptq_for_llama import settings as settings
from modules.schema import LoaderSpec, ModelInfo, OptionSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.engine import Progress
    from modules.plan.types import Machine, Memory, Shape

PACKAGES = ("auto-gptq", "gptqmodel")
PACKAGE_KERNEL = "package"


def _kernel_option() -> OptionSpec:
    ours = gptq_for_llama.SPEC.option("kernel")
    assert ours is not None
    return OptionSpec(
        ours.name,
        ours.kind,
        ours.default,
        f"{ours.help} package: the package's own kernel (a token or less per second on a CPU).",
        choices=(*ours.choices, PACKAGE_KERNEL),
    )


SPEC = LoaderSpec(
    name="autogptq",
    title="AutoGPTQ",
    engine="loaders.autogptq:AutoGptqEngine",
    summary="GPTQ checkpoints through the auto-gptq package (GPTQModel where it has no wheel), on this product's kernels.",
    formats={"gptq": 60},
    samplers=hf.SPEC.samplers,
    options=tuple(_kernel_option() if option.name == "kernel" else option for option in gptq_for_llama.SPEC.options),
    features=gptq_for_llama.SPEC.features,
    overlay="autogptq",
    probe=("torch", "transformers", "accelerate", "auto_gptq|gptqmodel"),
    devices=("cpu", "cuda"),
    notes=(
        "auto-gptq has wheels for Python 3.10 and 3.11 on Linux and Windows (x86-64); elsewhere GPTQModel runs, and the loaded "
        "model's details say so.",
        "Pickled checkpoints (.pt) are refused; get them as .safetensors.",
    ),
)

_BASE = 457 << 20  # the package brings more libraries than GPTQ-for-LLaMA's environment has


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator. The layers are GPTQ-for-LLaMA's, in another environment."""
    return gptq_for_llama.estimate(shape, options, machine, _BASE)


class AutoGptqEngine(hf.TransformersEngine):
    spec = SPEC
    packages: ClassVar[tuple[str, ...]] = (*PACKAGES, "transformers", "torch")

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._autogptq_load import load
        from loaders._gptq_decoder import make_runner

        runner = make_runner(load(path, options, progress), options["prefill_chunk"])
        self._runner = runner
        return runner.info

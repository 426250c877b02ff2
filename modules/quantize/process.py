"""Quantise in a child process of the Transformers environment, and end it whatever happens. The server imports no torch."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.child_process import Ended, run_job
from modules.errors import BackendUnavailable, IncompatibleModel, LoadError, LoadOutOfMemory
from modules.overlays import Overlays, start_script
from modules.quantize.settings import QuantizeSettings, check_settings

if TYPE_CHECKING:
    from modules.schema import ModelFiles

# Engine -> (environment, what must be in it, its title).
ENVIRONMENTS = {
    "switchyard": ("transformers", ("torch", "transformers", "accelerate", "safetensors"), "Transformers"),
    "auto-gptq": ("autogptq", ("torch", "transformers", "auto_gptq"), "AutoGPTQ"),
}
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """Make a checkpoint at `out` from the Hugging Face folder `base`. `device`: auto, cpu or cuda."""

    base: Path
    out: Path
    settings: QuantizeSettings
    device: str = "auto"
    threads: int = 0
    resume: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was made. `mean_loss` is the mean over the layers of each one's relative squared error."""

    path: Path
    size_bytes: int
    seconds: float
    mean_loss: float
    layers: int


def check_source(model: ModelFiles) -> None:
    """Raise IncompatibleModel for what can't be quantised."""
    if model.problem:
        raise IncompatibleModel(model.problem)
    if model.format != "hf" or model.quantization:
        raise IncompatibleModel(
            f"{model.id} is no plain Hugging Face folder.",
            hint="Quantise from the original model's safetensors in 16 or 32 bits.",
        )


def default_out(base: Path, settings: QuantizeSettings, folder: Path | None = None) -> Path:
    """NAME-GPTQ-4bit-128g, in `folder` or beside the base."""
    return (folder or base.parent) / f"{base.name}-{settings.tag}"


async def quantize(job: QuantizeJob, on_event: OnEvent, overlays: Overlays | None = None) -> Quantized:
    """Run the job. Events are those of `_job.run`.

    Raises the AppError that the child names. When this task is cancelled the child's whole process group is killed; the
    blocks that were done stay, and the same job goes on after them.
    """
    check_settings(job.settings)
    overlays = overlays or Overlays.find()
    overlay, probe, title = ENVIRONMENTS[job.settings.engine]
    missing = [name for name in probe if not overlays.has_module(overlay, name)]
    if missing == ["auto_gptq"] and overlays.complete(overlay):
        raise BackendUnavailable(
            "auto-gptq has no wheel for this Python or machine.", hint="Leave --engine out: our own quantiser runs here."
        )
    if missing or not overlays.complete(overlay):
        raise BackendUnavailable(
            f"Quantising needs the {title} environment, which is not installed.",
            hint=f"Install it with `{start_script()} install {overlay}` or from the Models tab.",
        )
    request = {
        "base": str(job.base),
        "out": str(job.out),
        "settings": job.settings.to_dict(),
        "device": job.device,
        "threads": job.threads,
        "resume": job.resume,
        "overwrite": job.overwrite,
    }
    command = [str(overlays.python(overlay)), "-m", "modules.quantize.child", json.dumps(request)]
    ended = await run_job(command, overlays.worker_env(overlay), overlays.root, on_event)
    done = ended.result
    if done is None:
        raise _failure(ended)
    return Quantized(Path(done["path"]), done["size_bytes"], done["seconds"], done["mean_loss"], done["layers"])


def _failure(ended: Ended) -> LoadError:
    again = "Run the same command again: it goes on from the last finished block."
    if sys.platform != "win32" and ended.exit_code == -signal.SIGKILL:
        return LoadOutOfMemory("The quantiser was killed, most likely for want of memory.", hint=again, detail=ended.detail)
    text = f"The quantiser's process ended (exit status {ended.exit_code}): {ended.last_words}"
    return LoadError(text, hint=again, detail=ended.detail)

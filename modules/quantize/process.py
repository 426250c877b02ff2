"""Quantise in a child process of the Transformers environment, and end it whatever happens. The server imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.child_process import end_group, keep_tail
from modules.errors import BackendUnavailable, LoadError, LoadOutOfMemory, error_from_wire
from modules.overlays import Overlays, start_script
from modules.quantize.settings import QuantizeSettings, check_settings

# Engine -> (environment, what must be in it, its title).
ENVIRONMENTS = {
    "switchyard": ("transformers", ("torch", "transformers", "accelerate", "safetensors"), "Transformers"),
    "auto-gptq": ("autogptq", ("torch", "transformers", "auto_gptq"), "AutoGPTQ"),
}
_LINE_LIMIT = 1 << 20
_TAIL_LINES = 40
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
    done = await _run(overlays, overlay, json.dumps(request), on_event)
    return Quantized(Path(done["path"]), done["size_bytes"], done["seconds"], done["mean_loss"], done["layers"])


async def _run(overlays: Overlays, overlay: str, request: str, on_event: OnEvent) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        str(overlays.python(overlay)),
        "-m",
        "modules.quantize.child",
        request,
        cwd=overlays.root,
        env=overlays.worker_env(overlay),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = asyncio.create_task(keep_tail(process, tail))
    try:
        result = await _read_events(process, on_event)
        await process.wait()
        await reader
    finally:
        await end_group(process)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
    if result is None:
        raise _ended(process.returncode, tail)
    return result


async def _read_events(process: asyncio.subprocess.Process, on_event: OnEvent) -> dict[str, Any] | None:
    assert process.stdout is not None
    result = None
    while line := await process.stdout.readline():
        try:
            event = json.loads(line)
        except ValueError as error:
            raise LoadError("The quantiser's process sent something that is no message.", hint="Try again.") from error
        if "error" in event:
            raise error_from_wire(event["error"])
        if "done" in event:
            result = dict(event["done"])
        else:
            on_event(event)
    return result


def _ended(code: int | None, tail: deque[str]) -> LoadError:
    text = "\n".join(tail)
    detail = {"exit_code": code, "stderr": text[-8192:]}
    again = "Run the same command again: it goes on from the last finished block."
    if code == -signal.SIGKILL if sys.platform != "win32" else False:
        return LoadOutOfMemory("The quantiser was killed, most likely for want of memory.", hint=again, detail=detail)
    last = tail[-1].strip() if tail else "it said nothing"
    return LoadError(f"The quantiser's process ended (exit status {code}): {last[:300]}", hint=again, detail=detail)

"""The process that quantises: `python -m modules.quantize.child REQUEST.json-text` in the Transformers environment.

Writes one JSON object per line to the descriptor that was its stdout: the events of `_job.run`, then {"done": {...}} or
{"error": AppError.to_wire()}. All else it or a library prints goes to stderr.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from modules.errors import AppError, LoadError, LoadOutOfMemory, StorageError, StorageFull


def main(request: str) -> int:
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def send(event: dict[str, Any]) -> None:
        sink.write(json.dumps(event) + "\n")
        sink.flush()

    try:
        send({"done": _run(json.loads(request), send)})
    except AppError as error:
        send({"error": error.to_wire()})
        return 1
    except Exception as error:
        traceback.print_exc()
        send({"error": _typed(error).to_wire()})
        return 1
    return 0


def _run(request: dict[str, Any], send: Any) -> dict[str, Any]:
    import torch

    from modules.quantize.settings import QuantizeSettings

    if request.get("threads"):
        torch.set_num_threads(int(request["threads"]))
    device = request.get("device") or "auto"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = QuantizeSettings(**request["settings"])
    if settings.engine == "auto-gptq":
        from loaders import _autogptq_quantize

        place = Path(request["base"]), Path(request["out"])
        return _autogptq_quantize.run(*place, settings, device, bool(request.get("overwrite", False)), send)
    from modules.quantize import _job

    job = _job.Job(
        base=Path(request["base"]),
        out=Path(request["out"]),
        settings=settings,
        device=device,
        resume=bool(request.get("resume", True)),
        overwrite=bool(request.get("overwrite", False)),
    )
    return _job.run(job, send)


def _typed(error: Exception) -> AppError:
    """The product's error for what Python and torch raise."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text or "can't allocate" in text:
        return LoadOutOfMemory(
            "The memory ran out.",
            hint="Run the same command again to go on from the last finished block, with less --nsamples or --seqlen.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            "The disk is full.", hint="Make room and run the same command again: it goes on from the last finished block."
        )
    if isinstance(error, OSError):
        return StorageError(
            f"A file could not be read or written: {error.strerror or error}.", hint="Check disk and permissions."
        )
    return LoadError(f"Quantising failed: {text[:400] or type(error).__name__}.", hint="Report it with the log if it stays.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

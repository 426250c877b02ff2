"""The process that quantises: `python -m modules.quantize.child REQUEST.json-text` in the Transformers environment.

Writes one JSON object per line to the descriptor that was its stdout: the events of `_job.run`, then {"done": {...}} or
{"error": AppError.to_wire()}. All else it or a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from modules.errors import AppError
from modules.quantize._failures import typed


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
        send({"error": typed(error).to_wire()})
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""What a lab does: run the experiments that stdin names, and print one line of JSON for each: {"result"} or {"error"}."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def serve(experiments: Mapping[str, Callable[[Path], Any]], place: str) -> None:
    """Each experiment gets a folder of its own below `place`, which goes with it. What it prints goes to stderr."""
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        name = line.strip()
        folder = Path(place) / name
        folder.mkdir(parents=True)
        try:
            answer: dict[str, Any] = {"result": experiments[name](folder)}
        except Exception:
            answer = {"error": traceback.format_exc()[-4000:]}
        shutil.rmtree(folder, ignore_errors=True)
        sink.write(json.dumps(answer) + "\n")

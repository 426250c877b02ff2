"""The child's side of modules.convert.process: messages on the descriptor that was stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.errors import AppError


class Report:
    """Takes fd 1 for messages BEFORE a library is imported, so that a C library's printf can't tear one."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._fd = os.dup(1)
        os.dup2(2, 1)
        self._last = 0.0

    def stage(self, stage: str, fraction: float | None = None) -> None:
        """Progress; at most ten a second but for the last."""
        now = time.monotonic()
        if fraction is None or fraction >= 1 or now - self._last >= 0.1:
            self._last = now
            self._send({"stage": stage, "fraction": fraction})

    def note(self, text: str) -> None:
        self._send({"note": text})

    def done(self, **result: Any) -> None:
        self._send({"done": result})

    def error(self, error: AppError) -> None:
        self._send({"error": error.to_wire()})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode("ascii") + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

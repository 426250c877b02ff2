"""One line of progress in a terminal, and plain lines where there is none (a log, a pipe)."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from modules.schema import LoadProgress

_BAR = 24


class ProgressLine:
    """`show` may be called often; a terminal is redrawn ten times a second, a log gets a line per stage."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._stage = ""
        self._drawn = 0.0
        self._width = 0

    def show(self, progress: LoadProgress, text: str = "") -> None:
        """Show a stage and its fraction; `text` follows them (a speed, a size)."""
        new_stage = progress.stage != self._stage
        self._stage = progress.stage
        if not self._terminal:
            if new_stage:
                print(progress.stage, file=self._stream, flush=True)
            return
        now = time.monotonic()
        if not new_stage and now - self._drawn < 0.1 and progress.fraction != 1.0:
            return
        self._drawn = now
        line = f"{progress.stage} {_bar(progress.fraction)} {text}".rstrip()
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def close(self) -> None:
        """End the line, so that the next output starts on its own."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def _bar(fraction: float | None) -> str:
    if fraction is None:
        return "…"
    full = round(_BAR * min(1.0, max(0.0, fraction)))
    return f"[{'#' * full}{'.' * (_BAR - full)}] {100 * fraction:3.0f} %"

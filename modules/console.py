"""What set-up shows in the terminal: phases n/N, what is being done, how far it is, how long it took.

On a terminal the running phase is one line that is rewritten; elsewhere (a log, CI) a line now and then. Everything goes to
stderr: stdout belongs to the command that runs (`doctor --json`). Standard library only.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TextIO

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 5.0


class Console:
    """Numbered phases with an elapsed time. `total` may grow when more turns out to be needed."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._number = 0
        self._title = ""
        self._detail = ""
        self._started = 0.0
        self._printed = 0.0
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None
        self._stop = threading.Event()

    def line(self, text: str) -> None:
        """A line of its own."""
        with self._lock:
            self._erase()
            self._write(text + "\n")

    def phase(self, title: str) -> None:
        """Begin the next phase; the running one is done."""
        self.finish()
        self._number += 1
        self._title, self._detail = title, ""
        self._started = self._printed = time.monotonic()
        if self._terminal:
            self._stop.clear()
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        else:
            self._write(f"{self._head()}\n")

    def progress(self, stage: str, fraction: float | None, line: str) -> None:
        """What the running phase is doing now: the `Progress` callback of the installer."""
        percent = "" if fraction is None else f"{fraction:4.0%} "
        other = "" if stage == self._title else f"{stage}: "
        self._detail = f"{percent}{other}{line}"
        now = time.monotonic()
        with self._lock:
            if now - self._printed < (TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S):
                return
            self._printed = now
            self._show()

    def finish(self, word: str = "done") -> None:
        """The running phase ended."""
        if not self._title:
            return
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        with self._lock:
            self._erase()
            self._write(f"{self._head()} {word} ({self._elapsed()})\n")
        self._title = ""

    def _tick(self) -> None:
        while not self._stop.wait(0.5):
            with self._lock:
                self._show()

    def _head(self) -> str:
        return f"[{self._number}/{self.total}] {self._title}"

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _show(self) -> None:
        if not self._title:
            return
        text = f"{self._head()} {self._elapsed()} {self._detail}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._erase()
            self._write(text[:width])
        else:
            self._write(f"  {self._elapsed()} {self._detail}\n")

    def _erase(self) -> None:
        if self._terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()

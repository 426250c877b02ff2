"""Stop sequences over streamed text, with hold-back: text that could be the start of a stop sequence waits.

A stop sequence never reaches the reader, whole or in part, however the tokens cut it.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed text, get what is safe to show. The earliest match wins; among equals the longest."""

    __slots__ = ("_held", "_longest", "_stops", "match")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.match: str | None = None

    def feed(self, text: str) -> str:
        """Text that can be shown now. After a match, `match` is set and everything from it on is dropped."""
        if not self._stops:
            return text
        if self.match is not None:
            return ""
        buffer = self._held + text
        found = min(
            ((at, -len(stop), stop) for stop in self._stops if (at := buffer.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            at, _, self.match = found
            self._held = ""
            return buffer[:at]
        keep = self._hold_back(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _hold_back(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop sequence."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

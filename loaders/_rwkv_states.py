"""The recurrent state as a prefix cache: states of texts that have been read, found again by the longest common beginning.

A state can't be cut back as a KV cache can, so states are kept at the places that requests come back to: where a prompt ended
(to regenerate), where an answer ended (the next turn), and every some hundred tokens (an edited message).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

State = list[Any]  # tensors, or None before the first token


@dataclass(slots=True)
class _Kept:
    state: list[tuple[Any, Any]]  # copies in main memory, each with the device it belongs on
    size: int
    place: bool  # inside a text, not where one ended: the first to go


class StateCache:
    """The live state with the ids it has read, and copies of earlier ones in at most `budget` bytes of main memory."""

    def __init__(self, budget: int, every: int) -> None:
        self._budget, self.every = budget, every
        self._kept: dict[bytes, _Kept] = {}  # by the ids read, 4 bytes each; the least recently used first
        self.bytes = 0
        self.ids: list[int] = []
        self.state: State | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Make the state live that has read the most of `prompt`; the number of its tokens.

        At least the last token is left over: its logits are needed.
        """
        if self.ids and self.state is not None:
            self.keep(place=False)
        whole = array("I", prompt[:-1]).tobytes()
        best = max((key for key in self._kept if whole.startswith(key)), key=len, default=b"")
        live = array("I", self.ids).tobytes()
        if self.state is not None and len(live) >= len(best) and whole.startswith(live):
            return len(self.ids)
        self.reset()
        if best:
            found = self._kept[best] = self._kept.pop(best)  # the most recently used now
            self.state = [_copy(tensor, device) for tensor, device in found.state]
            self.ids = array("I", best).tolist()
        return len(self.ids)

    def keep(self, *, place: bool) -> None:
        """Keep a copy of the live state. `place`: in the middle of a text."""
        assert self.state is not None
        key = array("I", self.ids).tobytes()
        known = self._kept.pop(key, None)
        if known is not None:
            self._kept[key] = known
            known.place = known.place and place
            return
        size = len(key) + sum(tensor.numel() * tensor.element_size() for tensor in self.state)
        if size > self._budget:
            return
        copies = [(_copy(tensor, "cpu"), tensor.device) for tensor in self.state]
        self._kept[key] = _Kept(copies, size, place)
        self.bytes += size
        while self.bytes > self._budget:
            oldest = next((k for k, kept in self._kept.items() if kept.place and k != key), None) or next(iter(self._kept))
            self.bytes -= self._kept.pop(oldest).size

    def due(self) -> bool:
        """Whether the live state stands where one is kept inside a text."""
        return len(self.ids) % self.every == 0

    def reset(self) -> None:
        """Forget the live state. The kept ones are whole and stay."""
        self.ids, self.state = [], None

    def forget(self) -> None:
        """Forget everything."""
        self.reset()
        self._kept.clear()
        self.bytes = 0


def _copy(tensor: Any, device: Any) -> Any:
    return tensor.to(device, copy=True)

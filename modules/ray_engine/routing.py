"""What a router remembers: who saw which beginning of a prompt, and who is busy with what."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

BLOCK_CHARACTERS = 256
MAX_BLOCKS = 256
REMEMBERED = 20_000


class Prefixes:
    """Which replica last saw a beginning: a hash of each whole block of it -> replica. Old ones are forgotten."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._seen: OrderedDict[int, Any] = OrderedDict()
        self._remembered = remembered

    @staticmethod
    def keys(request: dict[str, Any]) -> list[int]:
        """One hash for each whole block, of everything up to its end; shortest beginning first."""
        ids = request.get("token_ids")
        text = request.get("prompt") or ""
        size = BLOCK_CHARACTERS // 4 if ids else BLOCK_CHARACTERS
        whole: Any = tuple(ids) if ids else text
        keys, last = [], 0
        for end in range(size, min(len(whole), size * MAX_BLOCKS) + 1, size):
            last = hash((last, whole[end - size : end]))
            keys.append(last)
        return keys

    def best(self, keys: list[int], among: set[Any]) -> Any | None:
        """The one among these that has the longest beginning."""
        for key in reversed(keys):
            replica = self._seen.get(key)
            if replica in among:
                return replica
        return None

    def remember(self, keys: list[int], replica: Any) -> None:
        for key in keys:
            self._seen[key] = replica
            self._seen.move_to_end(key)
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)


class Loads:
    """The generations on each replica, by request."""

    def __init__(self) -> None:
        self._by_request: dict[str, Any] = {}
        self._by_replica: dict[Any, set[str]] = {}

    def add(self, request: str, replica: Any) -> None:
        self.remove(request)
        self._by_request[request] = replica
        self._by_replica.setdefault(replica, set()).add(request)

    def remove(self, request: str) -> None:
        replica = self._by_request.pop(request, None)
        if replica is not None:
            self._by_replica[replica].discard(request)

    def on(self, replica: Any) -> int:
        return len(self._by_replica.get(replica, ()))

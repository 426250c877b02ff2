"""Models that nobody uses are unloaded after a while; the next request for one loads it again."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from modules.residents import Place
    from modules.roster import Roster


class IdleUnload:
    """`unload` begins to unload one. `timeout_s` is for all models, 0: never; `keep_alive` says otherwise for one."""

    def __init__(self, roster: Roster, unload: Callable[[Place], object], timeout_s: float) -> None:
        self._roster = roster
        self._unload = unload
        self.timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        if self.timeout_s > 0:
            self._start()

    def keep_alive(self, resident_id: str, seconds: float) -> None:
        """Unload this model after so many idle seconds, whatever --idle-timeout says: 0 once it is idle, infinity never."""
        self._roster.get(resident_id).keep_s = seconds
        if seconds < 86400:
            asyncio.get_running_loop().call_later(seconds + 0.1, self.sweep)
        self._start()

    def due(self, resident_id: str) -> float:
        """When this model goes if nobody uses it: seconds since the epoch, or infinity."""
        place = self._roster.get(resident_id)
        keep = place.keep_s if place.keep_s is not None else self.timeout_s or math.inf
        return (place.last_used or time.time()) + keep

    def sweep(self, now: float | None = None) -> None:
        """Unload what has been idle for its time."""
        now = time.time() if now is None else now
        for place in self._roster:
            if place.state == "ready" and not place.busy and now >= self.due(place.id):
                self._roster.put_away(place)
                self._unload(place)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._loop())

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(min(15.0, max(0.05, self.timeout_s / 4)) if self.timeout_s else 5.0)
            self.sweep()

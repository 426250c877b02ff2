"""The memory for models: what they use, whether one more fits, and which of them go for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from modules.memory import process_bytes
from modules.plan.admission import Need, need_of, refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from modules.plan.types import Machine
    from modules.registry import Environment
    from modules.residents import Place, WhenBusy
    from modules.roster import Roster
    from modules.schema import LoaderSpec

    Remove = Callable[[list[Place], WhenBusy], Awaitable[None]]

log = logging.getLogger(__name__)


class Room:
    """`available()` is the memory that is free, in bytes; `remove` unloads models and waits until they are gone."""

    def __init__(
        self,
        roster: Roster,
        specs: Mapping[str, LoaderSpec],
        environment: Environment,
        remove: Remove,
        *,
        available: Callable[[], int],
        machine: Callable[[], Machine],
        max_models: int,
    ) -> None:
        self._roster = roster
        self._specs = specs
        self._environment = environment
        self._remove = remove
        self.available = available
        self._machine = machine
        self._max_models = max_models
        self._used_cache = (0.0, 0)

    def used(self, max_age_s: float = 0.0) -> int:
        """Bytes of the server and all its workers. Walking the process tree takes milliseconds, hence the age."""
        now = time.monotonic()
        if max_age_s and now - self._used_cache[0] < max_age_s:
            return self._used_cache[1]
        total = process_bytes()
        for place in self._roster:
            if place.client is not None:
                place.memory_bytes = place.client.memory_bytes()
                total += place.memory_bytes or 0
        self._used_cache = (now, total)
        return total

    async def admit(self, place: Place, replaced: list[Place], when_busy: WhenBusy) -> None:
        """Refuse what this machine can't hold before anything is unloaded for it, then make room. Raises CannotFit."""
        machine = dataclasses.replace(await asyncio.to_thread(self._machine), ram_available_bytes=self.available())
        need = await asyncio.to_thread(need_of, place.model, place.spec, place.options, machine)
        freed = self._roster.held_bytes(place)
        await self._refuse_hopeless(place, need, machine, freed)
        await self._make_room(place, need, replaced, when_busy)
        if freed and not self._roster.ready(place):  # what they gave back was a guess
            machine = dataclasses.replace(machine, ram_available_bytes=self.available())
            await self._refuse_hopeless(place, need, machine, 0)

    async def _refuse_hopeless(self, place: Place, need: Need, machine: Machine, freed: int) -> None:
        whole = dataclasses.replace(machine, ram_available_bytes=min(machine.ram_available_bytes + freed, machine.ram_bytes))
        if not place.anyway and need.hopeless(whole):
            raise await asyncio.to_thread(refusal, need, whole, self._specs.values(), self._environment)

    def _fits(self, place: Place, need: Need) -> bool:
        return need.fits(self.available()) and not 0 < self._max_models <= len(self._roster.ready(place))

    async def _make_room(self, place: Place, need: Need, replaced: list[Place], when_busy: WhenBusy) -> None:
        """Unload before loading only where memory is short: first what is to be replaced, then the least recently used."""
        if replaced and not self._fits(place, need):
            await self._remove(replaced, when_busy)
        while not self._fits(place, need):
            ready = self._roster.ready(place)
            if not ready:
                return  # the loader has the last word on whether it fits
            victim = min(ready, key=lambda p: (p.busy, p.last_used or 0.0))
            log.info("unloading %s to make room for %s", victim.model.id, place.model.id)
            self._roster.put_away(victim)
            await self._remove([victim], when_busy)

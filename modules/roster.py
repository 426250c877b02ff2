"""Which models are in memory and which one the chats use. Bookkeeping only: nothing here waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from modules.errors import NoModelLoaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modules.residents import Place

FAILED_CARDS = 4

State = Literal["empty", "loading", "ready", "failed"]


class Roster:
    """`active` is what the chats use; `incoming` is loading to become it; `recall` was put away and comes back when asked for."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self.active: Place | None = None
        self.incoming: Place | None = None
        self.recall: Place | None = None

    def __iter__(self) -> Iterator[Place]:
        return iter(list(self._places.values()))

    def __contains__(self, place: Place) -> bool:
        return place.id in self._places

    def add(self, place: Place) -> None:
        self._places[place.id] = place

    def get(self, resident_id: str) -> Place:
        """By its own id or its model's. Raises NoModelLoaded."""
        place = self._places.get(resident_id) or self.find(resident_id)
        if place is None:
            raise NoModelLoaded("No model is loaded." if not resident_id else "That model is not loaded.", hint="Load one first.")
        return place

    def find(self, model_id: str | None) -> Place | None:
        """What a request for this model would run on: ready, else loading, else crashed. None is what the chats use."""
        if model_id is None:
            if self.incoming is not None:
                return self.incoming
            return self.active if self.active is not None and self.active.state != "unloading" else None
        order = {"ready": 0, "loading": 1, "failed": 2}
        named = [p for p in self if model_id in (p.model.id, p.id) and p.state in order]
        return min(reversed(named), key=lambda p: order[p.state], default=None)

    def same(self, model_id: str, loader: str, options: dict[str, Any] | None) -> Place | None:
        """The newest load of this model, there or on its way, with this loader and options; with any where they are None."""
        for place in reversed(self._places.values()):
            same_options = options is None or (place.spec.name == loader and place.options == options)
            if place.model.id == model_id and place.state in ("loading", "ready") and same_options:
                return place
        return None

    def ready(self, besides: Place) -> list[Place]:
        return [p for p in self if p is not besides and p.state == "ready"]

    def held_bytes(self, besides: Place) -> int:
        """The memory of the other models."""
        others = (p for p in self if p is not besides and p.state in ("ready", "loading", "unloading"))
        return sum(p.memory_bytes or 0 for p in others)

    def put_away(self, place: Place) -> None:
        """The chats' model goes for now; their next request brings it back, rather than another model answering."""
        if place is self.active:
            self.recall, self.active = place, None

    def drop(self, place: Place) -> None:
        """It is gone; the chats go on with the newest that is ready."""
        self._places.pop(place.id, None)
        if self.active is place:
            ready = self.ready(place)
            self.active = ready[-1] if ready else None

    def forget_failed(self, model_id: str) -> None:
        """A new attempt replaces the card of the failed one."""
        for place in self:
            if place.state == "failed" and place.model.id == model_id:
                self.drop(place)

    def trim_failed(self) -> None:
        for place in [p for p in self if p.state == "failed" and p is not self.active][:-FAILED_CARDS]:
            self.drop(place)

    def clear(self) -> None:
        self._places.clear()
        self.active = None

    def last_failure(self) -> dict[str, Any] | None:
        """The wire form of the newest failed load's error."""
        return next((p.error for p in reversed(list(self)) if p.state == "failed" and p.error), None)

    def state(self, expecting: bool) -> State:
        """What /health and the page's header say. `expecting`: a first load is about to begin."""
        states = {place.state for place in self}
        if "ready" in states:
            return "ready"
        if "loading" in states or expecting:
            return "loading"
        return "failed" if "failed" in states else "empty"

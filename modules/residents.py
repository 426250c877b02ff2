"""One model in memory: its state, its worker, and the fair queue in front of it.

`Resident` is the frozen view that others see; `Place` is the manager's own mutable record. Single-threaded by design: all of
it runs in the event loop, so a state change needs no lock between two awaits.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.schema import LoaderSpec, LoadProgress, ModelFiles, ModelInfo

State = Literal["loading", "ready", "unloading", "failed"]
WhenBusy = Literal["finish", "cancel", "beside"]
OnPosition = Callable[[int, "float | None"], None]


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded, loading, leaving or failed model. Times are seconds since the epoch, memory is bytes.

    `memory_before`/`memory_after` is what the server and its workers used before and after the load. `error` is an AppError's
    wire form: code, message, hint and, after a crash, detail with exit_code, signal and the end of stderr.
    """

    id: str
    model: ModelFiles
    loader: str
    options: dict[str, Any]
    state: State
    progress: LoadProgress | None = None
    info: ModelInfo | None = None
    error: dict[str, Any] | None = None
    memory_bytes: int | None = None
    memory_before: int | None = None
    memory_after: int | None = None
    loaded_at: float | None = None
    last_used: float | None = None
    active_requests: int = 0
    queued: int = 0


def shown(resident: Resident) -> dict[str, Any]:
    """A resident for the page: JSON-safe, with the model's id where its path on this machine would stand."""
    made: dict[str, Any] = to_wire(resident)
    made["model"]["path"] = resident.model.id
    if made["info"] is not None:
        made["info"]["path"] = resident.model.id
    return made


class Lease:
    """The right to run one generation on one worker. `on_cancel` is called when the operator cancels it (a switch)."""

    __slots__ = ("client", "on_cancel", "place", "started")

    def __init__(self, place: Place, client: EngineClient) -> None:
        self.place = place
        self.client = client
        self.on_cancel: Callable[[], None] | None = None
        self.started = time.monotonic()

    @property
    def resident(self) -> Resident:
        return self.place.view()


class Ticket:
    """A place in the queue. Its future ends with a Lease, with None (the model went away: look again) or with an error."""

    __slots__ = ("background", "future", "named", "on_position", "sequence")

    def __init__(self, sequence: int, named: bool, on_position: OnPosition | None, background: bool = False) -> None:
        self.sequence = sequence
        self.background = background
        self.named = named
        self.on_position = on_position
        self.future: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class Place:
    id: str
    model: ModelFiles
    spec: LoaderSpec
    options: dict[str, Any]
    changed: Callable[[], None]
    state: State = "loading"
    progress: LoadProgress | None = None
    client: EngineClient | None = None
    info: ModelInfo | None = None
    error: dict[str, Any] | None = None
    memory_bytes: int | None = None
    memory_before: int | None = None
    memory_after: int | None = None
    loaded_at: float | None = None
    last_used: float | None = None
    was_ready: bool = False
    restarts: list[float] = field(default_factory=list)
    load_task: asyncio.Task[None] | None = None
    close_task: asyncio.Task[None] | None = None
    leases: set[Lease] = field(default_factory=set)
    queue: list[Ticket] = field(default_factory=list)
    average_s: float | None = None
    keep_s: float | None = None  # how long it stays unused, where a client said so
    anyway: bool = False  # load it even if the planner says it can't fit
    _drained: asyncio.Event = field(default_factory=asyncio.Event)
    _telling: bool = False

    def view(self) -> Resident:
        return Resident(
            id=self.id, model=self.model, loader=self.spec.name, options=self.options, state=self.state,
            progress=self.progress, info=self.info, error=self.error, memory_bytes=self.memory_bytes,
            memory_before=self.memory_before, memory_after=self.memory_after, loaded_at=self.loaded_at,
            last_used=self.last_used, active_requests=len(self.leases), queued=len(self.queue),
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """How many generations its worker runs at once."""
        return (self.info.slots if self.info is not None else 0) or self.spec.slots

    @property
    def busy(self) -> bool:
        return bool(self.leases or self.queue)

    # --- the queue ------------------------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """By arrival, also when the ticket waited elsewhere before; background work after all others."""
        bisect.insort(self.queue, ticket, key=lambda t: (t.background, t.sequence))
        self.grant()
        self._tell_positions()

    def withdraw(self, ticket: Ticket) -> None:
        if ticket in self.queue:
            self.queue.remove(ticket)
            self._tell_positions()

    def grant(self) -> None:
        """Give free slots to the head of the queue."""
        moved = False
        while self.queue and self.state == "ready" and self.client is not None and len(self.leases) < self.slots:
            ticket = self.queue.pop(0)
            if ticket.future.done():
                continue
            lease = Lease(self, self.client)
            self.leases.add(lease)
            ticket.future.set_result(lease)
            moved = True
        if moved:
            self._tell_positions()

    def release(self, lease: Lease) -> None:
        if lease not in self.leases:
            return
        self.leases.remove(lease)
        self.last_used = time.time()
        took = time.monotonic() - lease.started
        self.average_s = took if self.average_s is None else 0.7 * self.average_s + 0.3 * took
        if not self.leases:
            self._drained.set()
        self.grant()
        self.changed()

    def estimate(self, position: int) -> float | None:
        """Seconds until the ticket at `position` (1 is the next) starts."""
        return None if self.average_s is None else self.average_s * position / self.slots

    def dismiss(self, error: Exception | None = None) -> None:
        """Send everyone in the queue away: with an error, or to look for the model again."""
        queue, self.queue = self.queue, []
        for ticket in queue:
            if ticket.future.done():
                continue
            if error is None:
                ticket.future.set_result(None)
            else:
                ticket.future.set_exception(error)

    async def drain(self) -> None:
        """Wait until nothing generates."""
        while self.leases:
            self._drained.clear()
            await self._drained.wait()

    def abandon(self) -> None:
        """Wait for no lease any more: their worker is about to be ended."""
        self.leases.clear()
        self._drained.set()

    def cancel_all(self) -> None:
        for lease in list(self.leases):
            if lease.on_cancel is not None:
                lease.on_cancel()

    def _tell_positions(self) -> None:
        """Positions are told once per turn of the event loop, however often the queue moved."""
        if not self._telling and any(t.on_position for t in self.queue):
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell_now)

    def _tell_now(self) -> None:
        self._telling = False
        for index, ticket in enumerate(self.queue):
            if ticket.on_position is not None:
                ticket.on_position(index + 1, self.estimate(index + 1))

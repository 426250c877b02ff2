"""Which models are in memory, which one the chats use, and who may run on them now.

Loads run one at a time. A switch loads the new model beside the old one when memory allows and removes the old one afterwards,
so a refused or failed load leaves the old one serving; when memory is short the old one goes first (`modules.room`). Requests
wait in one fair queue per worker (`modules.residents`); a request that named a model is answered by that model or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from modules import caller
from modules.approvals import Approvals
from modules.errors import (
    AppError,
    Conflict,
    EngineDead,
    LoadError,
    LoadOutOfMemory,
    ModelNotFound,
    NoModelLoaded,
    error_from_wire,
)
from modules.events import EventBus, revision
from modules.idle_unload import IdleUnload
from modules.load_options import complete_options
from modules.memory import available_bytes, total_bytes
from modules.plan.machine import this_machine
from modules.registry import select
from modules.residents import Lease, OnPosition, Place, Resident, Ticket, WhenBusy, shown
from modules.room import Room
from modules.roster import Roster, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from modules.engine_client import EngineClient
    from modules.library import Library
    from modules.plan.types import Machine
    from modules.registry import Environment
    from modules.schema import LoaderSpec, LoadProgress, ModelFiles

log = logging.getLogger(__name__)

RESTARTS = 3
RESTART_WINDOW_S = 60.0
RESTART_DELAY_S = 1.0  # times the number of recent crashes; a request that comes earlier does not wait for it
CANCEL_GRACE_S = 20.0  # longer than the client's own abort enforcement, which kills the worker
PROGRESS_EVERY_S = 0.1

SwitchPolicy = Literal["off", "ask", "on"]


class StartWorker(Protocol):
    """Spawn a worker for a loader: `WorkerClient.start` bound to its environments."""

    def __call__(self, spec: LoaderSpec, on_log: Callable[[str], None]) -> Awaitable[EngineClient]: ...


class ModelManager:
    """All methods belong to the event loop's thread."""

    def __init__(
        self,
        library: Library,
        specs: Mapping[str, LoaderSpec],
        environment: Environment,
        events: EventBus,
        start_worker: StartWorker,
        *,
        model_options: Callable[[str, str], Mapping[str, Any]] | None = None,
        model_loader: Callable[[str], str | None] | None = None,
        switch_policy: SwitchPolicy = "on",
        idle_timeout_s: float = 0.0,
        max_models: int = 0,
        available: Callable[[], int] = available_bytes,
        machine: Callable[[], Machine] | None = None,
        load_anyway: bool = False,
    ) -> None:
        self._library = library
        self._specs = dict(specs)
        self._environment = environment
        self._events = events
        self._start_worker = start_worker
        self._model_options = model_options or (lambda model, loader: {})
        self._model_loader = model_loader or (lambda model: None)
        self.switch_policy: SwitchPolicy = switch_policy
        self.load_anyway = load_anyway
        self._roster = Roster()
        self.room = Room(
            self._roster, self._specs, environment, self._remove,
            available=available, machine=machine or (lambda: this_machine(Path(), bandwidth=False)), max_models=max_models,
        )  # fmt: skip
        self.idle = IdleUnload(self._roster, lambda place: self._begin_close(place, "finish"), idle_timeout_s)
        self._ids = itertools.count(1)
        self._arrivals = itertools.count()
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._expecting: asyncio.Event | None = None
        self._publish_at = 0.0
        self._publish_timer: asyncio.TimerHandle | None = None
        self.approvals = Approvals(self._changed)
        self.on_active: Callable[[Resident], None] | None = None

    # --- what is there ----------------------------------------------------------------------------------------

    def residents(self) -> list[Resident]:
        return [place.view() for place in self._roster]

    def active(self) -> Resident | None:
        """What the chats use."""
        return self._roster.active.view() if self._roster.active is not None else None

    def resident(self, resident_id: str) -> Resident:
        return self._roster.get(resident_id).view()

    def client(self, resident_id: str) -> EngineClient:
        """The worker behind a ready model, for what needs no place in the queue (encode, decode)."""
        place = self._roster.get(resident_id)
        if place.client is None or place.state not in ("ready", "unloading"):
            raise NoModelLoaded(f"{place.model.id} is not ready.")
        return place.client

    def state(self) -> State:
        """empty, loading, ready or failed: what /health and the page's header say."""
        return self._roster.state(expecting=self._expecting is not None)

    def snapshot(self) -> dict[str, Any]:
        """Residents, the active one, memory and state: JSON-safe, for the page."""
        return {
            "residents": [shown(r) for r in self.residents()],
            "active": self._roster.active.id if self._roster.active is not None else None,
            "asked": self.approvals.pending(),
            "memory": {"total": total_bytes(), "available": self.room.available(), "process": self.room.used(max_age_s=2.0)},
            "state": self.state(),
            "revision": revision(),
        }

    def expect_first(self) -> Callable[[], None]:
        """The server is about to load a model: until the returned function is called, requests wait instead of failing."""
        settled = self._expecting = asyncio.Event()

        def settle() -> None:
            self._expecting = None
            settled.set()

        return settle

    # --- load -------------------------------------------------------------------------------------------------

    async def load(
        self,
        model_id: str,
        loader: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        keep_others: bool | None = False,
        when_busy: WhenBusy = "finish",
        activate: bool = True,
        anyway: bool = False,
    ) -> Resident:
        """Load and wait until ready. Raises what `begin_load` and the load itself raise. See `begin_load`."""
        resident = await self.begin_load(
            model_id, loader, options, keep_others=keep_others, when_busy=when_busy, activate=activate, anyway=anyway
        )
        return await self.wait(resident.id)

    async def begin_load(
        self,
        model_id: str,
        loader: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        keep_others: bool | None = False,
        when_busy: WhenBusy = "finish",
        activate: bool = True,
        keep_cards: bool = False,
        anyway: bool = False,
    ) -> Resident:
        """Start loading and return at once; `wait` waits. A second load of the same joins the first.

        `keep_others`: False replaces the other models, True keeps them, None keeps them while memory allows (the least
        recently used go first). `when_busy` says what becomes of answers still running on a replaced model: they finish,
        are cancelled, or ("beside") the old model stays. `keep_cards` leaves the cards of this model's failed loads.
        `anyway` tries a load that the planner says can't fit; else it fails with CannotFit, and names the nearest that does.
        Raises ModelNotFound, IncompatibleModel, InvalidParameter.
        """
        model = await asyncio.to_thread(self._library.find, model_id)
        spec = self._choose(model, loader)
        saved = self._model_options(model.id, spec.name)
        complete = complete_options(spec, saved, options)
        self._check_open()
        explicit = loader is not None or options is not None
        place = self._roster.same(model.id, spec.name, complete if explicit else None)
        keep = True if when_busy == "beside" else keep_others
        if activate and keep is False:
            self._supersede(place)
        if place is None:
            place = Place(f"r{next(self._ids)}", model, spec, complete, self._changed)
            place.anyway = anyway or self.load_anyway
            self._roster.add(place)
            if not keep_cards:
                self._roster.forget_failed(model.id)
            place.load_task = self._spawn(self._run_load(place, keep, when_busy, activate))
            if activate:
                self._roster.incoming = place
        elif activate:
            if place.state == "ready":
                self._make_active(place)
                if keep is False:
                    self._remove_later(self._roster.ready(place), when_busy)
            else:
                self._roster.incoming = place
        self._changed()
        return place.view()

    async def wait(self, resident_id: str) -> Resident:
        """Until this model is ready. Raises why it is not."""
        place = self._roster.get(resident_id)
        if place.load_task is not None:
            await self._loaded(place)
        return place.view()

    async def _loaded(self, place: Place) -> None:
        """Until its load is over. A cancelled load is its own error, not the cancellation of whoever waits."""
        assert place.load_task is not None
        try:
            await asyncio.shield(place.load_task)
        except asyncio.CancelledError:
            if not place.load_task.cancelled():
                raise
            raise error_from_wire(place.error or {}) from None

    def _supersede(self, place: Place | None) -> None:
        """The user chose another model while one was still loading to become the active one: that one is not wanted."""
        old = self._roster.incoming
        if old is not None and old is not place and not old.was_ready and old.load_task is not None:
            old.load_task.cancel()
            self._roster.incoming = None

    async def activate(self, resident_id: str) -> Resident:
        """Let the chats use this one."""
        place = self._roster.get(resident_id)
        if place.state == "loading":
            self._roster.incoming = place
        elif place.state != "ready":
            raise Conflict(f"{place.model.id} is not ready.", hint="Load it first.")
        else:
            self._make_active(place)
        self._changed()
        return place.view()

    def _choose(self, model: ModelFiles, loader: str | None) -> LoaderSpec:
        """The loader asked for; else the one this model was last used with, while that can take it; else the best."""
        usual = None if loader is not None else self._model_loader(model.id)
        if usual in self._specs:
            try:
                return select(model, self._specs.values(), self._environment, usual)
            except LoadError as error:
                log.info("%s: not with its usual backend: %s", model.id, error)
        return select(model, self._specs.values(), self._environment, loader)

    async def _run_load(self, place: Place, keep: bool | None, when_busy: WhenBusy, activate: bool) -> None:
        try:
            async with self._loading:
                await asyncio.to_thread(self._library.check, place.model)
                replaced = self._replaced(place, keep)
                place.memory_before = self.room.used()
                await self.room.admit(place, replaced, when_busy)
                try:
                    await self._start(place)
                except LoadOutOfMemory:
                    victims = replaced or self._roster.ready(place)
                    if not victims:
                        raise
                    log.info("memory ran out loading %s: unloading the others and trying again", place.model.id)
                    for victim in victims:
                        self._roster.put_away(victim)
                    await self._remove(victims, when_busy)
                    await self._start(place)
        except BaseException as error:
            self._load_failed(place, error)
            raise
        roster = self._roster
        if activate or roster.incoming is place or (roster.active is None and roster.recall is None):
            self._make_active(place)
        if roster.incoming is place:
            roster.incoming = None
        self._remove_later([p for p in replaced if p in roster], when_busy)
        place.grant()
        self._changed()

    def _replaced(self, place: Place, keep: bool | None) -> list[Place]:
        if keep is True:
            return []
        ready = self._roster.ready(place)
        return ready if keep is False else [p for p in ready if p.model.id == place.model.id]

    async def _start(self, place: Place) -> None:
        """Spawn, load, ready. Leaves no worker behind when it fails."""
        place.state, place.error = "loading", None
        place.client = None
        client = await self._start_worker(place.spec, lambda line: log.debug("worker %s: %s", place.id, line))
        try:
            if self._closed:
                raise Conflict("The server is shutting down.")
            place.client = client
            client.on_death = lambda error: self._died(place, client, error)

            def on_progress(progress: LoadProgress) -> None:
                place.progress = progress
                self._changed(soon=True)

            place.info = await client.load(place.model.path, place.options, on_progress)
        except BaseException:
            client.on_death = None
            place.client = None
            await asyncio.shield(client.close())
            raise
        place.state, place.progress, place.was_ready = "ready", None, True
        place.loaded_at = place.last_used = time.time()
        place.memory_bytes = client.memory_bytes()
        place.memory_after = self.room.used()

    def _load_failed(self, place: Place, error: BaseException) -> None:
        roster = self._roster
        if roster.incoming is place:
            roster.incoming = None
        failure = error if isinstance(error, AppError) else None
        if isinstance(error, asyncio.CancelledError):
            failure = Conflict(f"Loading {place.model.id} was cancelled.", hint="Load it again when you need it.")
            roster.drop(place)
        elif failure is None:
            log.error("loading %s failed", place.model.id, exc_info=error)
            failure = LoadError(f"Loading {place.model.id} failed: {type(error).__name__}.", hint="The log says more.")
        place.state, place.progress, place.error = "failed", None, failure.to_wire()
        place.dismiss(failure)
        if place in roster:
            roster.trim_failed()
        if roster.recall is not None and roster.active is None and not self._closed:
            self._spawn(self._recall_active())  # it had made room for this one
        self._changed()

    # --- unload -----------------------------------------------------------------------------------------------

    async def unload(self, resident_id: str | None = None, when_busy: WhenBusy = "finish") -> dict[str, int]:
        """Unload one model (None: the active one) and wait until its process is gone. A load in progress is cancelled.

        Returns memory_before and memory_after: what the server and all its workers used, in bytes.
        """
        chosen = self._roster.active or self._roster.incoming
        place = self._roster.get(resident_id or (chosen.id if chosen is not None else ""))
        before = self.room.used()
        if place.state == "loading" and place.load_task is not None:
            place.load_task.cancel()
            await asyncio.wait([place.load_task])
        elif place.state == "failed":
            self._roster.drop(place)
        else:
            gone = NoModelLoaded(f"{place.model.id} was unloaded while this request waited.", hint="Load it and send it again.")
            place.dismiss(gone)
            await asyncio.shield(self._begin_close(place, when_busy))
        self._roster.recall = None
        self._changed()
        return {"memory_before": before, "memory_after": self.room.used()}

    def _remove_later(self, places: list[Place], when_busy: WhenBusy) -> None:
        for place in places:
            self._begin_close(place, when_busy)

    async def _remove(self, places: list[Place], when_busy: WhenBusy) -> None:
        await asyncio.gather(*(asyncio.shield(self._begin_close(place, when_busy)) for place in places))

    def _begin_close(self, place: Place, when_busy: WhenBusy) -> asyncio.Task[None]:
        """Start to close, once; a later "cancel" hurries a close that waits for answers to finish."""
        if place.close_task is None:
            place.state = "unloading"
            place.dismiss()
            place.close_task = self._spawn(self._close_place(place))
            self._changed()
        if when_busy == "cancel":
            place.cancel_all()
            asyncio.get_running_loop().call_later(CANCEL_GRACE_S, place.abandon)
        return place.close_task

    async def _close_place(self, place: Place) -> None:
        await place.drain()
        if place.client is not None:
            place.client.on_death = None
            await place.client.close()
            place.client = None
        self._roster.drop(place)
        self._changed()

    # --- a worker died ----------------------------------------------------------------------------------------

    def _died(self, place: Place, client: EngineClient, error: EngineDead) -> None:
        if place.client is not client or place.state == "loading":
            return  # `_start` sees it itself
        log.error("the worker of %s died: %s", place.model.id, error)
        place.client = None
        place.error = error.to_wire()
        place.memory_bytes = None
        self._spawn(client.close())
        if place.state == "ready":
            place.state = "failed"
            place.dismiss()
            asyncio.get_running_loop().call_later(RESTART_DELAY_S * (len(place.restarts) + 1), self._restart_unasked, place)
        self._changed()

    def _restart_unasked(self, place: Place) -> None:
        """A supervisor that asks /health sends no requests to a server it finds unwell."""
        if place.state == "failed" and place in self._roster and not self._closed:
            with contextlib.suppress(AppError):  # crashed too often: the card says so
                self._restart(place)

    def _restart(self, place: Place) -> None:
        """Load a crashed model again, at most RESTARTS times in RESTART_WINDOW_S. Raises its error after that."""
        now = time.monotonic()
        place.restarts = [t for t in place.restarts if now - t < RESTART_WINDOW_S]
        if not place.was_ready or len(place.restarts) >= RESTARTS:
            error = error_from_wire(place.error or {})
            if place.was_ready:
                error.hint = f"It crashed {len(place.restarts) + 1} times in a minute. Load it again, or choose another backend."
            raise error
        place.restarts.append(now)
        place.state = "loading"
        place.load_task = self._spawn(self._run_load(place, True, "finish", place is self._roster.active))
        self._changed()

    # --- leases -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lease(self, model_id: str | None = None, on_position: OnPosition | None = None) -> AsyncIterator[Lease]:
        """Wait for the model (loading it where the policy allows) and for a slot on its worker, in order of arrival; a caller in
        the background waits for all others.

        None is the active model. `on_position(position, estimate_s)` tells where in the queue. Raises NoModelLoaded,
        ModelNotFound or the model's load error.
        """
        sequence = next(self._arrivals)
        lease: Lease | None = None
        while lease is None:
            place = await self._resolve(model_id)
            ticket = Ticket(sequence, model_id is not None, on_position, caller.current().background)
            place.enqueue(ticket)
            try:
                lease = await ticket.future
            except BaseException:
                place.withdraw(ticket)
                if ticket.future.done() and not ticket.future.cancelled() and not ticket.future.exception():
                    granted = ticket.future.result()
                    if granted is not None:  # granted and cancelled in the same turn
                        place.release(granted)
                raise
        try:
            self._changed()
            yield lease
        finally:
            lease.place.release(lease)

    async def resolve(self, model_id: str | None = None) -> Resident:
        """The ready model a request for `model_id` would run on now, loaded first where the policy allows; takes no slot."""
        return (await self._resolve(model_id)).view()

    async def _resolve(self, model_id: str | None) -> Place:
        while True:
            self._check_open()
            place = self._roster.find(model_id)
            if place is None and model_id is not None:
                place = await self._load_for_request(model_id)
            elif place is None:
                place = await self._recall_active()
            if place.state == "ready":
                return place
            if place.state == "failed":
                self._restart(place)
            try:
                await self._loaded(place)
            except AppError:
                # A failed switch leaves the old model serving those who named none.
                if model_id is not None or self._roster.find(None) in (None, place):
                    raise

    async def _load_for_request(self, model_id: str) -> Place:
        if caller.current().background:  # two users of one machine would fight over its memory
            raise NoModelLoaded(f"{model_id} was unloaded.", hint="Load it again, then go on with the batch.")
        model = await asyncio.to_thread(self._library.find, model_id)
        resident = self._roster.find(model.id)  # a client may write the name another way
        if resident is not None:
            return resident
        if model.problem:
            raise ModelNotFound(f"{model.id} can't be loaded: {model.problem}")
        if self.switch_policy == "off":
            raise ModelNotFound(f"The model {model.id} is not loaded.", hint="Load it in the page, or use --model-switch on.")
        if self.switch_policy == "ask":
            await self.approvals.ask(model.id)
            resident = self._roster.find(model.id)  # the first of those who waited for the answer has begun to load it
            if resident is not None:
                return resident
        loading = await self.begin_load(model.id, keep_others=None, activate=False)
        return self._roster.get(loading.id)

    async def _recall_active(self) -> Place:
        if self._roster.recall is None and self._expecting is not None:
            await self._expecting.wait()
            place = self._roster.find(None)
            if place is not None:
                return place
        if self._roster.recall is None:
            failure = self._roster.last_failure()
            why = f" The last load failed: {failure['message']}" if failure else ""
            raise NoModelLoaded(f"No model is loaded.{why}", hint="Load one in the web page's model menu.")
        old = self._roster.recall
        resident = await self.begin_load(
            old.model.id, old.spec.name, old.options, keep_others=None, keep_cards=True, anyway=old.anyway
        )
        return self._roster.get(resident.id)

    # --- shutdown ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End every load and worker; waits until the processes are gone."""
        self._closed = True
        self._roster.incoming = None
        places = list(self._roster)
        for place in places:
            place.dismiss(NoModelLoaded("The server is shutting down."))
            place.cancel_all()
        self.idle.close()
        loads = [p.load_task for p in places if p.load_task is not None]
        for task in loads:
            task.cancel()
        closing = [self._begin_close(p, "finish") for p in places if p.client is not None and p.state != "loading"]
        for place in places:
            place.abandon()
        if pending := {*loads, *closing}:
            await asyncio.wait(pending)
        self._roster.clear()
        if self._publish_timer is not None:
            self._publish_timer.cancel()

    # --- small things -----------------------------------------------------------------------------------------

    def _make_active(self, place: Place) -> None:
        self._roster.active, self._roster.recall = place, None
        if self.on_active is not None:
            self.on_active(place.view())

    def _check_open(self) -> None:
        if self._closed:
            raise NoModelLoaded("The server is shutting down.")

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, AppError):
            log.error("a model task failed", exc_info=error)

    def _changed(self, *, soon: bool = False) -> None:
        """Tell the pages, at most every PROGRESS_EVERY_S."""
        if self._publish_timer is not None or self._closed:
            return
        loop = asyncio.get_running_loop()
        wait = self._publish_at - loop.time()
        self._publish_timer = loop.call_later(max(wait, 0.01 if soon else 0.0), self._publish)

    def _publish(self) -> None:
        self._publish_timer = None
        self._publish_at = asyncio.get_running_loop().time() + PROGRESS_EVERY_S
        if self._events.subscribers:
            self._events.publish("models", self.snapshot(), key="models")

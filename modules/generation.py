"""Generations that belong to no connection.

A Run takes its turn on a worker, collects the text, and can be followed by any number of viewers from any offset at any
time; a viewer that leaves or lags changes nothing. The page and the API use the same class: an API route stops its run when
its client has gone, the page does not.

Cost per token: one append and, where somebody waits, one future; everything else happens once per batch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modules import caller
from modules.errors import AppError, EngineError
from modules.schema import Done, GenerationRequest, PrefillProgress, Timings, TokenEvent, TokenLogprob, Usage, to_wire

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.model_manager import ModelManager
    from modules.residents import Lease, Resident

log = logging.getLogger(__name__)

KEEP_S = 300.0
COALESCE_S = 0.03

StoppedBy = Literal["user", "switch", "shutdown"]
RunState = Literal["queued", "prefill", "decoding", "done", "failed"]
Prepare = Callable[["Resident", "EngineClient"], Awaitable[GenerationRequest]]
"""Makes the request once the worker is known, since the chat template and the limits are the model's."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text. `offset_end` is the number of characters so far, this text included. `token_ids` are the tokens decoded since the
    Delta before, those whose text is still held back among them."""

    offset_end: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """`position` in the queue (1 is next; 0: not waiting), `estimate_s` until the turn, `prefill` (done, total) tokens."""

    state: RunState
    position: int = 0
    estimate_s: float | None = None
    prefill: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The run is over: look at its receipt, or its error."""


class Run:
    """One generation. Read its fields freely; they change only between two awaits."""

    def __init__(self, run_id: str, model_id: str | None, prepare: Prepare, warnings: list[str]) -> None:
        self.id = run_id
        self.model_id = model_id
        self.state: RunState = "queued"
        self.position = 0
        self.estimate_s: float | None = None
        self.prefill: tuple[int, int] | None = None
        self.resident: Resident | None = None
        self.request: GenerationRequest | None = None
        self.usage = Usage()
        self.timings = Timings()
        self.finish_reason: str | None = None
        self.stop_match: str | None = None
        self.cancelled_by: StoppedBy | None = None
        self.receipt: dict[str, Any] | None = None
        self.error: AppError | None = None
        self.created_at = time.time()
        self.caller = caller.current()
        self.warnings = warnings
        self.length = 0
        self._prepare = prepare
        self._parts: list[str] = []
        self._logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self._ids: list[tuple[int, ...]] = []  # of each part
        self._ids_held: tuple[int, ...] = ()  # of tokens that have shown no text yet
        self._tokens = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._version = 0
        self._begun = time.monotonic()
        self._granted: float | None = None
        self._first: float | None = None
        self._client: EngineClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopper: asyncio.Task[None] | None = None
        self._callbacks: list[Callable[[Run], None]] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    @property
    def offset(self) -> int:
        return self.length

    @property
    def completion_tokens(self) -> int:
        return self._tokens

    @property
    def done(self) -> bool:
        return self.state in ("done", "failed")

    # --- following ----------------------------------------------------------------------------------------------

    async def follow(self, start: int = 0, *, coalesce_s: float = COALESCE_S) -> AsyncIterator[Delta | Status | End]:
        """The text from character `start`, then what comes, then End. Never raises: an error is in `run.error`.

        The first text comes at once; later pieces are at least `coalesce_s` apart, with 0 as they come, several in one where
        the reader is slower than the model.
        """
        loop = asyncio.get_running_loop()
        index, skip, offset = self._seek(start)
        told = -1
        due = 0.0
        while True:
            if told != self._version:
                told = self._version
                yield Status(self.state, self.position, self.estimate_s, self.prefill)
            if index < len(self._parts):
                if coalesce_s:
                    wait = due - loop.time()
                    if wait > 0 and not self.done:
                        await asyncio.sleep(wait)
                    due = loop.time() + coalesce_s
                end = len(self._parts)
                text = self._parts[index] if end - index == 1 else "".join(self._parts[index:end])
                text = text[skip:]
                offset += len(text)
                logprobs: tuple[TokenLogprob, ...] = ()
                if self._logprobs:
                    logprobs = tuple(p for i in range(index, end) for p in self._logprobs.get(i, ()))
                ids = self._ids[index] if end - index == 1 else tuple(i for part in self._ids[index:end] for i in part)
                index, skip = end, 0
                yield Delta(offset, text, logprobs, ids)
            elif told != self._version:
                continue
            elif self.done:
                yield End()
                return
            else:
                await self._change()

    def _seek(self, start: int) -> tuple[int, int, int]:
        """(part, characters of it to skip, offset) of a character offset."""
        start = max(0, min(start, self.length))
        before = 0
        for index, part in enumerate(self._parts):
            if before + len(part) > start:
                return index, start - before, start
            before += len(part)
        return len(self._parts), 0, start

    async def wait(self) -> None:
        """Until the run is over. Never raises for the run's own failure."""
        while not self.done:
            await self._change()

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter.cancelled() and waiter in self._waiters:
                self._waiters.remove(waiter)

    def add_done_callback(self, callback: Callable[[Run], None]) -> None:
        """Called once in the event loop when the run is over (at once if it is)."""
        if self.done:
            callback(self)
        else:
            self._callbacks.append(callback)

    # --- stopping -----------------------------------------------------------------------------------------------

    def stop(self, by: StoppedBy = "user") -> None:
        """Stop soon. The text stays; finish_reason becomes cancelled. `by`: whoever reads the answer, the operator's switch of
        models, or the server's end."""
        if self.done or self.cancelled_by is not None:
            return
        self.cancelled_by = by
        if self._client is not None and self.request is not None and self.state in ("prefill", "decoding"):
            self._stopper = asyncio.get_running_loop().create_task(self._client.abort(self.request.request_id))
        elif self._task is not None:
            self._task.cancel()

    # --- the work -----------------------------------------------------------------------------------------------

    async def _execute(self, manager: ModelManager) -> None:
        try:
            async with manager.lease(self.model_id, self._on_position) as lease:
                await self._generate(lease)
        except asyncio.CancelledError:
            self._finish("cancelled")
            self.cancelled_by = self.cancelled_by or "shutdown"
        except AppError as error:
            self.error = error
        except Exception as error:
            log.exception("run %s failed", self.id)
            self.error = EngineError(f"The generation failed: {type(error).__name__}.", hint="The log says more.")
        if self.error is not None:
            self._finish("cancelled" if self.cancelled_by else "error")
        self.state = "failed" if self.error is not None and self.cancelled_by is None else "done"
        self._client = None
        self._notify()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a callback of run %s failed", self.id)

    async def _generate(self, lease: Lease) -> None:
        self._granted = time.monotonic()
        self.resident, self.position, self.estimate_s = lease.resident, 0, None
        lease.on_cancel = lambda: self.stop("switch")
        request = self.request = await self._prepare(lease.resident, lease.client)
        log.debug("run %s: prompt %r", self.id, request.prompt if request.prompt is not None else request.token_ids)  # --verbose
        self._client = lease.client
        self._set_state("prefill")
        events = lease.client.generate(request)
        parts, waiters = self._parts, self._waiters
        try:
            async for event in events:
                if type(event) is TokenEvent:
                    self._tokens += len(event.token_ids)
                    if self._first is None:
                        self._first = time.monotonic()
                        self._set_state("decoding")
                    text = event.text
                    if event.logprobs:
                        self._logprobs[len(parts)] = event.logprobs
                    elif not text:
                        self._ids_held += event.token_ids
                        continue
                    parts.append(text)
                    self._ids.append(self._ids_held + event.token_ids if self._ids_held else event.token_ids)
                    self._ids_held = ()
                    self.length += len(text)
                    if waiters:
                        self._wake()
                elif type(event) is PrefillProgress:
                    self.prefill = (event.done, event.total)
                    self._notify()
                else:
                    assert isinstance(event, Done)
                    self._complete(event)
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _complete(self, done: Done) -> None:
        if self._ids_held:  # the last tokens had no text
            self._parts.append("")
            self._ids.append(self._ids_held)
            self._ids_held = ()
        self.usage, self.timings, self.stop_match = done.usage, done.timings, done.stop_match
        self._finish(done.finish_reason, done)

    def _finish(self, reason: str, done: Done | None = None) -> None:
        self.finish_reason = reason
        if done is None and self.usage == Usage():
            self.usage = Usage(self.prefill[1] if self.prefill else 0, self._tokens)
        self.receipt = self._make_receipt(done)

    def _make_receipt(self, done: Done | None) -> dict[str, Any]:
        def rounded(value: float | None, digits: int = 2) -> float | None:
            return None if value is None else round(value, digits)

        resident = self.resident
        ignored = done.ignored if done else {}
        memory = (done.peak_memory_bytes if done else None) or (resident.memory_bytes if resident else None)
        return {
            "model": resident.model.id if resident else self.model_id,
            "loader": resident.loader if resident else None,
            "engine": resident.info.engine if resident and resident.info else None,
            "usage": to_wire(self.usage),
            "prefill_tok_s": rounded(self.timings.prefill_rate(self.usage)),
            "decode_tok_s": rounded(self.timings.decode_rate(self.usage)),
            "queue_ms": rounded(1000 * (self._granted - self._begun)) if self._granted else None,
            "ttft_ms": rounded(1000 * (self._first - self._begun)) if self._first else None,
            "total_ms": rounded(1000 * (time.monotonic() - self._begun)),
            "finish_reason": self.finish_reason,
            "stop_match": self.stop_match,
            "applied": done.applied if done else {},
            "ignored": ignored,
            "warnings": [*self.warnings, *ignored.values()],
            "seed": done.seed if done else None,
            "memory_bytes": memory,
        }

    def _on_position(self, position: int, estimate_s: float | None) -> None:
        self.position, self.estimate_s = position, estimate_s
        self._notify()

    def _set_state(self, state: RunState) -> None:
        self.state = state
        self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class Runs:
    """Every run, by id, until KEEP_S after its end."""

    def __init__(self, manager: ModelManager, *, keep_s: float = KEEP_S) -> None:
        self._manager = manager
        self._keep_s = keep_s
        self._runs: dict[str, Run] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self.on_end: Callable[[Run], None] | None = None

    def start(
        self,
        prepare: Prepare,
        model_id: str | None = None,
        *,
        warnings: list[str] | None = None,
        keep: bool = True,
        run_id: str | None = None,
    ) -> Run:
        """Begin a generation and return at once. `keep` False forgets it as soon as it is over (nobody comes back to it)."""
        run = Run(run_id or f"run-{secrets.token_hex(12)}", model_id, prepare, warnings if warnings is not None else [])
        self._runs[run.id] = run
        run._task = asyncio.get_running_loop().create_task(run._execute(self._manager))
        run.add_done_callback(self._forget_later if keep else self._forget)
        if self.on_end is not None:
            run.add_done_callback(self.on_end)
        return run

    def get(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    def stop(self, run_id: str) -> bool:
        """Whether there was such a run, still going."""
        run = self._runs.get(run_id)
        if run is None or run.done:
            return False
        run.stop()
        return True

    def running(self) -> list[Run]:
        """Not over yet, the oldest first."""
        return [run for run in self._runs.values() if not run.done]

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop every run, keep its text, and wait for the ends."""
        running = self.running()
        for run in running:
            run.stop("shutdown")
        tasks = [run._task for run in running if run._task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _forget(self, run: Run) -> None:
        self._runs.pop(run.id, None)

    def _forget_later(self, run: Run) -> None:
        loop = asyncio.get_running_loop()

        def forget() -> None:
            self._timers.discard(timer)
            self._forget(run)

        timer = loop.call_later(self._keep_s, forget)
        self._timers.add(timer)

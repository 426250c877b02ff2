"""Runs a batch: as many lines at once as the worker takes, each through the API's own path, each result on the disk before it
counts.

A line that ends a worker is tried once more with the worker's successor; a crash that repeats is that line's error. What no line
can help (no model, a backend that is missing, a full disk) stops the batch, which can be gone on with.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.batch.files import Output, read_lines
from modules.batch.lines import Line, answered, refused, tokens_of
from modules.caller import Caller, enter
from modules.errors import AppError, Conflict, EngineDead, LoadError, NoModelLoaded, Overloaded, StorageError

Answer = Callable[[str, dict[str, Any]], Awaitable["tuple[int, dict[str, Any]]"]]
"""(url, body) -> (HTTP status, body). Raises AppError."""

RETRIES = 3
RETRY_WAIT_S = 1.0
AHEAD = 1  # lines that wait in the worker's queue, so that it never waits for the next
_RATE_WINDOW_S = 60.0
_FATAL = (NoModelLoaded, LoadError, StorageError, Conflict)


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` lines have a result, `failed` of them an error. Rates are of this run's last minute."""

    total: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float | None
    remaining_s: float | None


class _Rate:
    """Lines and tokens of the last minute."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._events: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        self._events.append((now, tokens))
        while self._events and now - self._events[0][0] > _RATE_WINDOW_S:
            self._events.popleft()

    def per_second(self) -> tuple[float, float] | None:
        """(lines, tokens) per second."""
        if not self._events:
            return None
        span = min(time.monotonic() - self._started, _RATE_WINDOW_S)
        return (len(self._events) / span, sum(tokens for _, tokens in self._events) / span) if span > 0 else None


class BatchRun:
    """One pass over a batch: `run` until everything has a result, it is cancelled, or it can't go on.

    `slots` says how many lines to send at once, asked again before each. `on_progress` is called in the event loop.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        answer: Answer,
        slots: Callable[[], int],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._source, self._target = source, target
        self._answer, self._slots, self._on_progress = answer, slots, on_progress
        self._rate = _Rate()
        self._total = 0
        self._output: Output | None = None
        self._reader = read_lines(source)

    async def run(self) -> Progress:
        """The final progress. Raises AppError when the batch can't go on; cancelling stops it. Results so far are kept."""
        opening = asyncio.get_running_loop().create_task(asyncio.to_thread(self._open))
        try:
            output, todo, self._total = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on, and what it opens must be closed
            (await opening)[0].close()
            raise
        self._output = output
        active: set[asyncio.Task[dict[str, Any]]] = set()
        try:
            self._tell()
            lines = iter(todo)
            more = True
            while more or active:
                more = more and self._start(lines, active)
                if active:
                    await self._collect(active)
            return self.progress()
        finally:
            await self._end(active)
            await asyncio.to_thread(output.close)

    def _open(self) -> tuple[Output, list[int], int]:
        """The output, the numbers of the lines to do, and how many lines there are."""
        output = Output(self._target)
        try:
            todo, total = [], 0
            for line in read_lines(self._source):
                total += 1
                if not output.has(line):
                    todo.append(line.number)
        except BaseException:
            output.close()
            raise
        # Only numbers are kept: a file of millions of requests is read again, not remembered.
        return output, todo, total

    def _start(self, numbers: Iterator[int], active: set[asyncio.Task[dict[str, Any]]]) -> bool:
        """Fill the free places; whether there may be more lines."""
        while len(active) < max(1, self._slots()) + AHEAD:
            number = next(numbers, None)
            if number is None:
                return False
            line = next((line for line in self._reader if line.number == number), None)
            if line is None:
                raise Conflict(f"{self._source.name} has changed while it was worked on.", hint="Start the batch again.")
            active.add(asyncio.get_running_loop().create_task(self._one(line)))
        return True

    async def _collect(self, active: set[asyncio.Task[dict[str, Any]]]) -> None:
        """Wait for results and write them together."""
        assert self._output is not None
        done, _ = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
        active -= done
        records = [task.result() for task in done if not task.cancelled() and task.exception() is None]
        if records:
            await asyncio.to_thread(self._output.append, records)
            for record in records:
                self._rate.add(tokens_of(record)[1])
            self._tell()
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _end(self, active: set[asyncio.Task[dict[str, Any]]]) -> None:
        """Stop what is under way; results that came meanwhile are kept."""
        for task in active:
            task.cancel()
        if not active:
            return
        done, _ = await asyncio.wait(active)
        records = [task.result() for task in done if not task.cancelled() and task.exception() is None]
        if records and self._output is not None:
            await asyncio.to_thread(self._output.append, records)

    async def _one(self, line: Line) -> dict[str, Any]:
        """The output record of one line. Raises what stops the whole batch."""
        if line.error is not None:
            return refused(line, line.error)
        assert line.body is not None
        caller = Caller(client="batch", background=True)
        enter(caller)  # this task's own
        for attempt in range(RETRIES):
            try:
                status, body = await self._answer(line.url, line.body)
                return answered(line, status, body, caller.request_id)
            except _FATAL:
                raise
            except (EngineDead, Overloaded) as error:
                if attempt + 1 == RETRIES:
                    return answered(line, error.http_status, error.openai_body(), caller.request_id)
                await asyncio.sleep(RETRY_WAIT_S * (attempt + 1))
            except AppError as error:
                return answered(line, error.http_status, error.openai_body(), caller.request_id)
        raise AssertionError("the last attempt returns")

    # --- progress -----------------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        output = self._output
        assert output is not None
        rate = self._rate.per_second()
        done = len(output.done)
        remaining = (self._total - done) / rate[0] if rate and rate[0] > 0 else None
        return Progress(
            self._total,
            done,
            output.failures,
            output.prompt_tokens,
            output.completion_tokens,
            round(rate[1], 1) if rate else None,
            round(remaining, 1) if remaining is not None else None,
        )

    def _tell(self) -> None:
        self._on_progress(self.progress())

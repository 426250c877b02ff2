"""The parent's side of a worker: spawn, handshake, stream, abort, and say exactly how it died.

One event loop owns a client. Frames are parsed as they arrive and go to per-request queues, so a slow reader of one answer
never delays another. Silence is a fault too: a worker that answers no ping is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from modules import protocol
from modules.engine_client import EngineClient, OnProgress
from modules.errors import AppError, EngineDead, EngineTimeout, ProtocolError, error_from_wire
from modules.schema import (
    Done,
    Event,
    GenerationRequest,
    LoaderSpec,
    LoadProgress,
    ModelInfo,
    PrefillProgress,
    TokenEvent,
    TokenLogprob,
    from_wire,
    to_wire,
)

OnLog = Callable[[str], None]

HANDSHAKE_S = 60.0
PING_EVERY_S = 5.0
SILENCE_S = 15.0
SILENCE_WHILE_LOADING_S = 120.0  # a cold import of a backend's libraries can hold the interpreter lock that long
ABORT_GRACE_S = 15.0
STDERR_TAIL_BYTES = 8192
ROOT = Path(__file__).resolve().parent.parent


class WorkerEnvironment(Protocol):
    """What a client asks of modules.overlays."""

    def python(self, overlay: str | None) -> Path: ...

    def worker_env(self, overlay: str | None) -> dict[str, str]: ...


class _Stream:
    """The queue of one generation: filled by the pipe's callback, drained by one reader."""

    __slots__ = ("events", "finished", "ready")

    def __init__(self) -> None:
        self.events: deque[Event | AppError] = deque()
        self.ready = asyncio.Event()
        self.finished = False

    def put(self, event: Event | AppError) -> None:
        self.events.append(event)
        self.finished = self.finished or isinstance(event, (Done, AppError))
        self.ready.set()


class WorkerClient(EngineClient):
    """A worker process. Make one with `start`."""

    handshake_s = HANDSHAKE_S
    abort_grace_s: float | None = None  # None: ABORT_GRACE_S

    def __init__(self, spec: LoaderSpec, on_log: OnLog | None) -> None:
        self.spec = spec
        self.versions = {}
        self._on_log = on_log
        self._transport: asyncio.SubprocessTransport | None = None
        self._buffer = bytearray()
        self._stderr = bytearray()
        self._log_line = bytearray()
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._loading: asyncio.Future[ModelInfo] | None = None
        self._on_progress: OnProgress | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard = True
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, spec: LoaderSpec, environment: WorkerEnvironment, *, on_log: OnLog | None = None) -> WorkerClient:
        """Spawn the worker and shake hands. Raises EngineDead or ProtocolError."""
        client = cls(spec, on_log)
        command = [str(environment.python(spec.overlay)), "-X", "utf8", "-m", "modules.worker", "--loader", spec.name]
        hint = f"Run `doctor`: the environment {spec.overlay or 'parent'} may be incomplete."
        await client.launch(command, environment.worker_env(spec.overlay), hint)
        return client

    async def launch(self, command: Sequence[str], env: dict[str, str], hint: str) -> None:
        """Spawn `command` and shake hands with it; `hint` is for when it can't be spawned."""
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.subprocess_exec(lambda: _Pipes(self), *command, cwd=ROOT, env=env, **options)
        except OSError as error:
            raise EngineDead(f"The {self.spec.title} worker could not be started: {error.strerror}.", hint=hint) from error
        self._transport = transport
        self.pid = transport.get_pid()
        try:
            self._send({"type": "hello", "protocol": protocol.PROTOCOL_VERSION})
            await asyncio.wait_for(asyncio.shield(self._ready), self.handshake_s)
        except BaseException as error:
            await self.close(grace_s=0)
            if isinstance(error, asyncio.TimeoutError):
                raise EngineTimeout(f"The {self.spec.title} worker did not answer within {self.handshake_s:.0f} s.") from None
            raise
        self._background(self._watch())

    async def load(self, path: str, options: dict[str, Any], on_progress: OnProgress | None = None) -> ModelInfo:
        self._check_alive()
        self._on_progress = on_progress
        self._loading = asyncio.get_running_loop().create_future()
        self._send({"type": "load", "path": path, "options": options})
        try:
            self.info = await self._loading
        finally:
            self._loading = None
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self._check_alive()
        request_id = request.request_id
        if request_id in self._streams:
            raise ProtocolError(f"Request id {request_id!r} is in use.")
        stream = self._streams[request_id] = _Stream()
        try:
            self._send({"type": "generate", "request": to_wire(request)})
            while True:
                while stream.events:
                    event = stream.events.popleft()
                    if isinstance(event, AppError):
                        raise event
                    yield event
                    if isinstance(event, Done):
                        return
                stream.ready.clear()
                await stream.ready.wait()
        finally:
            if stream.finished or self.dead or self._closing:
                self._streams.pop(request_id, None)
            else:  # the reader left: the engine must stop, and its last frames have nowhere to go
                self._background(self._abort_and_forget(request_id))

    async def abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is None or stream.finished or self.dead:
            return
        self._send({"type": "abort", "request_id": request_id})
        self._background(self._enforce_abort(stream))

    async def call(self, method: str, **arguments: Any) -> Any:
        self._check_alive()
        call_id = str(next(self._call_ids))
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send({"type": "call", "call_id": call_id, "method": method, "arguments": arguments})
            return await future
        finally:
            self._calls.pop(call_id, None)

    async def close(self, grace_s: float = 5.0) -> None:
        if self._closing:
            await asyncio.shield(self._gone)
            return
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        if self._transport is None:
            return
        self._fail_all(EngineDead("The model was unloaded.", hint="Load it again."))
        if not self._gone.done():
            with contextlib.suppress(ConnectionError, ProtocolError):
                self._send({"type": "shutdown"})
            for stop in (None, signal.SIGTERM, None):
                if stop is not None:
                    self._signal(stop)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.shield(self._gone), grace_s / 2)
                    break
            else:
                self._kill()
                await asyncio.shield(self._gone)

    def memory_bytes(self) -> int | None:
        if self.pid is None or self._gone.done():
            return None
        import psutil

        try:
            worker = psutil.Process(self.pid)
            return sum(int(p.memory_info().rss) for p in [worker, *worker.children(recursive=True)])
        except psutil.Error:  # it ended between the two looks
            return None

    # --- frames in -----------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Bytes from the worker's frame pipe."""
        self._heard = True
        buffer = self._buffer
        buffer += data
        start, size = 0, protocol.HEADER.size
        try:
            while len(buffer) - start >= size:
                length = protocol.frame_length(bytes(buffer[start : start + size]))
                end = start + size + length
                if len(buffer) < end:
                    break
                self._handle(protocol.decode_body(bytes(buffer[start + size : end])))
                start = end
        except (ProtocolError, TypeError, KeyError) as error:
            fault = error if isinstance(error, ProtocolError) else ProtocolError(f"It sent a malformed frame: {error}.")
            self._die(fault.message[0].lower() + fault.message[1:])
            return
        del buffer[:start]

    def _handle(self, message: protocol.Message) -> None:
        kind = message["type"]
        if kind == "token":
            stream = self._streams.get(message["request_id"])
            if stream is not None:
                stream.put(_token_event(message))
        elif kind in ("prefill", "done"):
            stream = self._streams.get(message["request_id"])
            if stream is not None:
                del message["type"]
                stream.put(from_wire(PrefillProgress, message) if kind == "prefill" else from_wire(Done, message))
        elif kind == "error":
            self._handle_error(message)
        elif kind == "result":
            self._settle(self._calls.get(message["call_id"]), message["value"])
        elif kind == "progress":
            if self._on_progress is not None:
                self._on_progress(LoadProgress(message["stage"], message["fraction"]))
        elif kind == "loaded":
            self._settle(self._loading, from_wire(ModelInfo, message["info"]))
        elif kind == "ready":
            self.versions = dict(message["versions"])
            self._settle(self._ready, None)
        elif kind == "log":
            self._log(str(message["text"]))

    def _handle_error(self, message: protocol.Message) -> None:
        error = error_from_wire(message["error"])
        if "request_id" in message:
            stream = self._streams.get(message["request_id"])
            if stream is not None:
                stream.put(error)
        elif "call_id" in message:
            self._settle(self._calls.get(message["call_id"]), error)
        else:
            self._settle(self._loading or self._ready, error)

    @staticmethod
    def _settle(future: asyncio.Future[Any] | None, value: Any) -> None:
        if future is None or future.done():
            return
        if isinstance(value, AppError):
            future.set_exception(value)
        else:
            future.set_result(value)

    # --- stderr, death -------------------------------------------------------------------------------------------

    def receive_stderr(self, data: bytes) -> None:
        self._stderr += data
        del self._stderr[:-STDERR_TAIL_BYTES]
        *lines, rest = (self._log_line + data).split(b"\n")
        self._log_line = bytearray(rest[-STDERR_TAIL_BYTES:])
        for line in lines:
            self._log(line.decode("utf-8", "replace"))

    def _log(self, line: str) -> None:
        if self._on_log is not None:
            self._on_log(line)

    def pipe_ended(self) -> None:
        """The frame pipe closed: the worker is gone or useless."""
        if not self._closing and self._transport is not None and self._transport.get_returncode() is None:
            self._signal_after_pipe_end()

    def _signal_after_pipe_end(self) -> None:
        # A process that closed its frame pipe but lives on can't be talked to; give it a moment to end by itself.
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, lambda: None if self._gone.done() else self._kill())

    def process_ended(self) -> None:
        self._kill_group()  # grandchildren that outlived it
        if not self._closing:
            self._die(None)
        if not self._gone.done():
            self._gone.set_result(None)
        for task in list(self._tasks):
            task.cancel()
        if self._transport is not None:
            self._transport.close()

    def _die(self, reason: str | None) -> None:
        """The worker is unusable: fail everything that waits, end the process, tell the owner. Once."""
        if self.dead is not None:
            return
        assert self._transport is not None
        code = self._transport.get_returncode()
        detail = {"stderr": self._stderr.decode("utf-8", "replace"), "exit_code": code, "signal": None}
        if reason is None:
            reason = f"it exited with code {code}"
            if code is not None and code < 0:
                detail["signal"] = _signal_name(-code)
                detail["exit_code"] = None
                reason = f"it was ended by {detail['signal']}{_SIGNAL_MEANING.get(str(detail['signal']), '')}"
        self.dead = EngineDead(
            f"The {self.spec.title} worker stopped: {reason.rstrip('.')}.", hint="Reload the model and go on.", detail=detail
        )
        self._fail_all(self.dead)
        if not self._gone.done() and code is None:
            self._kill()
        if self.on_death is not None and not self._closing:
            self.on_death(self.dead)

    def _fail_all(self, error: AppError) -> None:
        for stream in self._streams.values():
            if not stream.finished:
                stream.put(error)
        for future in [self._ready, self._loading, *self._calls.values()]:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # a future nobody waits for must not warn at collection

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise self.dead
        if self._closing:
            raise EngineDead("The model was unloaded.", hint="Load it again.")

    async def _watch(self) -> None:
        """Ping; kill a worker that stays silent: it is stopped, or stuck in code that holds the interpreter's lock.

        Counts unanswered pings, not time: a laptop that slept, or a busy event loop, must not look like a dead worker.
        """
        unanswered = 0
        while True:
            self._heard = False
            self._send({"type": "ping"})
            await asyncio.sleep(PING_EVERY_S)
            unanswered = 0 if self._heard else unanswered + 1
            limit = SILENCE_WHILE_LOADING_S if self._loading is not None else SILENCE_S
            if unanswered * PING_EVERY_S >= limit:
                self._die(f"it did not answer for {limit:.0f} s")
                return

    async def _abort_and_forget(self, request_id: str) -> None:
        await self.abort(request_id)
        stream = self._streams[request_id]
        try:
            while not stream.finished:
                stream.ready.clear()
                await stream.ready.wait()
        finally:
            self._streams.pop(request_id, None)

    async def _enforce_abort(self, stream: _Stream) -> None:
        grace_s = self.abort_grace_s or ABORT_GRACE_S
        await asyncio.sleep(grace_s)
        if not stream.finished:
            self._die(f"it did not stop within {grace_s:.0f} s of being asked to")

    # --- out -------------------------------------------------------------------------------------------------------

    def _send(self, message: protocol.Message) -> None:
        assert self._transport is not None
        pipe = self._transport.get_pipe_transport(0)
        if pipe is not None:  # uvloop's is no asyncio.WriteTransport
            cast("asyncio.WriteTransport", pipe).write(protocol.encode_frame(message))

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _signal(self, number: int) -> None:
        assert self._transport is not None
        with contextlib.suppress(ProcessLookupError):
            self._transport.send_signal(number)

    def _kill(self) -> None:
        assert self._transport is not None
        self._kill_group()
        with contextlib.suppress(ProcessLookupError):
            self._transport.kill()

    def _kill_group(self) -> None:
        if self.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class _Pipes(asyncio.SubprocessProtocol):
    def __init__(self, client: WorkerClient) -> None:
        self._client = client

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self._client.receive(data)
        else:
            self._client.receive_stderr(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._client.pipe_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        # Called when the process has ended and every pipe is drained: all its last words are in.
        self._client.process_ended()


def _token_event(message: protocol.Message) -> TokenEvent:
    logprobs = message.get("logprobs")
    return TokenEvent(
        message["request_id"],
        message["index"],
        tuple(message["token_ids"]),
        message["text"],
        tuple(from_wire(TokenLogprob, item) for item in logprobs) if logprobs else (),
    )


_SIGNAL_MEANING = {
    "SIGKILL": " (often the system's out-of-memory killer)",
    "SIGSEGV": " (a crash in native code)",
    "SIGABRT": " (a failed check in native code)",
    "SIGILL": " (a processor instruction this machine lacks)",
    "SIGBUS": " (its model file changed or was cut while in use)",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

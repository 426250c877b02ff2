"""The child process that holds one model: `python -m modules.worker --loader NAME`.

The main thread loads and computes, for the process's whole life (see modules.engine). A reader thread takes frames from
stdin: it answers pings and sets cancel tokens at once, so a computing worker still hears. A text thread answers encode and
decode. Frames are written to a private copy of fd 1; fd 1 itself points at stderr before any backend is imported, so a C
library's printf can't corrupt a frame. The end of stdin (the parent died) ends the process and its group.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from modules import protocol
from modules.engine import CancelToken, Engine
from modules.errors import (
    AppError,
    EngineError,
    GenerateOutOfMemory,
    GenerationFailed,
    LoadError,
    LoadOutOfMemory,
    ProtocolError,
    is_out_of_memory,
    one_line,
)
from modules.registry import engine_class, load_spec
from modules.schema import ChatInput, Done, Event, GenerationRequest, PrefillProgress, TokenEvent, from_wire, to_wire

Job = Callable[[], None]


def _shutdown() -> None:
    """The job that ends the compute loop."""


class Worker:
    def __init__(self, engine: Engine, source: BinaryIO, sink: BinaryIO) -> None:
        self._engine = engine
        self._source = source
        self._sink = sink
        self._write_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._active: dict[str, Iterator[Event | None]] = {}
        self._cancels: dict[str, CancelToken] = {}
        self._slots = engine.spec.slots
        self._text_calls = ThreadPoolExecutor(1, thread_name_prefix="text")

    def run(self) -> None:
        """Compute in this thread until shutdown or the parent's end."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while (job := self._next_job()) is not _shutdown:
            if job is not None:
                job()
            if self._active:
                self._step_all()
        self._engine.close()

    def _next_job(self) -> Job | None:
        """The next job; None when generations are active and there is none to start. Waits while all is idle."""
        if not self._active:
            return self._jobs.get()
        if len(self._active) >= self._slots:
            return None
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            return None

    def _start(self, request: GenerationRequest, cancel: CancelToken) -> None:
        try:
            self._active[request.request_id] = self._engine.generate(request, cancel)
        except Exception as error:  # an engine whose `generate` is no generator may fail here
            self._fail(request.request_id, error)

    # --- frames ---------------------------------------------------------------------------------------------

    def send(self, message: protocol.Message) -> None:
        frame = protocol.encode_frame(message)
        with self._write_lock:
            self._sink.write(frame)
            self._sink.flush()

    def _send_error(self, error: AppError, **ids: str) -> None:
        self.send({"type": "error", "error": error.to_wire(), **ids})

    def _read(self) -> None:
        try:
            while (message := protocol.read_frame(self._source)) is not None:
                if message["type"] == "shutdown":
                    self._jobs.put(_shutdown)
                    return
                self._dispatch(message)
        except ProtocolError as error:
            print(f"worker: {error}", file=sys.stderr, flush=True)
        leave_with_group()

    def _dispatch(self, message: protocol.Message) -> None:
        kind = message["type"]
        if kind == "ping":
            self.send({"type": "pong"})
        elif kind == "hello":
            self._hello(message)
        elif kind == "load":
            self._jobs.put(lambda: self._load(message["path"], message["options"]))
        elif kind == "generate":
            request = from_wire(GenerationRequest, message["request"])
            self._cancels[request.request_id] = cancel = CancelToken()
            self._jobs.put(lambda: self._start(request, cancel))
        elif kind == "abort":
            token = self._cancels.get(message["request_id"])
            if token is not None:
                token.cancel()
        elif kind == "call" and (message["method"] in ("encode", "decode", "render") or self._engine.computes_elsewhere):
            self._text_calls.submit(self._call, message)
        elif kind == "call":
            self._jobs.put(lambda: self._call(message))
        else:
            self._send_error(ProtocolError(f"A worker does not take {kind!r}."))

    # --- messages -------------------------------------------------------------------------------------------

    def _hello(self, message: protocol.Message) -> None:
        if message.get("protocol") != protocol.PROTOCOL_VERSION:
            self._send_error(
                ProtocolError(
                    f"The server speaks worker protocol {message.get('protocol')}, this worker {protocol.PROTOCOL_VERSION}.",
                    hint="Restart the server so that both are of one version.",
                )
            )
            return
        self.send(
            {
                "type": "ready",
                "protocol": protocol.PROTOCOL_VERSION,
                "loader": self._engine.spec.name,
                "versions": self._engine.versions() | {"python": sys.version.split()[0]},
                "pid": os.getpid(),
            }
        )

    def _load(self, path: str, options: dict[str, Any]) -> None:
        try:
            info = self._engine.load(path, options, lambda p: self.send({"type": "progress", **to_wire(p)}))
        except AppError as error:
            self._send_error(error)
        except Exception as error:
            traceback.print_exc()
            self._send_error(
                LoadOutOfMemory("This machine's memory is too small for the model.", hint=_SMALLER)
                if is_out_of_memory(error)
                else LoadError(f"{self._engine.spec.title} could not load the model: {one_line(error)}.")
            )
        else:
            self._slots = info.slots or self._engine.spec.slots
            self.send({"type": "loaded", "info": to_wire(info)})

    def _fail(self, request_id: str, error: Exception) -> None:
        """Report why one generation failed; the engine is good for the next."""
        del self._cancels[request_id]
        if isinstance(error, AppError):
            failure = error
        else:
            traceback.print_exc()
            failure = (
                GenerateOutOfMemory("The machine's memory ran out in the middle of the answer.", hint=_SMALLER)
                if is_out_of_memory(error)
                else GenerationFailed(f"{self._engine.spec.title} failed: {one_line(error)}.", hint="Try again.")
            )
        self._send_error(failure, request_id=request_id)

    def _step_all(self) -> None:
        """One event from each active generation, in turn."""
        waiting = 0
        for request_id, events in list(self._active.items()):
            try:
                event = next(events)
            except StopIteration:
                del self._active[request_id], self._cancels[request_id]
            except Exception as error:
                del self._active[request_id]
                self._fail(request_id, error)
            else:
                if event is None:
                    waiting += 1
                else:
                    self.send(event_frame(event))
        if self._active and waiting == len(self._active):
            self._engine.wait_for_news()

    def _call(self, message: protocol.Message) -> None:
        call_id, method = message["call_id"], message["method"]
        calls: dict[str, Callable[..., Any]] = {
            "encode": self._engine.encode,
            "decode": self._engine.decode,
            "score": self._engine.score,
            "embed": self._engine.embed,
            "render": lambda chat: self._engine.render(from_wire(ChatInput, chat)),
        }
        try:
            if method not in calls:
                raise ProtocolError(f"A worker has no method {method!r}.")
            value = calls[method](**message["arguments"])
        except AppError as error:
            self._send_error(error, call_id=call_id)
        except Exception as error:
            traceback.print_exc()
            self._send_error(EngineError(f"{method} failed: {one_line(error)}."), call_id=call_id)
        else:
            self.send({"type": "result", "call_id": call_id, "value": to_wire(value)})


_SMALLER = "Choose a smaller model, a smaller context or a stronger quantisation."


def event_frame(event: Event) -> protocol.Message:
    if isinstance(event, TokenEvent):
        frame: protocol.Message = {
            "type": "token",
            "request_id": event.request_id,
            "index": event.index,
            "token_ids": event.token_ids,
            "text": event.text,
        }
        if event.logprobs:
            frame["logprobs"] = to_wire(event.logprobs)
        return frame
    kind = {PrefillProgress: "prefill", Done: "done"}[type(event)]
    return {"type": kind, **to_wire(event)}


def leave_with_group() -> None:
    """End this process and whatever it started. Only a group of our own is killed, never the parent's."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when the parent's thread that started it ends (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def take_over_stdout() -> BinaryIO:
    """A private stream to the real fd 1; fd 1 becomes stderr."""
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.environ["SWITCHYARD_FRAME_FD"] = str(sink.fileno())  # for the echo loader's garbage fault only
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return sink


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modules.worker", description="Serve one model over stdin and stdout.")
    parser.add_argument("--loader", required=True)
    loader = parser.parse_args().loader
    sink = take_over_stdout()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    Worker(engine_class(load_spec(loader))(), source, sink).run()
    # Skip interpreter teardown: CUDA and OpenMP destructors can hang or crash, and the kernel frees everything.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""`python -m modules.ray_engine.gateway --loader NAME --settings JSON --address HOST:PORT`: a worker whose work is elsewhere.

It speaks the worker's protocol (modules.protocol) with the server and deploys the model as a Serve application whose replicas do
the work. Token frames come ready made from the replicas and go on as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from modules import protocol
from modules.errors import AppError, EngineDead, LoadError, ProtocolError, error_from_wire, one_line
from modules.overlays import Overlays
from modules.ray_engine.deploy import OVER, ROUTER_S, Deployment, connect
from modules.ray_engine.launch import ROOT
from modules.ray_engine.replica import RESEND, error_frame, frame
from modules.ray_engine.settings import RaySettings
from modules.registry import load_spec
from modules.schema import Done, Usage
from modules.worker import leave_with_group, take_over_stdout

SILENCE_S = 30.0  # a replica says something every five seconds
WATCH_S = 2.0
DELETE_S = 20.0
UNROUTED_ABORT_S = 1.0


@dataclass(eq=False)
class Stream:
    """One generation on its way through. `heard` is None until a replica has it."""

    task: asyncio.Task[None] | None = None
    heard: float | None = None
    silent: bool = False
    aborted: bool = False


class Gateway:
    def __init__(self, deployment: Deployment, source: BinaryIO, sink: BinaryIO) -> None:
        self._deployment = deployment
        self._source, self._sink = source, sink
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._replicas: dict[str, dict[str, Any]] = {}
        self._dead: set[str] = set()  # what else is heard of these was said before they ended
        self._loading: asyncio.Future[dict[str, Any]] | None = None
        self._loaded = False
        self._last_failure: AppError | None = None
        self._ended = asyncio.Event()
        self._orphaned = False  # the server is gone
        self._rayless = False  # Ray is gone

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="reader", daemon=True).start()
        await self._ended.wait()
        if not self._rayless and not (
            self._orphaned and self._deployment.local
        ):  # a Ray of the server's goes with it, as a whole
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._deployment.delete(), DELETE_S)
        leave_with_group()  # here: a loop that closes would wait for calls to a Ray that may be gone

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while (message := protocol.read_frame(self._source)) is not None:
                loop.call_soon_threadsafe(self._dispatch, message)
        except ProtocolError as error:
            print(f"gateway: {error}", file=sys.stderr, flush=True)
        self._orphaned = True
        loop.call_soon_threadsafe(self._ended.set)

    def _dispatch(self, message: protocol.Message) -> None:
        kind = message["type"]
        if kind == "ping":
            self._send({"type": "pong"})
        elif kind == "shutdown":
            self._ended.set()
        elif kind == "load":
            self._spawn(self._load(message["path"], message["options"]))
        elif kind == "generate":
            stream = self._streams[message["request"]["request_id"]] = Stream()
            stream.task = self._spawn(self._generate(message["request"], stream))
        elif kind == "abort":
            self._spawn(self._abort(message["request_id"]))
        elif kind == "call":
            self._spawn(self._call(message))
        else:
            self._send_error(ProtocolError(f"A gateway does not take {kind!r}."))

    def _send(self, message: protocol.Message) -> None:
        self._sink.write(protocol.encode_frame(message))

    def _send_error(self, error: AppError, **ids: str) -> None:
        self._sink.write(error_frame(error, **ids))

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- loading ------------------------------------------------------------------------------------------------

    async def _load(self, path: str, options: dict[str, Any]) -> None:
        try:
            self._loading = asyncio.get_running_loop().create_future()
            self._send({"type": "progress", "stage": "Placing the replicas", "fraction": None})
            await self._deployment.check_nodes(path)
            await self._deployment.create(path, options)
            self._spawn(self._read_board())
            info = await self._loading
            await self._deployment.loaded(info)
        except AppError as error:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._deployment.delete(), DELETE_S)
            self._send_error(error)
        except Exception as error:
            logging.getLogger(__name__).exception("deploying failed")
            self._send_error(LoadError(f"Ray Serve did not deploy the model: {one_line(error)}.", hint="The log says more."))
        else:
            self._loaded = True
            self._send({"type": "loaded", "info": self._deployment.whole(info)})
            self._spawn(self._watch())
        finally:
            self._loading = None

    async def _read_board(self) -> None:
        """What the replicas post; the end of the board is the end of Ray."""
        try:
            while True:
                for note in await self._deployment.notes():
                    self._note(note)
        except Exception as error:
            self._rayless = True  # or this board alone, and then the replicas take the deployment away
            self._end_with(f"Ray ended: {one_line(error)}")

    def _note(self, note: dict[str, Any]) -> None:
        kind, replica = note["kind"], note["replica"]
        if kind == "log":
            self._send({"type": "log", "level": "info", "text": note["text"]})
        elif kind == "progress" and self._loading is not None:
            self._send({"type": "progress", "stage": note["stage"], "fraction": note["fraction"]})
        elif kind == "ready" or (kind == "memory" and replica not in self._dead):
            self._dead.discard(replica)
            known = self._replicas.get(replica, {})
            self._replicas[replica] = {**known, **note, "heard": time.monotonic()}
            if kind == "ready":
                self._check_ready(note["info"])
                self._spawn(self._announce())
            else:
                self._send_status()
        elif kind == "crashed" and self._replicas.get(replica, note)["worker"] != note["worker"]:
            pass  # told late: it has another worker already
        elif kind in ("failed", "crashed"):
            self._replicas.pop(replica, None)
            self._dead.add(replica)
            self._last_failure = error_from_wire(note["error"])
            if kind == "failed" and self._loading is not None and not self._loading.done():
                self._loading.set_exception(self._last_failure)
            self._send_status()

    def _check_ready(self, info: dict[str, Any]) -> None:
        wanted = self._deployment.settings.minimum
        if self._loading is None or self._loading.done():
            return
        if len(self._replicas) >= wanted:
            self._loading.set_result(info)
        else:
            stage = f"{len(self._replicas)} of {wanted} replicas are ready"
            self._send({"type": "progress", "stage": stage, "fraction": len(self._replicas) / wanted})

    async def _announce(self) -> None:
        """A replica counts once the router knows all that are ready."""
        while (names := set(self._replicas)) and await self._deployment.known() < len(names):
            await asyncio.sleep(ROUTER_S)
        for name in names & self._replicas.keys():
            self._replicas[name]["routed"] = True
        self._send_status()

    def _send_status(self) -> None:
        now = time.monotonic()
        self._replicas = {name: note for name, note in self._replicas.items() if now - note["heard"] < SILENCE_S}
        shown = ("replica", "pid", "worker", "node", "bytes")
        replicas = [{key: note[key] for key in shown} for note in self._replicas.values() if "routed" in note]
        versions: dict[str, str] = next((n["versions"] for n in self._replicas.values() if "versions" in n), {})
        self._send({"type": "status", "replicas": replicas, "versions": versions})

    # --- requests -------------------------------------------------------------------------------------------------

    async def _generate(self, request: dict[str, Any], stream: Stream) -> None:
        request_id = request["request_id"]
        try:
            async for frames in self._deployment.generate(request):
                stream.heard = time.monotonic()
                if frames:
                    self._sink.write(frames)
        except asyncio.CancelledError:
            if stream.silent:
                self._send_error(self._lost(f"it was silent for {SILENCE_S:.0f} s", ""), request_id=request_id)
            else:
                self._sink.write(frame(Done(request_id, "cancelled", Usage())))
        except Exception as error:
            self._forget_named(str(error))
            self._send_error(self._lost(_death(error), str(error)), request_id=request_id)
        finally:
            self._streams.pop(request_id, None)

    def _forget_named(self, text: str) -> None:
        """Ray names the actor that it lost."""
        for name in [name for name in self._replicas if name in text]:
            del self._replicas[name]
            self._dead.add(name)
            self._send_status()

    def _lost(self, reason: str, detail: str) -> EngineDead:
        words = {"stderr": detail[-8192:], "exit_code": None, "signal": None}
        title = self._deployment.spec.title
        return EngineDead(f"A replica of {title} stopped in the middle of this answer: {reason}.", hint=RESEND, detail=words)

    async def _abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.aborted = True
        with contextlib.suppress(Exception):  # a replica that is dying ends its own stream
            await asyncio.wait_for(self._deployment.abort(request_id), SILENCE_S)
        await asyncio.sleep(UNROUTED_ABORT_S)
        if request_id in self._streams and stream.heard is None and stream.task is not None:
            stream.task.cancel()  # it waits for a replica: none will hear of it

    async def _call(self, message: protocol.Message) -> None:
        call_id = message["call_id"]
        try:
            answer = await self._deployment.call(message["method"], message["arguments"])
        except Exception as error:
            answer = {"error": self._lost(_death(error), str(error)).to_wire()}
        if "error" in answer:
            self._send({"type": "error", "call_id": call_id, "error": answer["error"]})
        else:
            self._send({"type": "result", "call_id": call_id, "value": answer["value"]})

    # --- faults -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Silent streams, and a deployment that does not come back."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for stream in self._streams.values():
                if stream.heard is not None and now - stream.heard > SILENCE_S and stream.task is not None:
                    stream.silent = True
                    stream.task.cancel()
            try:
                state = await asyncio.wait_for(self._deployment.state(), SILENCE_S)
            except Exception as error:
                self._rayless = True
                self._end_with(f"the Ray cluster does not answer any more: {one_line(error)}")
                return
            if state in OVER:
                why = f": {self._last_failure}" if self._last_failure is not None else ""
                self._end_with(f"its replicas can't be started again ({state}){why}")
                return

    def _end_with(self, reason: str) -> None:
        """This gateway is of no more use: its last words, typed for everyone who waits."""
        if not self._ended.is_set():
            self._send_error(EngineDead(reason, hint="Load the model again."))
            self._ended.set()


def _death(error: Exception) -> str:
    """Ray's word for it, short."""
    from ray.exceptions import RayActorError

    return "its process ended, or its node is lost" if isinstance(error, RayActorError) else one_line(error)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modules.ray_engine.gateway", description="Serve one model on Ray.")
    for name in ("--loader", "--settings", "--address", "--app"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    sink = take_over_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    hello = protocol.read_frame(source)
    settings = RaySettings.from_json(given.settings)
    try:
        if hello is None or hello.get("protocol") != protocol.PROTOCOL_VERSION:
            theirs = hello.get("protocol") if hello else None
            raise ProtocolError(
                f"The server speaks worker protocol {theirs}, this gateway {protocol.PROTOCOL_VERSION}.",
                hint="Restart the server so that both are of one version.",
            )
        versions = connect(given.address, settings)
    except AppError as error:
        sink.write(error_frame(error))
        os._exit(1)
    ready = {"loader": given.loader, "versions": versions, "pid": os.getpid(), "protocol": protocol.PROTOCOL_VERSION}
    sink.write(protocol.encode_frame({"type": "ready", **ready}))
    deployment = Deployment(load_spec(given.loader), settings, given.app, Overlays.find(ROOT))

    async def serve() -> None:
        await Gateway(deployment, source, sink).run()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

"""The server's side of `--engine ray`: one local Ray (or a place in a cluster) for all models, one gateway for each.

A gateway speaks the worker's protocol, so its client is the worker's; it differs in what it tells and in how long it may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import BackendUnavailable, EngineDead, error_from_wire
from modules.overlays import start_script
from modules.ray_engine import launch
from modules.ray_engine.launch import OVERLAY
from modules.worker_client import ROOT, OnLog, WorkerClient

if TYPE_CHECKING:
    from modules import protocol
    from modules.overlays import Overlays
    from modules.ray_engine.settings import RaySettings
    from modules.schema import LoaderSpec

log = logging.getLogger(__name__)

START_S = 120.0
CLOSE_S = 40.0
END_S = 15.0
SOCKET_PATH_BYTES = 38  # what Ray's own names leave of the 107 that a socket's path may have


def problem(overlays: Overlays) -> str | None:
    """Why Ray can't run here, with the fix; None when it can."""
    if sys.platform == "win32":
        return "Ray runs replicas on Linux and macOS only: use --engine local here, or WSL."
    if not overlays.complete(OVERLAY) or not overlays.has_module(OVERLAY, "ray"):
        return f"Ray is not installed: {start_script()} install {OVERLAY}"
    return None


class RayClient(WorkerClient):
    """One model on Ray. `replicas`: pid, worker (its pid), node and bytes of each, as last told."""

    handshake_s = 180.0  # Ray's libraries, a cluster, Serve's controller
    abort_grace_s = 30.0  # the replica ends a worker that does not stop: its answer alone is lost

    def __init__(self, spec: LoaderSpec, on_log: OnLog | None) -> None:
        super().__init__(spec, on_log)
        self.replicas: list[dict[str, Any]] = []

    def _handle(self, message: protocol.Message) -> None:
        if message["type"] == "status":
            self.replicas = message["replicas"]
            self.versions.update(message["versions"])
        elif message["type"] == "error" and not message.keys() & {"request_id", "call_id"} and self._serving():
            self._die(str(message["error"]["message"]))
        else:
            super()._handle(message)

    def _die(self, reason: str | None) -> None:
        if reason is None and b"Failed to connect to GCS" in self._stderr:  # Ray's own way to end the gateway
            reason = "the Ray cluster lost its head"
        super()._die(reason)

    def _serving(self) -> bool:
        return self._ready.done() and self._loading is None

    async def close(self, grace_s: float = CLOSE_S) -> None:
        await super().close(grace_s)

    def memory_bytes(self) -> int | None:
        """Of the gateway and of all replicas' workers, wherever they run."""
        own = super().memory_bytes()
        return None if own is None else own + sum(replica["bytes"] or 0 for replica in self.replicas)


class RayEngine:
    """Starts gateways; belongs to the server's event loop. `close` before the loop ends."""

    def __init__(self, settings: RaySettings, overlays: Overlays, folder: Path) -> None:
        self.settings = settings
        self._overlays = overlays
        self._folder = folder
        self.token = secrets.token_hex(32)
        self._node: asyncio.subprocess.Process | None = None
        self._address = ""
        self._words: deque[str] = deque(maxlen=40)
        self._starting = asyncio.Lock()
        self._readers: set[asyncio.Task[None]] = set()
        self._count = 0

    @property
    def pid(self) -> int | None:
        """The process that all of a local Ray hangs on."""
        return self._node.pid if self._node is not None else None

    async def start(self, spec: LoaderSpec, on_log: OnLog | None = None) -> RayClient:
        """A gateway for one model. Raises BackendUnavailable, EngineDead."""
        if why := problem(self._overlays):
            what, _, fix = why.partition(": ")
            raise BackendUnavailable(f"{what}.", hint=f"Run `{fix}`." if fix.startswith((".", "start")) else fix)
        address = await self.start_node()
        self._count += 1
        app = f"switchyard-{os.getpid()}-{self.token[:6]}-{self._count}"
        words = ["--loader", spec.name, "--settings", self.settings.to_json(), "--address", address, "--app", app]
        command = [str(self._overlays.python(OVERLAY)), "-X", "utf8", "-m", "modules.ray_engine.gateway", *words]
        client = RayClient(spec, on_log)
        await client.launch(command, self._env(), f"Run `{start_script()} install {OVERLAY}`.")
        return client

    def _env(self) -> dict[str, str]:
        own = launch.cluster_env(self.settings.address) if self.settings.address else launch.local_env(self.token)
        return self._overlays.worker_env(OVERLAY) | own

    # --- the node -------------------------------------------------------------------------------------------------

    async def start_node(self) -> str:
        """The address of the local Ray, or of the cluster that was joined; started where it is not running."""
        async with self._starting:
            if self._node is None or self._node.returncode is not None:
                self._node = None
                await self._begin_node()
            return self._address

    async def _begin_node(self) -> None:
        cpus = max(os.cpu_count() or 1, int(self.settings.cpus * self.settings.maximum * 4) + 1)
        wanted = {"address": self.settings.address, "folder": str(self._temporary()), "cpus": cpus, "gpus": _gpus()}
        process = await asyncio.create_subprocess_exec(
            str(self._overlays.python(OVERLAY)),
            *("-X", "utf8", "-m", "modules.ray_engine.node"),
            cwd=ROOT,
            env=self._env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        reader = asyncio.create_task(self._read_words(process))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        try:
            process.stdin.write(json.dumps(wanted).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except BaseException:
            await _end(process, 0)
            raise
        answer = json.loads(line) if line else {}
        if "address" not in answer:
            await _end(process, END_S)
            await reader
            if "error" in answer:
                raise error_from_wire(answer["error"])
            detail = {"stderr": "\n".join(self._words)[-8192:], "exit_code": process.returncode, "signal": None}
            raise EngineDead("Ray did not start.", hint="Try again; the log says more.", detail=detail)
        self._node, self._address = process, answer["address"]
        log.info("Ray is at %s", self._address)

    async def _read_words(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            self._words.append(line.decode("utf-8", "replace").rstrip())
            log.debug("ray: %s", self._words[-1])

    def _temporary(self) -> Path:
        """Ray's folder: in the data folder where a socket's path fits."""
        folder = (self._folder / "ray").absolute()
        if len(os.fsencode(folder)) <= SOCKET_PATH_BYTES:
            return folder
        return Path(tempfile.gettempdir()) / f"switchyard-ray-{self.token[:12]}"

    async def close(self) -> None:
        """End the local Ray, or leave the cluster; waits until the processes are gone."""
        async with self._starting:
            if self._node is not None:
                await _end(self._node, END_S)
        for reader in list(self._readers):
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Ask by the end of its stdin, then kill it with its group."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.close()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), grace_s)
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _gpus() -> int:
    """NVIDIA GPUs that this server may use; no process is asked."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([word for word in shown.split(",") if word.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))

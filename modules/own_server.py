"""A server of our own in a process of its own: what conformance asks, and the far end that the remote loader is tried on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from modules.errors import ConfigError
from modules.options import ROOT
from modules.remotes.store import RemoteStore, model_path

FAR = "far"


@contextlib.asynccontextmanager
async def own_server(data: Path, *flags: str) -> AsyncIterator[str]:
    """Its address: no page, a free port, no model yet; gone afterwards. Raises ConfigError when it does not start."""
    command = [sys.executable, "server.py", "--nowebui", "--no-model", "--listen-port", "0", "--user-data-dir", str(data)]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--no-background-install",
        *flags,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode("utf-8", "replace")
        found = re.search(r"http://[\d.]+:\d+", line)
        if found is None:
            raise ConfigError("The server for the probes did not start.", hint="`server.py --nowebui --no-model` says why.")
        yield found[0]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@contextlib.asynccontextmanager
async def far_server(data: Path, store: RemoteStore, model: str, *flags: str) -> AsyncIterator[str]:
    """A second server, saved in `store` as a remote one; the path by which a worker loads `model` from it."""
    async with own_server(data, *flags) as url:
        await asyncio.to_thread(store.add, FAR, url)
        try:
            yield model_path(store.path.absolute(), FAR, model)
        finally:
            await asyncio.to_thread(store.remove, FAR)

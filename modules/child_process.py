"""What conversion and quantisation share about their child processes: the end of stderr, and an end that is sure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import deque


async def keep_tail(process: asyncio.subprocess.Process, tail: deque[str]) -> None:
    """Keep the last lines of a child's stderr until it closes."""
    assert process.stderr is not None
    while chunk := await process.stderr.read(1 << 16):
        tail.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())


async def end_group(process: asyncio.subprocess.Process) -> None:
    """Kill a child with its group and wait until it is gone."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    # A second cancellation must not leave a child that still writes to the file we are about to delete.
    await asyncio.shield(process.wait())

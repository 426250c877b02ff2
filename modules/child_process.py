"""A job in a child process of another environment, that ends for sure: converting, quantising, lm-evaluation-harness.

The child writes one JSON object a line to stdout: its last word is {"done": {...}} or {"error": AppError.to_wire()}, what the
others mean is the job's. All else it or a library prints goes to stderr, whose tail explains a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import LoadError, error_from_wire

_LINE_LIMIT = 64 << 20
_TAIL_LINES = 40
# What a message does; a coroutine gives the answer that goes back as {"value": ...}.
OnMessage = Callable[[dict[str, Any]], "Coroutine[Any, Any, Any] | None"]


@dataclass(frozen=True, slots=True)
class Ended:
    """`result` is what "done" brought, None when the child ended without it; then `stderr` has its last lines."""

    result: dict[str, Any] | None
    exit_code: int | None
    stderr: list[str]

    @property
    def last_words(self) -> str:
        return self.stderr[-1].strip()[:300] if self.stderr else "it said nothing"

    @property
    def detail(self) -> dict[str, Any]:
        """For the error: exit code and the end of stderr."""
        return {"exit_code": self.exit_code, "stderr": "\n".join(self.stderr)[-8192:]}


async def run_job(command: Sequence[str], env: dict[str, str], root: Path, on_message: OnMessage) -> Ended:
    """Run the child in `root` and hear its messages.

    Raises the AppError that the child names, LoadError for what is no message. When this task is cancelled, or `on_message`
    raises, the child's whole process group is killed before that goes on.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=root,
        env=env,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = asyncio.create_task(_keep_tail(process, tail))
    try:
        result = await _converse(process, on_message)
        await process.wait()
        await reader
    finally:
        await _end_group(process)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
    return Ended(result, process.returncode, list(tail))


async def _converse(process: asyncio.subprocess.Process, on_message: OnMessage) -> dict[str, Any] | None:
    assert process.stdout is not None and process.stdin is not None
    result = None
    while line := await process.stdout.readline():
        try:
            message = json.loads(line)
        except ValueError as error:
            raise LoadError("A child process sent something that is no message.", hint="Try again.") from error
        if "error" in message:
            raise error_from_wire(message["error"])
        if "done" in message:
            result = dict(message["done"])
            continue
        answer = on_message(message)
        if answer is not None:
            process.stdin.write(json.dumps({"value": await answer}).encode("ascii") + b"\n")
            await process.stdin.drain()
    return result


async def _keep_tail(process: asyncio.subprocess.Process, tail: deque[str]) -> None:
    """Keep the last lines of a child's stderr until it closes."""
    assert process.stderr is not None
    while chunk := await process.stderr.read(1 << 16):
        tail.extend(line for line in chunk.decode("utf-8", "replace").splitlines() if line.strip())


async def _end_group(process: asyncio.subprocess.Process) -> None:
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

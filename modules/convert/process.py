"""Run one step of a conversion in a child process of a loader's environment, and end it whatever happens.

The child (children/*.py) writes one JSON object per line to the descriptor that was its stdout: {"stage", "fraction"}, {"note"},
{"error": AppError.to_wire()} or {"done": {...}}. All else it or a library prints goes to stderr, whose tail explains a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules.child_process import end_group, keep_tail
from modules.errors import AppError, LoadError, LoadOutOfMemory, error_from_wire
from modules.schema import LoadProgress

OnProgress = Callable[[LoadProgress], None]
_LINE_LIMIT = 1 << 20
_TAIL_LINES = 40


async def run_child(
    python: Path, module: str, arguments: Sequence[str], env: dict[str, str], root: Path, on_progress: OnProgress
) -> tuple[dict[str, Any], list[str]]:
    """Run `python -m module`; return its result and notes.

    Raises the AppError the child names, LoadError when it ends without a result. When this task is cancelled, the child's
    whole process group is killed before the cancellation goes on.
    """
    process = await asyncio.create_subprocess_exec(
        str(python),
        "-m",
        module,
        *arguments,
        cwd=root,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = asyncio.create_task(keep_tail(process, tail))
    try:
        result, notes = await _read_messages(process, on_progress)
        await process.wait()
        await reader
    finally:
        await end_group(process)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
    if result is None:
        raise _ended(process.returncode, tail)
    return result, notes


async def _read_messages(process: asyncio.subprocess.Process, on_progress: OnProgress) -> tuple[dict[str, Any] | None, list[str]]:
    assert process.stdout is not None
    notes: list[str] = []
    result = None
    while line := await process.stdout.readline():
        try:
            message = json.loads(line)
        except ValueError as error:
            raise LoadError(
                "The converter's process sent something that is no message.", hint="Try again; report it if it stays."
            ) from error
        if "error" in message:
            raise error_from_wire(message["error"])
        if "stage" in message:
            on_progress(LoadProgress(str(message["stage"]), message.get("fraction")))
        if "note" in message:
            notes.append(str(message["note"]))
        if "done" in message:
            result = dict(message["done"])
    return result, notes


def _ended(code: int | None, tail: deque[str]) -> AppError:
    text = "\n".join(tail)
    last = tail[-1].strip() if tail else "it said nothing"
    detail = {"exit_code": code, "stderr": text[-8192:]}
    if code == -9 or "MemoryError" in text or "bad_alloc" in text or "can't allocate memory" in text:
        return LoadOutOfMemory(
            "The conversion ran out of memory.", hint="Close other programs or unload a model, then try again.", detail=detail
        )
    return LoadError(
        f"The conversion's process ended (exit status {code}): {last[:300]}",
        hint="Try again; report it if it stays.",
        detail=detail,
    )

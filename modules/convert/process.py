"""Run one step of a conversion in a child process of a loader's environment (`modules.child_process`).

What the children (children/*.py) say besides the end: {"stage", "fraction"} and {"note"}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules.child_process import Ended, run_job
from modules.errors import AppError, LoadError, LoadOutOfMemory, says_out_of_memory
from modules.schema import LoadProgress

OnProgress = Callable[[LoadProgress], None]


async def run_child(
    python: Path, module: str, arguments: Sequence[str], env: dict[str, str], root: Path, on_progress: OnProgress
) -> tuple[dict[str, Any], list[str]]:
    """Run `python -m module`; return its result and notes.

    Raises the AppError the child names, LoadError when it ends without a result. When this task is cancelled, the child's
    whole process group is killed before the cancellation goes on.
    """
    notes: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if "stage" in message:
            on_progress(LoadProgress(str(message["stage"]), message.get("fraction")))
        if "note" in message:
            notes.append(str(message["note"]))

    ended = await run_job([str(python), "-m", module, *arguments], env, root, hear)
    if ended.result is None:
        raise _failure(ended)
    return ended.result, notes


def _failure(ended: Ended) -> AppError:
    text = "\n".join(ended.stderr)
    if ended.exit_code == -9 or says_out_of_memory(text):
        return LoadOutOfMemory(
            "The conversion ran out of memory.",
            hint="Close other programs or unload a model, then try again.",
            detail=ended.detail,
        )
    return LoadError(
        f"The conversion's process ended (exit status {ended.exit_code}): {ended.last_words}",
        hint="Try again; report it if it stays.",
        detail=ended.detail,
    )

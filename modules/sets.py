"""Sets of environments: making one, the current one, and the lock that lets one installer at a time work on it.

Standard library only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from modules.overlays import installer_dir, read_json, state_path, write_json
from modules.pip_output import SetupError


@contextlib.contextmanager
def set_lock(set_dir: Path, wait_s: float = 20.0) -> Iterator[int | None]:
    """Hold a set's lock: the kernel drops it with the process, killed or not. Yields its descriptor (None on Windows).

    Children inherit it: an orphaned pip still holds it, and the next installer waits for its end.
    """
    set_dir.mkdir(parents=True, exist_ok=True)
    path = set_dir / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise SetupError(f"Another set-up is running in this folder: wait for its end, or remove {path} when none is.")
            time.sleep(0.2)
        try:
            yield None if sys.platform == "win32" else file.fileno()
        finally:
            _unlock(file)


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unlock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def new_set(root: Path) -> Path:
    """An empty set with a name of its own."""
    sets = installer_dir(root) / "sets"
    base = f"{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        path = sets / (base + suffix)
        if not path.exists():
            path.mkdir(parents=True)
            write_json(path / "set.json", {"made": datetime.now().isoformat(timespec="seconds"), "root": str(root)})
            return path
    raise SetupError(f"{sets} can't take another set.")


def open_set(root: Path) -> Path:
    """The current set; one that was begun and not finished is taken up again, else a new one is begun."""
    state = read_json(state_path(root))
    path = installer_dir(root) / "sets" / str(state.get("current") or "")
    if state.get("current") and read_json(path / "set.json"):
        return path
    path = new_set(root)
    write_json(state_path(root), {**state, "current": path.name})
    return path

"""How much memory there is, is free, and is ours. Bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    limit = _cgroup_limit()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def available_bytes() -> int:
    """What can be used without swapping, inside the container's limit."""
    free = int(psutil.virtual_memory().available)
    limit = _cgroup_limit()
    used = _cgroup_used()
    return free if limit is None or used is None else max(0, min(free, limit - used))


def process_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _cgroup_limit() -> int | None:
    return _read_number(_CGROUP / "memory.max") or _read_number(_CGROUP / "memory" / "memory.limit_in_bytes")


def _cgroup_used() -> int | None:
    """Memory charged to the container without the page cache, which the kernel gives back by itself."""
    used = _read_number(_CGROUP / "memory.current") or _read_number(_CGROUP / "memory" / "memory.usage_in_bytes")
    if used is None:
        return None
    for stat in (_CGROUP / "memory.stat", _CGROUP / "memory" / "memory.stat"):
        if stat.is_file():
            for line in stat.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name in ("inactive_file", "active_file"):
                    used -= int(value)
            break
    return max(0, used)


def _read_number(path: Path) -> int | None:
    if sys.platform != "linux" or not path.is_file():
        return None
    text = path.read_text(encoding="ascii").strip()
    value = int(text) if text.isdigit() else None
    return None if value is None or value > 1 << 60 else value

"""This machine as the planner sees it: memory, GPUs, disk, cores, vector instructions, and how fast memory is read.

The bandwidth is measured on three occasions, in a fraction of a second each, and the best is kept in the user's data folder;
everything else is asked each time.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from modules.memory import available_bytes, total_bytes
from modules.overlays import read_json, write_json
from modules.plan.types import MIB, Gpu, Machine

FILE = "machine.json"
OCCASIONS = 3
_BLOCK = 16 * MIB
_ROUNDS = 8
_SMI_TIMEOUT_S = 20
_SETS = ("amx_int8", "amx_tile", "amx_bf16", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "f16c", "asimd", "sve")


def this_machine(disk: Path, user_data: Path | None = None, *, freed_bytes: int = 0, bandwidth: bool = True) -> Machine:
    """The machine now. `freed_bytes` is what unloading the models in memory would give back; `disk` the folder that models are
    written to. `bandwidth` False asks for no speed that is not known already."""
    total = total_bytes()
    return Machine(
        ram_bytes=total,
        ram_available_bytes=min(available_bytes() + freed_bytes, total),
        cores=usable_cores(),
        gpus=gpus(),
        disk_free_bytes=_free(disk),
        instructions=instruction_sets(),
        bandwidth=known_bandwidth(user_data, measure=bandwidth),
        platform=sys.platform,
    )


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_sets() -> tuple[str, ...]:
    """The vector instructions that matter here, by Linux's names; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ("asimd",) if platform.machine() == "arm64" else ()
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return tuple(name for name in _SETS if name in flags)


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA's cards, by its own tool; empty without one. A driver that hangs counts as none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout) if done.returncode == 0 else ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """nvidia-smi's lines "name, total MiB, free MiB"; what is no such line is left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            found.append(Gpu(parts[0], int(parts[1]) * MIB, int(parts[2]) * MIB))
    return tuple(found)


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- bandwidth ---------------------------------------------------------------------------------------------------


def known_bandwidth(user_data: Path | None, *, measure: bool = True) -> float | None:
    """Bytes a second: the best of the first OCCASIONS on which it was asked for, kept for this processor, as the first may have
    fallen into a busy moment. None where it is not known and may not be measured."""
    key = f"{platform.machine()}, {usable_cores()} cores, {'+'.join(instruction_sets())}"
    path = user_data / FILE if user_data is not None else None
    kept = read_json(path) if path is not None else {}
    value, times = kept.get("bandwidth"), kept.get("occasions")
    known = kept.get("processor") == key and isinstance(value, (int, float)) and 0 < value < 1e14
    before = float(value) if known and isinstance(value, (int, float)) else None
    if not measure or (before is not None and isinstance(times, int) and times >= OCCASIONS):
        return before
    found = max(measure_bandwidth(), before or 0.0)
    if path is not None:
        times = times + 1 if before is not None and isinstance(times, int) else 1
        try:
            write_json(path, {"processor": key, "bandwidth": round(found), "occasions": times})
        except OSError:  # a data folder that can't be written: measured again next time
            return found
    return found


def measure_bandwidth() -> float:
    """Bytes of memory read per second by all cores together: equal blocks, larger than the caches, compared by the C library,
    which reads both and writes nothing. The best of some rounds: another program can only make it slower."""
    workers = min(usable_cores(), 8)
    blocks = [(ctypes.create_string_buffer(_BLOCK), ctypes.create_string_buffer(_BLOCK)) for _ in range(workers)]
    for pair in blocks:  # pages are given at the first write
        for block in pair:
            ctypes.memset(block, 1, _BLOCK)
    compare = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    best = 0.0
    for _ in range(_ROUNDS):
        threads = [threading.Thread(target=compare, args=(*map(ctypes.addressof, pair), _BLOCK), daemon=True) for pair in blocks]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, 2 * workers * _BLOCK / (time.perf_counter() - started))
    return best

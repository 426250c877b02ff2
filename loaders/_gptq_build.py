"""Compiles the GPTQ kernel for this processor on first need, tries it in a child process, and loads it.

The library's name holds a hash of sources, flags, compiler and processor: a change of any of them makes a new one. It gets
that name only after `_gptq_check` has passed on it in a process of its own, since a miscompiled kernel may crash. Everything that
can't be had (no compiler, a compiler that fails, a full disk) is a sentence in `Kernel.problem`; torch's own int4 op serves then.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modules.llamacpp_build import Compiler, compiler_help, find_compiler, machine_key
from modules.overlays import installer_dir

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("_gptq_kernel.c", "_gptq_decoder.c")
_HEADER = "_gptq_kernel.h"
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-w", "-fPIC", "-shared")
_TIMEOUT_S = 300
_KEPT = 4


@dataclass(frozen=True)
class Kernel:
    """`library` is None where there is no kernel; `problem` says why, with what to do about it."""

    library: ctypes.CDLL | None
    instructions: str = ""
    problem: str = ""


def kernel(say: Callable[[str], None] = lambda _: None) -> Kernel:
    """The kernel of this machine, built when it is not there yet. Never raises; `say` hears of a build that begins.

    Found once for a process.
    """
    if not _found:
        _found.append(_find(say))
    return _found[0]


_found: list[Kernel] = []


def _find(say: Callable[[str], None]) -> Kernel:
    if os.environ.get("SWITCHYARD_GPTQ_KERNEL") == "0":
        return Kernel(None, problem="the kernel is switched off by SWITCHYARD_GPTQ_KERNEL=0")
    if sys.platform == "win32":
        return Kernel(None, problem="the compiled kernel is for Linux and macOS")
    compiler = find_compiler()
    if compiler is None:
        return Kernel(None, problem=f"there is no C compiler for the fast kernel; get one ({compiler_help()}) and load again")
    reasons = []
    for folder in _folders():
        try:
            return _open(_built(compiler, folder, say))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
        except _Failed as error:
            return Kernel(None, problem=f"the fast kernel could not be built: {error}")
    return Kernel(None, problem=f"the fast kernel could not be kept ({'; '.join(reasons)})")


class _Failed(Exception):
    """The compiler or the trial said no, in one line."""


def _folders() -> Iterator[Path]:
    """Where compiled kernels live: beside the environments, or with the user's cache where that can't be written."""
    named = os.environ.get("SWITCHYARD_KERNELS")
    if named:
        yield Path(named)
        return
    yield installer_dir(ROOT) / "kernels"
    base = Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path.home() / ".cache"
    yield Path(os.environ.get("XDG_CACHE_HOME") or base) / "switchyard" / "kernels"


def _built(compiler: Compiler, folder: Path, say: Callable[[str], None]) -> Path:
    target = folder / f"gptq-{_key(compiler)}.so"
    if target.is_file():
        return target
    say("Compiling the kernel for this processor (once)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as staging:
        made = Path(staging) / target.name
        failure = ""
        for native in _native_flags():
            status, text = _run([compiler.path, *_FLAGS, *native, *_paths(), "-o", str(made), "-lm"])
            failure = failure or text
            if status == 0:
                break
        else:
            raise _Failed(_first_error(failure))
        status, text = _run([sys.executable, "-m", "loaders._gptq_check", str(made)], cwd=ROOT)
        if status:
            raise _Failed(f"it failed its trial ({f'signal {-status}' if status < 0 else _last_line(text)})")
        os.replace(made, target)
    _forget_old(folder, target)
    return target


def _key(compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for name in (_HEADER, *SOURCES, "_gptq_check.py"):
        digest.update((ROOT / "loaders" / name).read_bytes())
    digest.update(repr((compiler, _FLAGS, list(_native_flags()), machine_key(), platform.machine())).encode())
    return digest.hexdigest()[:16]


def _native_flags() -> Iterator[list[str]]:
    """For this very processor, else for any of its kind."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        yield ["-mcpu=native"]
    else:
        yield ["-march=native"]
    yield []


def _paths() -> list[str]:
    """The sources; a C++ compiler takes each for C only when told before each."""
    return [word for name in SOURCES for word in ("-x", "c", str(ROOT / "loaders" / name))] + ["-x", "none"]


def _run(command: list[str], cwd: Path | None = None) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"{Path(command[0]).name} took over {_TIMEOUT_S} s"
    return done.returncode, done.stdout.decode("utf-8", "replace")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "the compiler said no more")[:300]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


def _forget_old(folder: Path, keep: Path) -> None:
    """Kernels of older versions go, the newest few stay; build folders that a kill left go after an hour."""
    made = sorted(folder.glob("gptq-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in made[_KEPT:]:
        if path != keep:
            path.unlink(missing_ok=True)
    for left in folder.glob(".build-*"):
        if time.time() - left.stat().st_mtime > 3600:
            for path in left.iterdir():
                path.unlink(missing_ok=True)
            left.rmdir()


def _open(path: Path) -> Kernel:
    library = load_library(path)
    library.gptq_use_threads(_gomp_parallel())
    return Kernel(library, str(library.gptq_instructions().decode()))


def load_library(path: Path) -> ctypes.CDLL:
    """The compiled library with its functions' types set."""
    library = ctypes.CDLL(str(path))
    library.gptq_use_threads.argtypes = [ctypes.c_void_p]
    library.gptq_use_threads.restype = None
    library.gptq_instructions.restype = ctypes.c_char_p
    library.gptq_linear.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    library.gptq_linear.restype = ctypes.c_int
    library.gptq_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *3 * (ctypes.c_int,), ctypes.c_void_p]
    library.gptq_step.restype = ctypes.c_int
    return library


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; None where it has none (one thread then)."""
    import torch

    base = Path(torch.__file__).parent
    for pattern in ("lib/lib*omp*", "../torch.libs/lib*omp*"):
        for path in sorted(base.glob(pattern)):
            if path.name.startswith(("libgomp", "libomp", "libiomp")):
                try:
                    # torch is imported: this names the runtime that is loaded already, no second one
                    return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
                except (OSError, AttributeError):
                    continue
    return None

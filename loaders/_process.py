"""What a loader can say about its own process, and ask of its memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

_M_MMAP_THRESHOLD = -3


def peak_memory() -> int | None:
    """The most main memory this process has held so far, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_at_once() -> None:
    """From now on glibc returns every large block when it is freed. Else it keeps some, between those that stay."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """`give_back_at_once` for a while: a model of 0.6 GB that is unpacked layer by layer would hold 1.9."""
    give_back_at_once()
    try:
        yield
    finally:
        libc = _glibc()
        if libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None

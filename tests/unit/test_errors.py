"""Which exceptions mean that memory ran out, whoever raised them."""

from __future__ import annotations

import errno

import pytest

from modules.errors import LoadOutOfMemory, error_from_wire, is_out_of_memory


class OutOfMemoryError(RuntimeError):
    """torch's, by name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA: see above"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        Exception("Error while serializing: I/O error: Cannot allocate memory (os error 12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("memory of the conversation"), RuntimeError("")]
)
def test_another_failure(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_out_of_memory_crosses_the_wire_as_itself() -> None:
    assert type(error_from_wire(LoadOutOfMemory("The memory ran out.").to_wire())) is LoadOutOfMemory

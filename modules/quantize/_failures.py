"""The product's error for what Python and torch raise while a model is quantised. Standard library only."""

from __future__ import annotations

import errno

from modules.errors import AppError, LoadError, LoadOutOfMemory, StorageError, StorageFull, is_out_of_memory, one_line


def typed(error: Exception) -> AppError:
    """The product's error for what Python and torch raise."""
    if is_out_of_memory(error):
        return LoadOutOfMemory(
            "The memory ran out.",
            hint="Run the same command again to go on from the last finished block, with less --nsamples or --seqlen.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            "The disk is full.", hint="Make room and run the same command again: it goes on from the last finished block."
        )
    if isinstance(error, OSError):
        return StorageError(
            f"A file could not be read or written: {error.strerror or error}.", hint="Check disk and permissions."
        )
    return LoadError(f"Quantising failed: {one_line(error)}.", hint="Report it with the log if it stays.")

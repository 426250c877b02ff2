"""Write an OPT's tensors as FlexGen's arrays, in the FlexGen environment (it has NumPy).

    python -m modules.convert.children.hf_to_flexgen SOURCE OUT DTYPE

One file per tensor, each written beside its name, flushed, checked and renamed, so that a name holds a whole array or nothing;
what is there already and equals the source is kept, so that a conversion goes on where it stopped. float16 or float32.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.convert.children.report import Report
from modules.errors import AppError, IncompatibleModel, StorageFull

Stage = Callable[[str, "float | None"], None]
_PART_ELEMENTS = 1 << 22


def main() -> int:
    report = Report()
    source, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    try:
        report.stage("Starting")
        count, kept = convert(source, out, dtype, report.stage)
    except AppError as error:
        report.error(error)
        return 1
    report.done(tensors=count, kept=kept)
    return 0


def convert(source: Path, out: Path, dtype: str, stage: Stage) -> tuple[int, int]:
    """(tensors, how many of them were there already). Raises LoadError's subclasses and StorageFull."""
    from modules.opt_weights import open_weights

    weights = open_weights(source)
    out.mkdir(parents=True, exist_ok=True)
    names = list(weights.shape.tensors())
    kept = 0
    for number, name in enumerate(names):
        stage("Writing arrays", number / len(names))
        kept += _write(out / name, weights.array(name), dtype)
    return len(names), kept


def _write(path: Path, values: Any, dtype: str) -> bool:
    """Write one array, unless the file holds it already. Whether it did."""
    import numpy as np

    if path.is_file() and _holds(path, values, dtype):
        return True
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": values.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for piece in _pieces(values, dtype, path.name):
                file.write(piece.tobytes())
            file.flush()
            os.fsync(file.fileno())
        if not _holds(part, values, dtype):
            raise OSError(errno.EIO, "what was written does not read back")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(
                f"The disk is full: {path.name} could not be written.",
                hint="Free some space and run the same command again: it goes on with the arrays that are missing.",
            ) from error
        raise
    return False


def _holds(path: Path, values: Any, dtype: str) -> bool:
    """Whether the file is this array, in this format, value for value."""
    import numpy as np

    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    if stored.dtype != np.dtype(dtype) or stored.shape != values.shape:
        return False
    flat, start = stored.reshape(-1), 0
    for piece in _pieces(values, dtype, path.name):
        if not np.array_equal(flat[start : start + piece.size], piece, equal_nan=True):
            return False
        start += piece.size
    return True


def _pieces(values: Any, dtype: str, name: str) -> Any:
    """The values in order, in the wanted format, some MiB at a time."""
    import numpy as np

    flat = values.reshape(-1)
    for start in range(0, flat.size, _PART_ELEMENTS):
        given = flat[start : start + _PART_ELEMENTS]
        with np.errstate(over="ignore"):
            piece = given.astype(dtype)
        if np.isinf(piece).any() and not np.isinf(given).any():
            raise IncompatibleModel(f"{name} has values too large for float16.", hint="Convert with --type F32.")
        yield piece


if __name__ == "__main__":
    sys.exit(main())

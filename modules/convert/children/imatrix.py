"""An importance matrix file as the array llama_model_quantize takes: per tensor, the mean squared activation of each column.

Two layouts are in use, both written by llama.cpp's imatrix tool. GGUF: tensors `NAME.in_sum2` [columns, experts] and
`NAME.counts` [1, experts], f32. The older one: i32 entries, then for each i32 length, name, i32 calls, i32 values, f32 sums.
"""

from __future__ import annotations

import array
import ctypes
import math
import struct
import sys
from pathlib import Path
from typing import Any

from modules.detect.gguf_header import read_gguf_header
from modules.errors import CorruptModel

_MAX_ENTRIES = 100_000
_MAX_BYTES = 2_000_000_000


def load_imatrix(lib: Any, path: Path) -> tuple[Any, Any]:
    """(objects to keep alive, pointer for params.imatrix). Raises CorruptModel."""
    values = read_imatrix(path)
    rows = (lib.llama_model_imatrix_data * (len(values) + 1))()  # a null name ends it
    keep: list[Any] = [rows]
    for row, (name, numbers) in zip(rows, values.items(), strict=False):
        data = (ctypes.c_float * len(numbers)).from_buffer(numbers)
        keep.append(data)
        row.name = name.encode("utf-8")
        row.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
        row.size = len(numbers)
    return keep, ctypes.cast(rows, ctypes.POINTER(lib.llama_model_imatrix_data))


def read_imatrix(path: Path) -> dict[str, array.array[float]]:
    """Tensor name -> means as f32. Raises CorruptModel."""
    if path.stat().st_size > _MAX_BYTES:
        raise _broken(path, "it is larger than any importance matrix")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    try:
        found = _from_gguf(path) if is_gguf else _from_old(path)
    except (struct.error, ValueError, IndexError) as error:
        raise _broken(path, str(error)) from error
    if not found:
        raise _broken(path, "it holds no tensors")
    for name, values in found.items():
        if not all(math.isfinite(value) for value in values):
            raise _broken(path, f"the values of {name} are not finite")
    return found


def _from_gguf(path: Path) -> dict[str, array.array[float]]:
    header = read_gguf_header(path)
    found = {}
    with path.open("rb") as file:

        def floats(key: str) -> array.array[float]:
            tensor = header.tensors[key]
            if tensor.type != "F32":
                raise ValueError(f"{key} is {tensor.type}, not F32")
            file.seek(header.data_offset + tensor.offset)
            return _f32(file.read(tensor.size_bytes))

        for key in header.tensors:
            name = key.removesuffix(".in_sum2")
            if name != key and f"{name}.counts" in header.tensors:
                sums, counts = floats(key), floats(f"{name}.counts")
                width = len(sums) // max(1, len(counts))
                # An expert that saw no token says nothing: all its columns weigh the same.
                means = (sums[i] / counts[i // width] if counts[i // width] > 0 else 1.0 for i in range(width * len(counts)))
                found[name] = array.array("f", means)
    return found


def _from_old(path: Path) -> dict[str, array.array[float]]:
    raw = path.read_bytes()
    (entries,) = struct.unpack_from("<i", raw, 0)
    if not 0 < entries <= _MAX_ENTRIES:
        raise ValueError(f"it claims {entries} entries")
    found = {}
    at = 4
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", raw, at)
        at += 4
        if not 0 < length < 1024:
            raise ValueError(f"a name claims {length} bytes")
        name = raw[at : at + length].decode("utf-8")
        at += length
        calls, count = struct.unpack_from("<ii", raw, at)
        at += 8
        if count <= 0 or at + 4 * count > len(raw):
            raise ValueError(f"the values of {name} lie past the end")
        values = _f32(raw[at : at + 4 * count])
        at += 4 * count
        found[name] = array.array("f", (value / calls for value in values)) if calls > 0 else values
    return found


def _f32(raw: bytes) -> array.array[float]:
    values = array.array("f")
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _broken(path: Path, reason: str) -> CorruptModel:
    return CorruptModel(
        f"{path.name} is no usable importance matrix: {reason}.", hint="Make it again with llama.cpp's imatrix tool."
    )

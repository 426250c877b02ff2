"""A GGUF writer of sixty lines, for tests that need a small adapter, a tiny model or a broken file."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_U32, _I32, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_PACK = {_U32: "<I", _I32: "<i", _FLOAT: "<f", _BOOL: "<?"}
_ALIGNMENT = 32


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _plain(kind: int, value: object) -> bytes:
    return _string(str(value)) if kind == _STRING else struct.pack(_PACK[kind], value)


def _kind(value: object, integer: int) -> int:
    return {str: _STRING, bool: _BOOL, int: integer, float: _FLOAT}[type(value)]


def _value(value: Value) -> bytes:
    """Its type and the value; integers are u32, in arrays i32. An empty array counts as one of strings."""
    if isinstance(value, (str, bool, int, float)):
        kind = _kind(value, _U32)
        return struct.pack("<I", kind) + _plain(kind, value)
    kind = _kind(value[0], _I32) if value else _STRING
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_plain(kind, item) for item in value)


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[tuple[int, ...], Sequence[float]]]) -> None:
    """float32 tensors are given as (shape in ggml's order, values)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    data = b""
    for name, (shape, values) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", 0, len(data))
        data += array("f", values).tobytes()
        data += b"\0" * (-len(data) % _ALIGNMENT)
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + data)

"""A GGUF writer of forty lines, for tests that need a small adapter or a broken file."""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_STRING, _FLOAT = 8, 6
_ALIGNMENT = 32


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def write_gguf(path: Path, metadata: dict[str, str | float], tensors: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    """Strings and floats as metadata; float32 tensors given as (shape in ggml's order, values)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        body = struct.pack("<I", _STRING) + _string(value) if isinstance(value, str) else struct.pack("<If", _FLOAT, value)
        head += _string(key) + body
    data = b""
    for name, (shape, values) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", 0, len(data))
        data += array("f", values).tobytes()
        data += b"\0" * (-len(data) % _ALIGNMENT)
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + data)

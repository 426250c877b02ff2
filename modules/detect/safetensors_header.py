"""Check a safetensors file before any library opens it, from its header alone.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the data. The JSON maps each tensor's name to
{"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the header; "__metadata__" maps strings to
strings. The tensors must cover the data exactly: no hole, no overlap, nothing after the last.
Source: the format's description in the safetensors project.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modules.errors import CorruptModel

# The library reads headers up to 100 MB, but the largest in use are under 10 MB, and the parent process must stay small.
FORMAT_LIMIT = 100_000_000
HEADER_LIMIT = 32_000_000
MAX_TENSORS = 250_000
_MAX_ENTRY = 4096
_MAX_METADATA = 8_000_000

# Bits per element. https://docs.rs/safetensors names these; F4 and F6 are packed, so their totals must fill whole bytes.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = r"(?:0|[1-9]\d{0,17})"
# One entry as every library writes it, with what leads to the next. Anything else goes the strict, slower way.
_USUAL = re.compile(
    rf'"(?!__metadata__")([^"\\\x00-\x1f]{{1,512}})": ?'
    rf'\{{"dtype": ?"(\w{{1,16}})", ?"shape": ?\[((?:{_NUMBER}(?:, ?{_NUMBER}){{0,63}})?)\], ?'
    rf'"data_offsets": ?\[({_NUMBER}), ?({_NUMBER})\]\}},[ \t\r\n]*',
    re.ASCII,
)


class Tensor(NamedTuple):
    """One tensor's entry. `begin` and `end` are byte offsets into the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header that passed every check."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of the file at `path`.

    Raises CorruptModel, naming the first tensor that is wrong, and OSError when the file can't be read. No more than
    the header is read.
    """
    name = path.name
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size < 8:
            raise incomplete(name, size, None)
        length = int.from_bytes(file.read(8), "little")
        if length == 0:
            raise _broken(name, "its header is empty")
        if length > FORMAT_LIMIT:
            raise _broken(name, f"its header claims {length:,} bytes, more than the format allows")
        if 8 + length > size:
            raise incomplete(name, size, 8 + length, at_least=True)
        if length > HEADER_LIMIT:
            raise _broken(name, f"its header of {length:,} bytes is larger than any known model's")
        raw = file.read(length)
    if raw[:1] != b"{":
        raise _broken(name, "its header is no JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(name, "its header is no UTF-8 text") from error
    del raw
    tensors, metadata = _Entries(name, text).read()
    _check_layout(name, tensors, size - 8 - length, size)
    return SafetensorsHeader(tensors, metadata, size)


def incomplete(name: str, size: int, expected: int | None, *, at_least: bool = False) -> CorruptModel:
    """The error for a file that ends too early."""
    of = "" if expected is None else f" of {'at least ' if at_least else ''}{expected:,} bytes"
    shown = f"{size:,}{of or ' bytes'}"
    return CorruptModel(
        f"{name}: file incomplete: {shown}.",
        hint="The download or copy did not finish: fetch the file again (`server.py download` resumes and checks it).",
        detail={"size": size, "expected": expected},
    )


def _broken(name: str, reason: str) -> CorruptModel:
    return CorruptModel(f"{name} is damaged: {reason}.", hint="Fetch the file again, or convert the original model again.")


class _Entries:
    """A strict reader of the header's flat JSON, one entry at a time, so that a hostile one can't blow up memory."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.at = 1  # after "{"
        self.decoder = json.JSONDecoder(object_pairs_hook=self._no_duplicates, parse_constant=self._no_constant)

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] | None = None
        self._space()
        if self._peek() == "}":
            self.at += 1
        else:
            while True:
                self._usual(tensors)
                key = self._key()
                if key == "__metadata__":
                    if metadata is not None:
                        raise _broken(self.name, "its metadata appears twice")
                    metadata = self._metadata()
                elif key in tensors:
                    raise _broken(self.name, f"tensor {shown(key)} appears twice")
                else:
                    tensors[key] = self._tensor(key)
                    if len(tensors) > MAX_TENSORS:
                        raise _broken(self.name, f"it lists more than {MAX_TENSORS:,} tensors")
                self._space()
                following = self._peek()
                self.at += 1
                if following == "}":
                    break
                if following != ",":
                    raise _broken(self.name, f"its header is no JSON after {shown(key)}")
                self._space()
        if self.text[self.at :].strip(" \t\r\n\0"):
            raise _broken(self.name, "its header goes on after the closing brace")
        return tensors, metadata or {}

    def _usual(self, tensors: dict[str, Tensor]) -> None:
        """Take the entries from here on that are written as usual and right; what is wrong with the next is the strict way's to
        say. Numbers of up to 18 digits that agree overflow nothing."""
        text, at, match = self.text, self.at, _USUAL.match
        while (found := match(text, at)) and len(tensors) < MAX_TENSORS:
            key, dtype, sides, begins, ends = found.groups()
            bits = DTYPE_BITS.get(dtype)
            shape = tuple(map(int, sides.split(","))) if sides else ()
            begin, end = int(begins), int(ends)
            if bits is None or math.prod(shape) * bits != 8 * (end - begin) or key in tensors:
                break
            tensors[key] = Tensor(dtype, shape, begin, end)
            at = found.end()
        self.at = at

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _key(self) -> str:
        if self._peek() != '"':
            raise _broken(self.name, "its header is no JSON")
        key = self._value(_MAX_ENTRY, "a tensor's name")
        self._space()
        if self._peek() != ":":
            raise _broken(self.name, "its header is no JSON")
        self.at += 1
        self._space()
        return str(key)

    def _value(self, limit: int, what: str) -> Any:
        # A window bounds both the work and the memory of one entry; a longer value is cut, and so no JSON.
        window = self.text[self.at : self.at + limit]
        try:
            value, end = self.decoder.raw_decode(window)
        except (ValueError, RecursionError) as error:
            raise _broken(self.name, f"{what} is no valid JSON or too long") from error
        self.at += end
        return value

    def _metadata(self) -> dict[str, str]:
        value = self._value(_MAX_METADATA, "its metadata")
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise _broken(self.name, "its metadata is not a map of strings")
        return value

    def _tensor(self, key: str) -> Tensor:
        label = shown(key)
        value = self._value(_MAX_ENTRY, f"tensor {label}")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise _broken(self.name, f"tensor {label} does not have exactly dtype, shape and data_offsets")
        return self._checked(label, value["dtype"], value["shape"], value["data_offsets"])

    def _checked(self, label: str, dtype: Any, shape: Any, offsets: Any) -> Tensor:
        bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
        if bits is None:
            raise _broken(self.name, f"tensor {label} has the unknown data type {shown(str(dtype))}")
        if not _naturals(shape) or len(shape) > 64:
            raise _broken(self.name, f"tensor {label} has an impossible shape")
        if not _naturals(offsets) or len(offsets) != 2:
            raise _broken(self.name, f"tensor {label} has impossible offsets")
        tensor = Tensor(dtype, tuple(shape), offsets[0], offsets[1])
        if tensor.end < tensor.begin:
            raise _broken(self.name, f"tensor {label} ends before it begins")
        total_bits = tensor.elements * bits
        if tensor.elements >= 2**63 or total_bits >= 2**66:
            raise _broken(self.name, f"tensor {label} has a shape whose size overflows")
        if total_bits != 8 * (tensor.end - tensor.begin):
            raise _broken(
                self.name,
                f"tensor {label} of {dtype} {list(shape)} needs {-(-total_bits // 8):,} bytes, its offsets span "
                f"{tensor.end - tensor.begin:,}",
            )
        return tensor

    def _no_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def _no_constant(self, text: str) -> Any:
        raise ValueError(f"{text} is no JSON")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(name: str, tensors: dict[str, Tensor], data_bytes: int, size: int) -> None:
    """The tensors must cover the data from its first byte to its last, each byte once."""
    at = 0
    last = ""
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin > at:
            raise _broken(name, f"{tensor.begin - at:,} bytes before tensor {shown(key)} belong to no tensor")
        if tensor.begin < at:
            raise _broken(name, f"tensor {shown(key)} overlaps {shown(last)}")
        at, last = tensor.end, key
    if at > data_bytes:
        raise incomplete(name, size, size - data_bytes + at)
    if at < data_bytes:
        raise _broken(name, f"{data_bytes - at:,} bytes after the last tensor belong to no tensor")


def shown(name: str) -> str:
    """A name from a stranger's file, cut and with control characters escaped, fit for a message."""
    cut = name if len(name) <= 120 else name[:117] + "..."
    return cut if cut.isprintable() else ascii(cut)

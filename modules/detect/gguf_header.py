"""Check a GGUF file before llama.cpp's C++ opens it, from its header alone.

Layout (little-endian): "GGUF", u32 version, u64 tensor count, u64 key count; the keys (string, u32 type, value); the tensors'
entries (name, u32 dimensions, u64 each, u32 type, u64 offset into the data); padding to general.alignment; the data.
Source: docs/gguf.md of the ggml project. The rules are those of llama.cpp's own reader and a few stricter ones, so that what
passes here is not refused there for its structure, and what would overrun a buffer there never gets that far.

Memory: arrays are walked, never kept, and only a bounded amount of text is kept. Nothing is mapped: a file that shrinks
while it is read raises here instead of ending the process.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from modules.detect.ggml_types import TENSOR_TYPES
from modules.detect.safetensors_header import incomplete, shown
from modules.errors import CorruptModel, LoadError, UnknownFormat

Scalar = int | float | bool | str

MAX_KEYS = 65_536
MAX_TENSORS = 131_072
MAX_STRINGS = 6_000_000  # elements of all string arrays together; the largest vocabulary with its merges is under 1 million
MAX_KEPT_STRING = 65_536
MAX_KEPT_TOTAL = 4_000_000
MAX_NAME_BYTES = 63  # ggml keeps 64 bytes with the closing zero
MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_FIRST_KEYS = 64
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FORMATS = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's entry: `shape` fastest dimension first, `type` a ggml type's name, `offset` into the data section."""

    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A header that passed every check. `values` holds the scalars and shorter strings, `lengths` the arrays' lengths and
    the byte lengths of strings too long to keep."""

    version: int
    values: dict[str, Scalar] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    size_bytes: int = 0
    data_offset: int = 0

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) and value else None

    def integer(self, key: str) -> int | None:
        value = self.values.get(key)
        return value if type(value) is int else None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of the file at `path`.

    Raises CorruptModel or UnknownFormat, naming the first key or tensor that is wrong, and OSError when the file can't be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        return _Parser(_Cursor(file, size, path.name)).read()


def first_keys(path: Path) -> dict[str, Scalar]:
    """The scalars and strings before the tokenizer's, as far as they can be read: enough to tell what a file is, in a moment.

    Raises OSError only.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        parser = _Parser(_Cursor(file, size, path.name))
        try:
            return parser.first_keys()
        except LoadError:
            return parser.values


class _Cursor:
    """A position in a file, read in chunks; every read is checked against the file's size first."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file = file
        self.size = size
        self.name = name
        self.buffer = b""
        self.start = 0  # the file offset of buffer[0]
        self.at = 0  # within the buffer

    @property
    def offset(self) -> int:
        return self.start + self.at

    @property
    def left(self) -> int:
        return self.size - self.offset

    def take(self, count: int) -> bytes:
        """The next `count` bytes; the caller has bounded `count`."""
        if count > self.left:
            raise incomplete(self.name, self.size, self.offset + count, at_least=True)
        if self.at + count > len(self.buffer):
            self._fill(count)
        piece = self.buffer[self.at : self.at + count]
        self.at += count
        return piece

    def skip(self, count: int) -> None:
        if count > self.left:
            raise incomplete(self.name, self.size, self.offset + count, at_least=True)
        if self.at + count <= len(self.buffer):
            self.at += count
        else:
            self._move(self.offset + count)

    def skip_strings(self, count: int) -> None:
        """Walk `count` length-prefixed strings. The loop is the cost of listing a model, so it works on local names."""
        unpack = _U64.unpack_from
        while count:
            buffer, at, end = self.buffer, self.at, len(self.buffer) - 8
            while count and at <= end:
                after = at + 8 + unpack(buffer, at)[0]
                if after > end + 8:
                    break
                at = after
                count -= 1
            self.at = at
            if count:
                (length,) = _U64.unpack(self.take(8))
                self.skip(length)
                count -= 1

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def _move(self, offset: int) -> None:
        self.file.seek(offset)
        self.buffer, self.start, self.at = b"", offset, 0

    def _fill(self, count: int) -> None:
        rest = self.buffer[self.at :]
        self.start, self.at = self.offset, 0
        self.file.seek(self.start + len(rest))
        self.buffer = rest + self.file.read(max(_CHUNK, count - len(rest)))
        if len(self.buffer) < count:
            raise incomplete(self.name, self.start + len(self.buffer), self.start + count, at_least=True)


class _Parser:
    def __init__(self, cursor: _Cursor) -> None:
        self.cursor = cursor
        self.name = cursor.name
        self.values: dict[str, Scalar] = {}
        self.lengths: dict[str, int] = {}
        self.kept = 0
        self.strings = 0

    def _counts(self) -> tuple[int, int, int]:
        """(version, tensors, keys) that the file claims to have."""
        cursor = self.cursor
        if cursor.size == 0:
            raise incomplete(self.name, 0, None)
        magic = cursor.take(4)
        if magic != b"GGUF":
            raise self._broken(f"it begins with {magic.decode('latin-1')!a} instead of 'GGUF'")
        version = cursor.u32()
        if version not in (2, 3):
            raise self._unknown_version(version)
        tensor_count, key_count = cursor.u64(), cursor.u64()
        # A tensor's entry takes at least 24 bytes, a key's at least 13: a count beyond the file's size is a lie.
        if key_count > MAX_KEYS or key_count * 13 > cursor.left:
            raise self._broken(f"it claims {key_count:,} metadata keys")
        return version, tensor_count, key_count

    def first_keys(self) -> dict[str, Scalar]:
        _, _, key_count = self._counts()
        for _ in range(min(key_count, _FIRST_KEYS)):
            if self._key().startswith("tokenizer."):
                break
        return self.values

    def read(self) -> GgufHeader:
        cursor = self.cursor
        version, tensor_count, key_count = self._counts()
        for _ in range(key_count):
            self._key()
        if tensor_count > MAX_TENSORS or tensor_count * 24 > cursor.left:
            raise self._broken(f"it claims {tensor_count:,} tensors")
        alignment = self._alignment()
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for _ in range(tensor_count):
            key, tensor = self._tensor()
            if key in tensors:
                raise self._broken(f"tensor {shown(key)} appears twice")
            if tensor.offset != expected:
                raise self._broken(f"tensor {shown(key)} is at offset {tensor.offset:,}, where {expected:,} was expected")
            tensors[key] = tensor
            expected += _padded(tensor.size_bytes, alignment)
            if expected >= 2**63:
                raise self._broken(f"the sizes up to tensor {shown(key)} overflow")
        data_offset = _padded(cursor.offset, alignment)
        self._check_end(tensors, data_offset)
        return GgufHeader(version, self.values, self.lengths, tensors, cursor.size, data_offset)

    def _key(self) -> str:
        cursor = self.cursor
        length = cursor.u64()
        if not 0 < length <= 65_535:
            raise self._broken(f"a metadata key claims a name of {length:,} bytes")
        key = self._decode(cursor.take(length), "a metadata key")
        if key in self.values or key in self.lengths:
            raise self._broken(f"metadata key {shown(key)} appears twice")
        kind = cursor.u32()
        if kind in _FORMATS:
            form = _FORMATS[kind]
            raw = cursor.take(form.size)
            self.values[key] = form.unpack(raw)[0]
        elif kind == _STRING:
            self._string(key)
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._broken(f"metadata key {shown(key)} has the unknown type {kind}")
        return key

    def _string(self, key: str) -> None:
        cursor = self.cursor
        length = cursor.u64()
        if length > cursor.left:
            raise self._too_long(key, "string", length)
        if length <= MAX_KEPT_STRING and self.kept + length <= MAX_KEPT_TOTAL:
            self.values[key] = self._decode(cursor.take(length), f"metadata key {shown(key)}")
            self.kept += length
        else:
            cursor.skip(length)
            self.lengths[key] = length

    def _array(self, key: str) -> None:
        cursor = self.cursor
        kind, count = cursor.u32(), cursor.u64()
        if kind == _ARRAY:
            raise self._broken(f"metadata key {shown(key)} nests arrays")
        if kind != _STRING and kind not in _FORMATS:
            raise self._broken(f"metadata key {shown(key)} is an array of the unknown type {kind}")
        size = 8 if kind == _STRING else _FORMATS[kind].size
        if count * size > cursor.left:
            raise self._too_long(key, "array", count)
        self.lengths[key] = count
        if kind != _STRING:
            cursor.skip(count * size)
            return
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise self._too_long(key, "array", count)
        cursor.skip_strings(count)

    def _tensor(self) -> tuple[str, GgufTensor]:
        cursor = self.cursor
        length = cursor.u64()
        if not 0 < length <= MAX_NAME_BYTES:
            raise self._broken(f"a tensor claims a name of {length:,} bytes")
        key = self._decode(cursor.take(length), "a tensor's name")
        name = shown(key)
        dimensions = cursor.u32()
        if not 1 <= dimensions <= 4:
            raise self._broken(f"tensor {name} claims {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
        kind, offset = cursor.u32(), cursor.u64()
        known = TENSOR_TYPES.get(kind)
        if known is None:
            raise UnknownFormat(
                f"{self.name}: tensor {name} has the unknown type {kind}.",
                hint="The file is damaged, or made for a newer llama.cpp: update Switchyard, or get another quantization.",
            )
        type_name, block, block_bytes = known
        elements = 1
        for side in shape:
            if side == 0:
                raise self._broken(f"tensor {name} has no elements")
            elements *= side
        if elements >= 2**63:
            raise self._broken(f"tensor {name} has a shape whose size overflows")
        if shape[0] % block:
            raise self._broken(f"tensor {name}: rows of {shape[0]:,} don't divide into {type_name} blocks of {block}")
        return key, GgufTensor(shape, type_name, offset, elements // block * block_bytes)

    def _alignment(self) -> int:
        value = self.values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._broken(f"general.alignment is {value}, not a power of two from 8 to {MAX_ALIGNMENT}")
        return value

    def _check_end(self, tensors: dict[str, GgufTensor], data_offset: int) -> None:
        """The data must hold every tensor. The padding after the last one may be missing."""
        for key, tensor in tensors.items():
            if data_offset + tensor.offset + tensor.size_bytes > self.cursor.size:
                last = list(tensors.values())[-1]
                error = incomplete(self.name, self.cursor.size, data_offset + last.offset + last.size_bytes)
                error.message += f" The data of tensor {shown(key)} lies past the end."
                raise error

    def _decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(f"{what} is no UTF-8 text") from error

    def _too_long(self, key: str, what: str, count: int) -> CorruptModel:
        return self._broken(f"metadata key {shown(key)} claims {what} length {count:,}, more than the file or any model holds")

    def _broken(self, reason: str) -> CorruptModel:
        return CorruptModel(
            f"{self.name} is damaged: {reason}.", hint="Fetch the file again, or convert the original model again."
        )

    def _unknown_version(self, version: int) -> LoadError:
        if version == 1:
            return UnknownFormat(
                f"{self.name} is GGUF version 1, which llama.cpp no longer reads.",
                hint="Get a current GGUF of the model, or convert the original with `server.py convert MODEL --to gguf`.",
            )
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            return UnknownFormat(
                f"{self.name} is a GGUF for big-endian machines.", hint="Get the little-endian file of the same model."
            )
        return self._broken(f"its GGUF version is {version}")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

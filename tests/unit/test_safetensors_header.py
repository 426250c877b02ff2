"""The safetensors pre-check: truncated at every point, lying, hostile (catalogue B1, B2)."""

from __future__ import annotations

import json
import math
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.detect.safetensors_header import read_safetensors_header
from modules.errors import CorruptModel
from tests.unit.model_files import llama_tensors, safetensors_bytes, with_header

WHOLE = safetensors_bytes(
    {"a.weight": ("F32", (2, 3)), "b": ("F16", (4,)), "scalar": ("F32", ()), "none": ("F32", (0, 7))}, {"format": "pt"}
)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


def header(value: Any, data_bytes: int = 4) -> bytes:
    return with_header(value if isinstance(value, bytes) else json.dumps(value).encode(), data_bytes)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    found = read_safetensors_header(write(tmp_path, WHOLE))
    assert found.tensors["a.weight"].shape == (2, 3)
    assert found.tensors["b"].elements == 4
    assert found.tensors["scalar"].elements == 1
    assert found.tensors["none"].elements == 0
    assert found.metadata == {"format": "pt"}
    assert found.size_bytes == len(WHOLE)


def test_truncation_at_every_byte_is_seen(tmp_path: Path) -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(CorruptModel, match=rf"file incomplete: {length:,}( bytes| of)") as caught:
            read_safetensors_header(write(tmp_path, WHOLE[:length]))
        assert "download" in caught.value.hint
        if length > struct.unpack("<Q", WHOLE[:8])[0] + 8:
            assert f"{length:,} of {len(WHOLE):,} bytes" in caught.value.message


CASES: dict[str, tuple[bytes, str]] = {
    "header length 0": (struct.pack("<Q", 0) + b"{}", "empty"),
    "header length 2^63": (struct.pack("<Q", 2**63) + b"{}", "more than the format allows"),
    "header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "more than the format allows"),
    "no object": (header(b"[]      "), "no JSON object"),
    "space first": (header(b" {}"), "no JSON object"),
    "bad UTF-8": (header(b'{"\xff":1}'), "UTF-8"),
    "torn JSON": (header(b'{"a":{"dtype":"F32"'), "JSON"),
    "text after": (header(b"{} {}"), "goes on"),
    "two tensors of one name": (
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "tensor a appears twice",
    ),
    "one key twice": (
        header(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}'),
        "tensor a is no valid JSON",
    ),
    "metadata twice": (header(b'{"__metadata__":{},"__metadata__":{}}', 0), "twice"),
    "metadata of numbers": (header({"__metadata__": {"a": 1}}, 0), "map of strings"),
    "unknown type": (header({"a": entry("F31")}), "tensor a has the unknown data type F31"),
    "type no text": (header({"a": entry(7)}), "unknown data type"),
    "extra key": (header({"a": {**entry(), "x": 1}}), "exactly"),
    "tensor no object": (header({"a": 7}), "tensor a"),
    "end before begin": (header({"a": entry(offsets=(4, 0))}), "tensor a ends before it begins"),
    "negative offset": (header({"a": entry(offsets=(-4, 0))}), "tensor a has impossible offsets"),
    "negative side": (header({"a": entry(shape=(-1,))}), "tensor a has an impossible shape"),
    "true as a side": (header({"a": entry(shape=[True])}), "impossible shape"),
    "fractional side": (header({"a": entry(shape=[1.0])}), "impossible shape"),
    "three offsets": (header({"a": entry(offsets=(0, 4, 8))}), "impossible offsets"),
    "overflow": (header({"a": entry(shape=(2**62, 4))}), "tensor a has a shape whose size overflows"),
    "shape and offsets differ": (header({"a": entry(shape=(2,))}), r"tensor a of F32 \[2\] needs 8 bytes, its offsets span 4"),
    "overlap": (header({"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))}, 6), "tensor b overlaps a"),
    "hole": (header({"a": entry(offsets=(4, 8))}, 8), "4 bytes before tensor a belong to no tensor"),
    "bytes after the last": (header({"a": entry()}, 12), "8 bytes after the last tensor"),
    "NaN": (header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "tensor a"),
    "deep nesting": (header(b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"), "tensor a"),
    "endless name": (header(b'{"' + b"n" * 5000 + b'":1}'), "name"),
    "number of 5000 digits": (header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 3900 + b'],"data_offsets":[0,4]}}'), "tensor a"),
    "a name that would forge a log line": (header({"a\nb": entry("F31")}), r"tensor 'a\\nb'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_lying_header_is_refused_and_its_tensor_named(tmp_path: Path, name: str) -> None:
    data, message = CASES[name]
    with pytest.raises(CorruptModel, match=message) as caught:
        read_safetensors_header(write(tmp_path, data))
    assert caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def outcome(path: Path) -> object:
    try:
        return read_safetensors_header(path).tensors
    except CorruptModel as error:
        return error.message


_ENTRIES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(
        st.sampled_from(("F32", "U8", "F31")), st.lists(st.integers(-1, 3), max_size=2), st.integers(0, 9), st.integers(0, 9)
    ),
)


@given(_ENTRIES, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_the_quick_way_says_what_the_strict_one_says(
    tmp_path: Path, rows: dict[str, tuple[str, list[int], int, int]], fit: bool
) -> None:
    """Entries written as every library writes them are taken by a shorter way than others."""
    tensors, at = {}, 0
    for name, (kind, shape, begin, size) in rows.items():
        if fit:  # right up to here, so that a wrong one stands in the middle
            begin, size = at, math.prod(shape) * {"U8": 1}.get(kind, 4)
        tensors[name], at = entry(kind, shape, (begin, begin + size)), begin + size
    strict = json.dumps(tensors, separators=(" , ", " : ")).encode()
    quick = json.dumps(tensors).encode().ljust(len(strict))
    found = [outcome(write(tmp_path, with_header(text, max(at, 0)))) for text in (quick, strict)]
    assert found[0] == found[1]


def test_zero_size_tensors_may_share_an_offset(tmp_path: Path) -> None:
    data = header({"a": entry(shape=(0,), offsets=(0, 0)), "b": entry(shape=(0,), offsets=(0, 0)), "c": entry()})
    assert len(read_safetensors_header(write(tmp_path, data)).tensors) == 3


def test_a_large_header_is_quick_and_small(tmp_path: Path) -> None:
    """20,000 tensors, more than any single file in use holds."""
    path = write(
        tmp_path, safetensors_bytes({f"model.layers.{n}.mlp.experts.{n}.down_proj.weight": ("F32", (1,)) for n in range(20_000)})
    )
    started = time.process_time()
    assert len(read_safetensors_header(path).tensors) == 20_000
    assert time.process_time() - started < 2
    tracemalloc.start()
    read_safetensors_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_a_hostile_header_can_not_fill_the_memory(tmp_path: Path) -> None:
    """16 MB of `[[],[],[],...`, which json.loads would turn into 700 MB of lists."""
    path = write(tmp_path, header(b'{"a":[' + b"[]," * 5_400_000 + b"[]]}"))
    tracemalloc.start()
    with pytest.raises(CorruptModel):
        read_safetensors_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_mutated_bytes_never_raise_anything_else(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(safetensors_bytes(dict(list(llama_tensors().items())[:4]), {"a": "b"}))
    for at, value in changes:
        data[at % min(len(data), 700)] = value
    path = write(tmp_path, bytes(data[: cut % (2 * len(data))]))
    try:
        found = read_safetensors_header(path)
    except CorruptModel as error:
        assert error.hint
        return
    assert all(tensor.end <= path.stat().st_size for tensor in found.tensors.values())

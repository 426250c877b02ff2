"""The GGUF pre-check: what would crash or mislead llama.cpp never reaches it (catalogue B5)."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.detect import check, inspect
from modules.detect.gguf_header import read_gguf_header
from modules.errors import CorruptModel, IncompatibleModel, LoadError, UnknownFormat
from tests.unit.model_files import ARRAY, BOOL, F32, STRING, U32, U64, gguf_bytes, gguf_keys, gguf_tensors, text

WHOLE = gguf_bytes()


def write(tmp_path: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_a_whole_file_is_described(tmp_path: Path) -> None:
    files = check(write(tmp_path, WHOLE))
    assert (files.format, files.architecture, files.context_length, files.vocab_size) == ("gguf", "llama", 64, 4)
    assert files.parameters == 32 * 4 + 32 * 32 + 32
    assert files.has_chat_template
    assert files.quantization
    assert (files.quantization.method, files.quantization.bits) == ("F32", 32.0)


def test_truncation_is_seen_wherever_it_is(tmp_path: Path) -> None:
    for length in [*range(900), *range(900, len(WHOLE), 97)]:
        path = write(tmp_path, WHOLE[:length])
        with pytest.raises(CorruptModel) as caught:
            read_gguf_header(path)
        assert f"file incomplete: {length:,}" in caught.value.message or "claims" in caught.value.message


def test_one_byte_short_names_the_whole_size(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": ((32, 4), 0, 512)}
    data = gguf_bytes(tensors=tensors)
    with pytest.raises(CorruptModel, match=rf"{len(data) - 1:,} of {len(data):,} bytes.*token_embd.weight"):
        read_gguf_header(write(tmp_path, data[:-1]))


def raw_key(key: str, rest: bytes) -> bytes:
    """A file whose only key is `key`, with `rest` after its name."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(key) + rest + bytes(64)


def one_tensor(
    shape: tuple[int, ...], kind: int, size: int, *, offset: int = 0, dimensions: int | None = None, name: str = "t"
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("general.architecture") + struct.pack("<I", STRING) + text("llama")
    out += (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape) if dimensions is None else dimensions, *shape)
        + struct.pack("<IQ", kind, offset)
    )
    return out + bytes(-len(out) % 32) + bytes(size)


BROKEN: dict[str, tuple[bytes, str]] = {
    "bad magic": (b"FUGG" + WHOLE[4:], "instead of 'GGUF'"),
    "version 0": (gguf_bytes(version=0), "version is 0"),
    "version 99": (gguf_bytes(version=99), "version is 99"),
    "absurd key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64), "metadata keys"),
    "absurd tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0) + bytes(64), "tensors"),
    "string of 2^64-1": (raw_key("general.name", struct.pack("<IQ", STRING, 2**64 - 1)), "claims string length"),
    "array of 10^9": (raw_key("k", struct.pack("<IIQ", ARRAY, U32, 10**9)), "claims array length"),
    "strings 10^9": (raw_key("k", struct.pack("<IIQ", ARRAY, STRING, 10**9)), "claims array length"),
    "nested array": (raw_key("k", struct.pack("<IIQ", ARRAY, ARRAY, 1)), "nests arrays"),
    "unknown type": (raw_key("k", struct.pack("<I", 77)), "unknown type 77"),
    "array of unknown": (raw_key("k", struct.pack("<IIQ", ARRAY, 77, 1)), "unknown type 77"),
    "empty key": (raw_key("", struct.pack("<IB", 0, 1)), "claims a name of 0 bytes"),
    "key no UTF-8": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1) + bytes(64), "UTF-8"),
    "alignment 0": (gguf_bytes(gguf_keys(general__alignment=(U32, 0))), "general.alignment is 0"),
    "alignment 13": (gguf_bytes(gguf_keys(general__alignment=(U32, 13))), "general.alignment is 13"),
    "alignment 2^31": (gguf_bytes(gguf_keys(general__alignment=(U32, 2**31))), "general.alignment is 2147483648"),
    "alignment a text": (gguf_bytes(gguf_keys(general__alignment=(STRING, "32"))), "general.alignment"),
    "no dimensions": (one_tensor((), 0, 4), "tensor t claims 0 dimensions"),
    "5 dimensions": (one_tensor((1, 1, 1, 1, 1), 0, 4), "tensor t claims 5 dimensions"),
    "2^32-1 dimensions": (one_tensor((1,), 0, 4, dimensions=2**32 - 1), "claims 4294967295 dimensions"),
    "a side of 0": (one_tensor((0, 4), 0, 4), "tensor t has no elements"),
    "overflow": (one_tensor((2**40, 2**40), 0, 4), "tensor t has a shape whose size overflows"),
    "half a block": (one_tensor((33,), 2, 64), "tensor t: rows of 33 don't divide into Q4_0 blocks of 32"),
    "offset past the end": (one_tensor((8,), 0, 32, offset=4096), "tensor t is at offset 4,096"),
    "data past the end": (one_tensor((2**30,), 0, 32), "tensor t lies past the end"),
    "name of 64 bytes": (one_tensor((8,), 0, 32, name="n" * 64), "name of 64 bytes"),
    "block count 0": (gguf_bytes(gguf_keys(llama__block_count=(U32, 0))), "block_count is 0"),
    "block count negative as text": (gguf_bytes(gguf_keys(llama__block_count=(STRING, "-1"))), "block_count is -1"),
    "more blocks than tensors": (gguf_bytes(gguf_keys(llama__block_count=(U32, 3))), "no tensor of block 1"),
    "vocabulary empty": (gguf_bytes(gguf_keys(tokenizer__ggml__tokens=(ARRAY, (STRING, [])))), "vocabulary is empty"),
    "vocabulary missing": (gguf_bytes(gguf_keys(tokenizer__ggml__tokens=None)), "no vocabulary"),
    "bos outside": (gguf_bytes(gguf_keys(tokenizer__ggml__bos_token_id=(U32, 4))), "bos token id 4"),
    "context 0": (gguf_bytes(gguf_keys(llama__context_length=(U32, 0))), "context_length is 0"),
    "no architecture": (gguf_bytes(gguf_keys(general__architecture=None)), "does not name its architecture"),
    "embedding of another width": (
        gguf_bytes(gguf_keys(llama__embedding_length=(U32, 64))),
        "token_embd.weight is 4 x 32, its keys say 4 x 64",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_here(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    path = write(tmp_path, data)
    started = time.process_time()
    with pytest.raises(CorruptModel, match=message) as caught:
        check(path)
    assert time.process_time() - started < 1
    assert caught.value.hint
    assert inspect(path).problem == str(caught.value)


def test_two_keys_or_tensors_of_one_name(tmp_path: Path) -> None:
    key = text("a") + struct.pack("<IB", 0, 1)
    with pytest.raises(CorruptModel, match="key a appears twice"):
        read_gguf_header(write(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key + key + bytes(64)))
    tensor = text("t") + struct.pack("<IQIQ", 1, 8, 0, 0)
    with pytest.raises(CorruptModel, match="tensor t appears twice"):
        read_gguf_header(write(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensor + tensor + bytes(64)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_bytes(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (one_tensor((32,), 4, 64), "tensor t has the unknown type 4"),
        (b"lmgg" + bytes(100), "before GGUF"),
    ],
)
def test_formats_that_are_whole_but_not_read(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UnknownFormat, match=message):
        check(write(tmp_path, data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": (STRING, "clip"), "clip__has_vision_encoder": (BOOL, True)}, "multimodal projector"),
        ({"general__type": (STRING, "mmproj")}, "multimodal projector"),
        ({"general__type": (STRING, "imatrix")}, "importance matrix"),
        ({"general__type": (STRING, "imatrix"), "general__architecture": None}, "importance matrix"),
        ({"general__architecture": (STRING, "bert")}, "embedding model"),
        ({"general__type": (STRING, "adapter")}, "LoRA adapter"),
    ],
)
def test_files_that_are_no_chat_model_say_what_they_are(
    tmp_path: Path, changes: dict[str, tuple[int, object]], message: str
) -> None:
    with pytest.raises(IncompatibleModel, match=message):
        check(write(tmp_path, gguf_bytes(gguf_keys(**changes))))


def test_a_gguf_adapter_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, gguf_bytes(gguf_keys(general__type=(STRING, "adapter"))))
    assert check(path, adapter=True).format == "lora"


def test_encoder_decoder_names_and_absent_token_ids_are_fine(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": ((32, 4), 0, 512), "enc.blk.0.attn_q.weight": ((32, 32), 0, 4096)}
    keys = gguf_keys(tokenizer__ggml__bos_token_id=(U32, 2**32 - 1))
    assert check(write(tmp_path, gguf_bytes(keys, tensors))).problem is None


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModel, match="vocabulary without weights"):
        check(write(tmp_path, gguf_bytes(tensors={})))


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    def part(number: int) -> bytes:
        keys = gguf_keys(split__count=(U32, 2), split__no=(U32, number))
        return gguf_bytes(keys if number == 0 else {"general.architecture": (STRING, "llama"), "split.count": (U32, 2)})

    first = write(tmp_path, part(0), "m-00001-of-00002.gguf")
    with pytest.raises(CorruptModel, match=r"m-00002-of-00002.gguf .* is missing"):
        check(first)
    write(tmp_path, part(1), "m-00002-of-00002.gguf")
    files = check(first)
    assert files.files == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert files.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_real_sized_vocabulary_is_walked_quickly_and_not_kept(tmp_path: Path) -> None:
    tokens = [f"token {number} 🚀" for number in range(150_000)]
    keys = gguf_keys(tokenizer__ggml__tokens=(ARRAY, (STRING, tokens)), tokenizer__ggml__scores=(ARRAY, (F32, [0.0] * 150_000)))
    tensors = {**gguf_tensors(), "token_embd.weight": ((32, 150_000), 2, 150_000 * 18)}
    data = gguf_bytes(keys, tensors)
    del tokens, keys
    path = write(tmp_path, data)
    tracemalloc.start()
    header = read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.lengths["tokenizer.ggml.tokens"] == 150_000
    assert peak < 5_000_000


def test_a_hostile_array_can_not_hold_the_parent(tmp_path: Path) -> None:
    """A sparse file of 200 MB that says it is 25 million empty strings."""
    path = write(tmp_path, raw_key("k", struct.pack("<IIQ", ARRAY, STRING, 24_000_000)))
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    started = time.process_time()
    with pytest.raises(CorruptModel, match="claims array length"):
        read_gguf_header(path)
    assert time.process_time() - started < 1


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
def test_mutated_bytes_never_raise_anything_else(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(gguf_bytes(gguf_keys(general__size=(U64, 7), general__x=(F32, 1.0))))
    for at, value in changes:
        data[4 + at % 900] = value
    path = write(tmp_path, bytes(data[: cut % (3 * len(data))]))
    try:
        header = read_gguf_header(path)
    except LoadError as error:
        assert error.hint
        return
    assert all(header.data_offset + t.offset + t.size_bytes <= len(data) for t in header.tensors.values())
    assert inspect(path).format == "gguf"

"""Packed integers, layouts read from headers, settings: what needs no torch."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.detect.safetensors_header import Tensor
from modules.errors import CorruptModel, IncompatibleModel, InvalidParameter
from modules.quantize import cli
from modules.quantize._packing import pack_rows, pack_zeros, unpack_rows, unpack_zeros
from modules.quantize.layout import LayerLayout, read_layouts
from modules.quantize.process import default_out
from modules.quantize.settings import BITS, QuantizeSettings, check_layer, check_settings

# --- packing ---------------------------------------------------------------------------------------------------


@given(bits=st.sampled_from(BITS), blocks=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, blocks: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (32 * blocks, columns), dtype=np.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (blocks * bits, columns)
    assert (unpack_rows(packed, bits) == codes).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_packing_is_one_stream_of_bits(bits: int) -> None:
    """Against numpy's own bit order, so that packing and unpacking can't share a mistake."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (64, 3), dtype=np.uint8)
    stream = np.unpackbits(np.ascontiguousarray(pack_rows(codes, bits).T).view(np.uint8), axis=1, bitorder="little")
    values = (stream.reshape(3, 64, bits) << np.arange(bits, dtype=np.uint8)).sum(axis=2)
    assert (codes == values.T).all()


def test_three_bits_across_words() -> None:
    """The 11th value lies 2 bits in the first word and 1 in the second, the 22nd 1 in the second and 2 in the third."""
    codes = np.zeros((32, 1), dtype=np.uint8)
    codes[10] = 0b111
    codes[21] = 0b101
    words = pack_rows(codes, 3).view(np.uint32)[:, 0]
    assert [hex(word) for word in words] == ["0xc0000000", "0x80000001", "0x2"]


def test_four_bits_are_in_order() -> None:
    codes = np.arange(8, dtype=np.uint8).reshape(8, 1)
    assert hex(pack_rows(codes, 4).view(np.uint32)[0, 0]) == "0x76543210"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("v1", [True, False])
def test_zero_points(bits: int, v1: bool) -> None:
    zeros = np.random.default_rng(0).integers(1 if v1 else 0, 1 << bits, (4, 32), dtype=np.uint8)
    packed = pack_zeros(zeros, bits, v1=v1)
    assert packed.shape == (4, bits)
    assert (unpack_zeros(packed, bits, v1=v1) == zeros).all()


def test_symmetric_v1_zero_points_are_sevens() -> None:
    assert hex(pack_zeros(np.full((1, 8), 8, dtype=np.uint8), 4).view(np.uint32)[0, 0]) == "0x77777777"


def test_what_does_not_fill_words_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        pack_rows(np.zeros((31, 1), dtype=np.uint8), 3)
    with pytest.raises(ValueError, match="does not fit"):
        pack_rows(np.full((8, 1), 16, dtype=np.uint8), 4)
    with pytest.raises(ValueError, match="no whole number"):
        unpack_rows(np.zeros((4, 1), dtype=np.int32), 3)


# --- layouts ---------------------------------------------------------------------------------------------------


def _tensor(dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, 0, 0)


def _packed(bits: int, groups: int = 2, inputs: int = 64, out: int = 96) -> dict[str, Tensor]:
    return {
        "l.qweight": _tensor("I32", inputs * bits // 32, out),
        "l.qzeros": _tensor("I32", groups, out * bits // 32),
        "l.scales": _tensor("F16", groups, out),
        "l.g_idx": _tensor("I32", inputs),
    }


def _read(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, width: int | None = 64) -> LayerLayout:
    return read_layouts(tensors, config or {}, lambda _: width)["l"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("known", [{"l.g_idx"}, {"width"}, set()])
def test_bits_come_from_the_shapes(bits: int, known: set[str]) -> None:
    tensors = _packed(bits)
    if "l.g_idx" not in known:
        del tensors["l.g_idx"]
    layout = _read(tensors, width=64 if "width" in known else None)
    assert (layout.bits, layout.in_features, layout.group_size, layout.zeros) == (bits, 64, 32, "v1")


def test_shapes_count_more_than_settings() -> None:
    assert _read(_packed(3), {"bits": 4, "group_size": 128}).bits == 3


def test_conventions() -> None:
    assert _read(_packed(4), {"checkpoint_format": "gptq"}).zeros == "v1"
    assert _read(_packed(4), {"checkpoint_format": "gptq_v2"}).zeros == "v2"
    for config in ({"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"checkpoint_format": "bitblas"}):
        with pytest.raises(IncompatibleModel):
            _read(_packed(4), config)


def test_the_oldest_layout() -> None:
    tensors = {"l.qweight": _tensor("I32", 6, 96), "l.scales": _tensor("F32", 96, 1), "l.zeros": _tensor("F32", 96, 1)}
    layout = _read(tensors)
    assert (layout.bits, layout.groups, layout.zeros, layout.zeros_name) == (3, 1, "float", "l.zeros")


def test_an_empty_g_idx_counts_as_none() -> None:
    assert not _read(_packed(4) | {"l.g_idx": _tensor("I32", 0)}).has_g_idx


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"l.scales": None}, "l.scales"),
        ({"l.qzeros": None}, "l.qzeros"),
        ({"l.scales": _tensor("F16", 2, 95)}, "l.scales"),
        ({"l.scales": _tensor("I32", 2, 96)}, "l.scales"),
        ({"l.scales": _tensor("F16", 65, 96), "l.qzeros": _tensor("I32", 65, 12)}, "l.scales"),
        ({"l.qzeros": _tensor("I32", 1, 12)}, "l.qzeros"),
        ({"l.qweight": _tensor("F32", 8, 96)}, "l.qweight"),
        ({"l.qweight": _tensor("I32", 7, 96)}, "l.qweight"),
        ({"l.g_idx": _tensor("I32", 32)}, "l.qweight"),
        ({"l.bias": _tensor("F16", 95)}, "l.bias"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], named: str) -> None:
    tensors = {key: value for key, value in (_packed(4) | change).items() if value is not None}
    with pytest.raises(CorruptModel, match=named):
        _read(tensors)


def test_a_file_without_packed_layers() -> None:
    with pytest.raises(CorruptModel, match="no packed layer"):
        read_layouts({"l.weight": _tensor("F16", 4, 4)}, {}, lambda _: None)


# --- settings and command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"group_size": 100},
        {"group_size": 0},
        {"method": "awq"},
        {"damp_percent": 0.0},
        {"damp_percent": float("nan")},
        {"nsamples": 0},
        {"seqlen": 1},
        {"method": "rtn", "desc_act": True},
        {"static_groups": True, "group_size": -1},
    ],
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_settings(replace(QuantizeSettings(), **change))
    assert caught.value.param


def test_shapes_the_format_cannot_hold() -> None:
    check_layer("l", 256, 96, QuantizeSettings())
    with pytest.raises(IncompatibleModel, match="172 outputs"):
        check_layer("mlp.up", 64, 172, QuantizeSettings(group_size=32))
    with pytest.raises(IncompatibleModel, match="--group-size 32 or -1"):
        check_layer("l", 96, 96, QuantizeSettings(group_size=128))


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["quantize", "some model", *words])


def test_command_line() -> None:
    assert cli.settings_of(_arguments()) == QuantizeSettings(desc_act=True, static_groups=True)
    assert cli.settings_of(_arguments("--group-size", "-1")) == QuantizeSettings(group_size=-1, desc_act=True)
    for words in (["--no-desc-act"], ["--no-static-groups"]):
        assert cli.settings_of(_arguments(*words)) == QuantizeSettings()
    assert cli.settings_of(_arguments("--method", "rtn")) == QuantizeSettings(method="rtn")
    assert cli.settings_of(_arguments("--desc-act")) == QuantizeSettings(desc_act=True)
    settings = cli.settings_of(
        _arguments("--bits", "3", "--group-size", "-1", "--asym", "--desc-act", "--no-true-sequential", "--damp", "0.1", "--mse")
    )
    assert settings == QuantizeSettings(
        bits=3, group_size=-1, sym=False, desc_act=True, true_sequential=False, damp_percent=0.1, mse=True
    )
    assert default_out(Path("models/wren"), settings) == Path("models/wren-GPTQ-3bit")
    assert default_out(Path("m/wren"), QuantizeSettings(desc_act=True)) == Path("m/wren-GPTQ-4bit-128g-actorder")


def test_the_server_knows_the_subcommand() -> None:
    from modules.command_line import parse

    config = parse(["quantize", "wren-6m", "--group_size", "64", "--model-dir", "somewhere"], environ={})
    assert config.command == "quantize" and config.arguments is not None
    assert config.arguments.group_size == 64 and config.model_dir == Path("somewhere")

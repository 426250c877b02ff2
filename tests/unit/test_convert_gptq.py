"""The bridge from GPTQ to GGUF: which type holds a checkpoint, the blocks, the converter's order of rows, and the whole of it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from modules.convert import ConvertJob, convert
from modules.convert import gguf as convert_gguf
from modules.convert.children.gptq_blocks import Packed, problem, rounded, to_blocks
from modules.convert.gptq import exact_type
from modules.convert.library import has_converter
from modules.detect import check, list_models
from modules.errors import IncompatibleModel
from modules.overlays import Overlays
from modules.quantize.layout import LayerLayout
from tests.conftest import ROOT
from tests.unit.lab import run_in
from tests.unit.model_files import Shapes, hf_folder, llama_tensors

if TYPE_CHECKING:
    from modules.schema import LoadProgress

# --- blocks ----------------------------------------------------------------------------------------------------


def packed(bits: int, *, zeros: int | None = None, group: int = 64, seed: int = 0) -> Packed:
    """A layer of 128 inputs and 6 outputs with random codes."""
    rng = np.random.default_rng(seed)
    groups = 128 // group
    codes = rng.integers(0, 1 << bits, (128, 6), dtype=np.uint8)
    scales = (rng.random((groups, 6)) + 1).astype(np.float16).astype(np.float32)
    points = rng.integers(1, 1 << bits, (groups, 6)) if zeros is None else np.full((groups, 6), zeros)
    return Packed(codes, scales, points.astype(np.float32), np.arange(128) // group, bits)


def read_blocks(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The numbers in blocks of uint8 [rows, bytes], by ggml's definition of the types."""
    size, heads = {"Q4_0": (18, 1), "Q4_1": (20, 2), "Q8_0": (34, 1)}[kind]
    blocks = data.reshape(data.shape[0], -1, size)
    halves = np.ascontiguousarray(blocks[..., : 2 * heads]).view("<f2").astype(np.float32)
    body = blocks[..., 2 * heads :]
    if kind == "Q8_0":
        values = body.view(np.int8) * halves
    else:
        codes = np.concatenate([body & 15, body >> 4], axis=-1).astype(np.float32)
        values = codes * halves[..., :1] + halves[..., 1:] if kind == "Q4_1" else (codes - 8) * halves
    return np.asarray(values, dtype=np.float32).reshape(data.shape[0], -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_grids_become_blocks_bit_for_bit(bits: int, group: int) -> None:
    layer = packed(bits, zeros=1 << (bits - 1), group=group)
    kind = "Q8_0" if bits == 8 else "Q4_0"
    rows = np.array([5, 0, 3])
    assert problem(layer, kind) is None and not rounded(layer, kind)
    assert np.array_equal(read_blocks(to_blocks(layer, kind, rows), kind), layer.weight()[rows])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_become_minima(bits: int) -> None:
    layer = packed(bits)
    assert problem(layer, "Q4_1") is None and rounded(layer, "Q4_1")
    got = read_blocks(to_blocks(layer, "Q4_1", np.arange(6)), "Q4_1")
    off = np.abs(got - layer.weight())
    assert 0 < off.max() <= (layer.scales * layer.zeros).max() * 2.0**-11


def test_what_a_block_can_not_hold_is_said() -> None:
    scattered = packed(4, zeros=8)
    scattered.g_idx[:] = np.roll(scattered.g_idx, 1)
    assert "scattered" in (problem(scattered, "Q4_0") or "")
    moved = packed(4, zeros=8, group=32)
    moved.g_idx[:] = moved.g_idx[::-1].copy()
    assert problem(moved, "Q4_0") is None, "whole blocks may change places"
    assert np.array_equal(read_blocks(to_blocks(moved, "Q4_0", np.arange(6)), "Q4_0"), moved.weight())
    assert "zero points" in (problem(packed(4), "Q4_0") or "")
    huge = packed(4, zeros=15)
    huge.scales[0, 0] = 60000
    assert "beyond" in (problem(huge, "Q4_1") or "") and problem(packed(4, zeros=15), "Q4_1") is None
    huge.scales[0, 0] = 70000
    assert "scales beyond" in (problem(huge, "Q4_0") or "")


# --- which type ------------------------------------------------------------------------------------------------

SIZE = {"hidden_size": 64, "intermediate_size": 64}
SYM = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq"}


def gptq_folder(folder: Path, settings: dict[str, Any], bits: int | None = None, group: int = 32) -> Path:
    """A GPTQ checkpoint's header around zeros; `bits` are the tensors' own."""
    width = bits or settings["bits"]
    tensors: Shapes = {}
    for name, (dtype, shape) in llama_tensors(SIZE).items():
        if "_proj." in name:
            outputs, inputs = shape
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.qweight"] = ("I32", (inputs * width // 32, outputs))
            tensors[f"{stem}.qzeros"] = ("I32", (max(inputs // group, 1), outputs * width // 32))
            tensors[f"{stem}.scales"] = ("F16", (max(inputs // group, 1), outputs))
            tensors[f"{stem}.g_idx"] = ("I32", (inputs,))
        else:
            tensors[name] = (dtype, shape)
    return hf_folder(folder, {**SIZE, "quantization_config": settings}, tensors)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "Q4_0"),
        ({"bits": 2}, "Q4_0"),
        ({"bits": 3}, "Q4_0"),
        ({"bits": 8}, "Q8_0"),
        ({"sym": False}, "Q4_1"),
        ({"sym": False, "bits": 3}, "Q4_1"),
        ({"sym": None}, "Q4_1"),
        ({"desc_act": True, "static_groups": True}, "Q4_0"),
    ],
)
def test_the_type_that_holds_a_checkpoint(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    assert exact_type(check(gptq_folder(tmp_path / "m", SYM | changes))) == kind


def test_a_type_can_be_asked_for_when_it_holds_the_numbers(tmp_path: Path) -> None:
    model = check(gptq_folder(tmp_path / "m", SYM))
    assert exact_type(model, "Q4_1") == "Q4_1"
    with pytest.raises(IncompatibleModel, match="--type Q4_0"):
        exact_type(model, "Q8_0")
    with pytest.raises(IncompatibleModel, match="zero points"):
        exact_type(check(gptq_folder(tmp_path / "a", SYM | {"sym": False})), "Q4_0")


@pytest.mark.parametrize(
    ("changes", "group", "reason"),
    [
        ({"desc_act": True}, 32, "desc_act"),
        ({"group_size": 16}, 16, "groups of 16"),
        ({"bits": 8, "sym": False}, 32, "no type"),
    ],
)
def test_refusals_name_the_reason_and_the_way_out(tmp_path: Path, changes: dict[str, Any], group: int, reason: str) -> None:
    model = check(gptq_folder(tmp_path / "m", SYM | changes, group=group))
    with pytest.raises(IncompatibleModel, match=reason) as caught:
        exact_type(model)
    assert "--type F16" in str(caught.value) and "--static-groups" in str(caught.value)


def test_nothing_is_quantised_twice_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gptq_folder(tmp_path / "m", SYM | {"desc_act": True})
    overlays = Overlays(tmp_path, ROOT)
    for kind in ("auto", "Q4_K_M", "Q4_0", "Q8_0"):
        with pytest.raises(IncompatibleModel, match="again"):
            asyncio.run(convert(ConvertJob(folder, kind), lambda _: None, overlays))
    model = check(folder)
    assert convert_gguf._kind(model, "Q4_0", ConvertJob(folder, "Q4_0", requantize=True)) == "Q4_0"
    assert convert_gguf._kind(model, "F16", ConvertJob(folder, "F16")) == "F16"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_short_last_group_counts_by_the_settings() -> None:
    from modules.convert.gptq import group_size, why_not

    layout = LayerLayout("l", 4, 160, 32, 3, "v1", True, False)
    assert group_size(layout, {"group_size": 64}) == 64 and why_not(layout, {"group_size": 64}) is None
    assert why_not(layout, {}) is not None
    assert "blocks of 32" in (why_not(LayerLayout("l", 4, 40, 32, 1, "v1", True, False), {}) or "")


# --- the real thing --------------------------------------------------------------------------------------------

LOGITS = """
import json, sys, llama_cpp
import numpy as np
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, logits_all=True)
ids = json.loads(sys.argv[2])
model.eval(ids)
np.save(sys.argv[3], model.scores[: len(ids)])
print(json.dumps(model.metadata))
"""


@pytest.fixture(scope="module")
def real(overlays: Overlays) -> Overlays:
    if not overlays.complete("transformers") or not has_converter(overlays.env_dir("transformers")):
        pytest.skip("needs the Transformers environment with llama.cpp's converter")
    if not overlays.has_module("llamacpp", "llama_cpp"):
        pytest.skip("needs llama-cpp-python")
    return overlays


@pytest.fixture
def bundled(root: Path) -> Path:
    found = next((model for model in list_models([root / "models"]) if model.bundled and model.format == "gptq"), None)
    if found is None:
        pytest.skip("needs the bundled model as GPTQ")
    return Path(found.path)


@pytest.mark.slow
def test_the_bundled_checkpoint_runs_in_llama_cpp(real: Overlays, bundled: Path, tmp_path: Path) -> None:
    """The same numbers, the same greedy text; the logits' difference is llama.cpp's own (int8 activations, half-precision KV)."""
    stages: list[LoadProgress] = []
    out = tmp_path / "models" / "brïdge.gguf"
    done = asyncio.run(convert(ConvertJob(bundled, out=out), stages.append, real))
    assert done.type == "Q4_0" and any("as they are" in note for note in done.notes)
    (found,) = list_models([out.parent])
    assert found.problem is None and found.format == "gguf" and found.quantization is not None
    assert found.quantization.method == "Q4_0" and found.has_chat_template
    result = tmp_path / "reference.json"
    run_in(real, "transformers", str(ROOT / "tests" / "bridge_lab.py"), "reference", str(bundled), str(result))
    reference = json.loads(result.read_text(encoding="utf-8"))
    logits = tmp_path / "logits.npy"
    metadata = json.loads(run_in(real, "llamacpp", "-c", LOGITS, str(out), json.dumps(reference["ids"]), str(logits)))
    assert metadata["general.quantized_by"].startswith("GPTQ") and "<|im_start|>" in metadata["tokenizer.chat_template"]
    got, wanted = np.load(logits), np.load(result.with_suffix(".npy"))
    answer = reference["prompt"] - 1
    assert np.array_equal(got.argmax(1)[answer:], wanted.argmax(1)[answer:]), "greedy text, token for token"
    assert np.abs(got - wanted).max() < 0.1 * wanted.std()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the experiment forks, to import torch once")
def test_rows_follow_the_converter_in_other_architectures(real: Overlays, tmp_path: Path) -> None:
    """Llama's queries and keys, GPT-NeoX's and BLOOM's fused projections, GPT-2's transposed weights: every number arrives."""
    text = run_in(real, "transformers", str(ROOT / "tests" / "bridge_lab.py"), "architectures", str(tmp_path))
    found = json.loads(text.splitlines()[-1])
    assert {name: row["kind"] for name, row in found.items()} == {
        "llama": "Q4_0",
        "qwen2": "Q4_1",
        "gpt_neox": "Q8_0",
        "bloom": "Q4_1",
        "gpt2": "Q4_0",
    }
    assert {name: row["packed"] for name, row in found.items()} == {
        **dict.fromkeys(("llama", "qwen2"), 14),
        **dict.fromkeys(("gpt_neox", "bloom", "gpt2"), 8),
    }
    for name, row in found.items():
        limit = 2.0**-11 if row["kind"] == "Q4_1" else 0  # minima rounded to float16
        assert {key: off for key, off in row["off"].items() if off > limit} == {}, name


def test_the_wrong_zero_points_are_found_before_a_file_is_written(real: Overlays, tmp_path: Path) -> None:
    folder = gptq_folder(tmp_path / "m", SYM)  # zeros everywhere: zero points of 1, where 8 is the middle
    with pytest.raises(IncompatibleModel, match="its settings say"):
        asyncio.run(convert(ConvertJob(folder), lambda _: None, real))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

"""The GPTQ runtime: its kernel, its decoder, what it says without them. Experiments of tests/gptq_lab.py in the Transformers
environment; damaged checkpoints and older layouts are in test_quantize_models.py."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loaders.gptq_for_llama import SPEC
from modules.convert.unpickle import convert_pickle
from tests.conftest import ROOT
from tests.unit.lab import Lab, run_lab

if TYPE_CHECKING:
    from modules.overlays import Overlays

_NO_COMPILER = "there is no C compiler, or this is Windows: the compiled kernel is not offered"


@pytest.fixture(scope="module")
def lab(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Run an experiment once, all in one process; a later test of this module gets the same result."""
    if not overlays.has_module("transformers", "transformers"):
        pytest.skip("the Transformers environment is not installed")
    with run_lab(overlays, "transformers", "gptq_lab.py", tmp_path_factory.mktemp("gptq läb")) as ask:

        def run(name: str) -> Any:
            result = ask(name)
            if result is None:
                pytest.skip(_NO_COMPILER)
            return result

        yield run


def test_every_kernel_is_a_choice() -> None:
    option = SPEC.option("kernel")
    assert option is not None and {"auto", "int8", "exact", "int4", "dense", "unpack", "triton"} == set(option.choices)


# --- the kernel ------------------------------------------------------------------------------------------------


def test_products(lab: Lab) -> None:
    found = lab("products")
    assert len(found) == 4 * 6 * 2
    for case, error in found.items():
        assert error < (5e-6 if case.endswith("exact") else 0.02), case


def test_the_largest_sums_do_not_overflow(lab: Lab) -> None:
    found = lab("saturated")
    assert len(found) == 8
    for case, error in found.items():
        assert error < 1e-5, case


@pytest.mark.slow
def test_a_library_is_tried_before_it_is_used(lab: Lab) -> None:
    """The plain build for any processor passes; one whose mask is wrong by a bit does not."""
    found = lab("trial")
    assert found["portable"] == [0, ""]
    assert found["broken"][0] == 1 and "4 bits" in found["broken"][1]


@pytest.mark.skipif(sys.platform == "win32", reason="the compiled kernel is for Linux and macOS")
def test_without_a_kernel_torch_serves_and_it_is_said(lab: Lab) -> None:
    found = lab("no_kernel")
    assert found.pop("left") == [], "nothing that failed stays"
    assert set(found) == {"none", "fails", "lies"}
    for case, row in found.items():
        assert row["said"] == [row["problem"]], case
        assert row["picked"]["exact"] == "unpack" and row["picked"]["auto"] == row["picked"]["int8"] == "int4", case
    assert "no C compiler" in found["none"]["problem"] and "get one" in found["none"]["problem"]
    assert "could not be built" in found["fails"]["problem"] and "failed its trial" in found["lies"]["problem"]


def test_a_layer_from_tensors(lab: Lab) -> None:
    """The entry for other loaders: both zero conventions, with and without g_idx."""
    found = lab("from_tensors")
    assert len(found["errors"]) == 12
    for case, error in found["errors"].items():
        assert error < 0.02, case
    assert found["bad"] == dict.fromkeys(("bits", "groups", "nan", "g_idx"), "corrupt_model")


# --- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_architecture_on_the_kernel(lab: Lab) -> None:
    found = lab("families")
    assert set(found) == {"llama", "mistral", "qwen2", "gpt_neox", "opt", "bloom", "gpt2"}
    if found["llama"]["exact"]["kernels"] != ["exact"]:
        pytest.skip(_NO_COMPILER)
    for name, row in found.items():
        assert row["exact"]["kernels"] == ["exact"] and row["int8"]["kernels"] == ["int8"], name
        assert row["exact"]["error"] < 1e-4, name
        assert row["int8"]["error"] < 0.15, name
        decoded = name in ("llama", "qwen2")  # Mistral's default configuration has a sliding window
        assert (row["exact"]["problem"] is None) == decoded or name == "mistral", (name, row["exact"]["problem"])
        if row["exact"]["problem"] is None:
            assert row["exact"]["off"] < 1e-4 and row["int8"]["off"] < 0.05, name


def test_the_decoder_equals_the_models_own_forward(lab: Lab) -> None:
    """In one piece, in pieces, after its cache was cut back and grew; scores, and the cache put aside for them."""
    found = lab("decoder")
    assert found["used"]
    for case in ("at once", "pieces", "again"):
        assert found[case] < 1e-5, case
    assert found["scores"] < 1e-4 and found["beside"] < 1e-4
    assert found["capacity"] >= 400 and found["capacity"] // 16 % 2 == 1
    assert found["shared"] == 0 and found["kept"] == 390 and found["left alone"] == 399


# --- pickles ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pickled_checkpoint_after_the_opt_in(overlays: Overlays, tmp_path: Path) -> None:
    """GPTQ-for-LLaMa's .pt: refused with the command to type; converted in the fence, it gives the same logits."""
    source = ROOT / "models" / "wren-6m-gptq-4bit-128g"
    if not (source / "config.json").is_file() or not overlays.has_module("transformers", "transformers"):
        pytest.skip("the bundled GPTQ model or the Transformers environment is not here")
    folder = tmp_path / "old läma"
    shutil.copytree(source, folder)
    (folder / "quantize_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    python = str(overlays.python("transformers"))

    def run(script: str) -> str:
        done = subprocess.run(
            [python, "-c", script, str(folder), str(source)],
            cwd=ROOT, env=overlays.worker_env("transformers"), capture_output=True, text=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    run(
        "import sys, torch; from pathlib import Path; from safetensors.torch import load_file\n"
        "folder = Path(sys.argv[1]); tensors = {}\n"
        "for file in folder.glob('*.safetensors'): tensors |= load_file(file); file.unlink()\n"
        "torch.save({k: v for k, v in tensors.items() if not k.endswith('.bias')}, folder / 'wren-4bit-128g.pt')"
    )
    loading = (
        "import sys, torch; from loaders._gptq_load import load; from loaders.gptq_for_llama import SPEC\n"
        "from modules.errors import AppError\n"
        "options = {o.name: o.default for o in SPEC.options} | {'kernel': 'unpack', 'threads': 1}\n"
    )
    refused = run(
        loading + "try: load(sys.argv[1], options, lambda _: None)\nexcept AppError as e: print(e.code, e.hint, sep='\\n')"
    )
    assert refused.startswith("unsafe_model") and "--to safetensors --allow-pickle" in refused and "wren-4bit-128g.pt" in refused
    done = asyncio.run(convert_pickle(folder / "wren-4bit-128g.pt", lambda _: None, allow_pickle=True, overlays=overlays))
    assert done.path.name == "wren-4bit-128g.safetensors"
    same = run(
        loading + "ids = torch.arange(30)[None]\n"
        "with torch.inference_mode():\n"
        "    print(torch.equal(*(load(p, options, lambda _: None).model(ids).logits for p in sys.argv[1:])))"
    )
    assert same == "True"

"""Checkpoints that we write, read by others: transformers, GPTQModel and auto-gptq must give the logits of our own runtime.

Each library lives in an environment of its own: auto-gptq in the overlay that its loader uses; GPTQModel (with optimum, which
transformers' integration wants) where $SWITCHYARD_GPTQMODEL points to its Python. Where one is missing, its tests skip.

    SWITCHYARD_GPTQMODEL=ENVIRONMENT/bin/python pytest tests/unit/test_quantize_interop.py

Tolerance: the others compute in float16 or bfloat16, ours in float32; the largest difference must stay under 4 % of the logits'
standard deviation for float16 and 8 % where a library takes bfloat16 (transformers through torch's int4 op).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "4bit-sym": {"bits": 4, "group_size": 32},
    "4bit-asym-actorder": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "4bit-static": {"bits": 4, "group_size": 64, "desc_act": True, "static_groups": True},
    "8bit": {"bits": 8, "group_size": 64},
    "3bit": {"bits": 3, "group_size": 32},
    "2bit-asym": {"bits": 2, "group_size": 64, "sym": False},
    "4bit-asym-v2": {"bits": 4, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
}
# auto-gptq 0.7 is older than v2; GPTQModel refuses zero points in every v1 file, since old programs overflowed them.
NOT_READ = {"autogptq": ("4bit-asym-v2",), "gptqmodel": ("4bit-asym-actorder", "2bit-asym")}
LIMITS = {"transformers": 0.08, "gptqmodel": 0.04, "autogptq": 0.04}


@pytest.fixture(scope="module")
def made(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a small model in every layout, with our logits beside them (NAME.npy, ids.json)."""
    if not overlays.has_module("transformers", "transformers"):
        pytest.skip("the Transformers environment is not installed")
    folder = tmp_path_factory.mktemp("interop")
    call([str(overlays.python("transformers")), str(ROOT / "tests" / "interop_lab.py"), str(folder), json.dumps(CASES)], overlays)
    return folder


def call(command: list[str], overlays: Overlays) -> str:
    environment = overlays.worker_env("transformers") | {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def python_of(library: str, overlays: Overlays) -> str:
    if library == "autogptq":
        if not overlays.has_module("autogptq", "auto_gptq"):
            pytest.skip("the auto-gptq overlay is not installed, or holds GPTQModel instead")
        return str(overlays.python("autogptq"))
    found = os.environ.get("SWITCHYARD_GPTQMODEL")
    if not found:
        pytest.skip("needs $SWITCHYARD_GPTQMODEL: the Python of an environment with GPTQModel and optimum")
    return found


@pytest.fixture(scope="module")
def read(overlays: Overlays, made: Path) -> Callable[[str], dict[str, float]]:
    """library -> {case: largest difference over the standard deviation of our logits}."""
    import numpy as np

    def differences(library: str) -> dict[str, float]:
        python = python_of(library, overlays)
        out = made / library
        out.mkdir()
        names = [name for name in CASES if name not in NOT_READ.get(library, ())]
        paths = [str(made / name) for name in names]
        call([python, str(ROOT / "tests" / "gptq_reader.py"), library, str(made / "ids.json"), str(out), *paths], overlays)
        result = {}
        for name in names:
            ours, theirs = np.load(made / f"{name}.npy"), np.load(out / f"{name}.npy")
            result[name] = float(np.abs(ours - theirs).max() / ours.std())
        return result

    return differences


@pytest.mark.parametrize("library", sorted(LIMITS))
def test_another_library_gives_our_logits(read: Callable[[str], dict[str, float]], library: str) -> None:
    found = read(library)
    print(library, {name: round(value, 4) for name, value in found.items()})
    assert {name: value for name, value in found.items() if not value < LIMITS[library]} == {}

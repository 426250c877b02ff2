"""The recipe's networks against the libraries that run what they train, and the RWKV kernel against the plain recurrence."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.unit.lab import run_in

if TYPE_CHECKING:
    from modules.overlays import Overlays

BUNDLED = {"wren-opt-6m": "transformers", "wren-rwkv-7m": "rwkv"}


def lab(overlays: Overlays, environment: str, what: str) -> dict[str, float]:
    """The differences that tests/recipe_lab.py measures, in the environment that has the library."""
    if not overlays.complete(environment):
        pytest.skip(f"needs the {environment} environment, which is not installed")
    said = run_in(overlays, environment, str(ROOT / "tests" / "recipe_lab.py"), what)
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def test_what_is_trained_as_opt_runs_as_opt(overlays: Overlays) -> None:
    differences = lab(overlays, "transformers", "opt")
    assert differences == {name: pytest.approx(0, abs=1e-4) for name in ("library", "packed")}


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("cc") is None, reason="needs a C compiler")
def test_what_is_trained_as_rwkv_runs_as_rwkv(overlays: Overlays) -> None:
    differences = lab(overlays, "rwkv", "rwkv")
    assert differences == {name: pytest.approx(0, abs=2e-4) for name in ("forward", "backward", "package", "packed")}


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_folders_are_whole_and_small(name: str) -> None:
    folder = ROOT / "models" / name
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sum(files.values()) <= 15_000_000
    assert files.keys() >= {"README.md", "LICENSES", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert (folder / "tokenizer.json").read_bytes() == (ROOT / "models" / "wren-6m" / "tokenizer.json").read_bytes()

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import registry
from modules.errors import ConfigError, IncompatibleModel
from modules.sampling import PARAMETERS
from modules.schema import LoaderSpec, ModelFiles
from tests.conftest import ROOT


class Machine:
    """An environment where only some overlays are installed."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing

    def unavailable(self, spec: LoaderSpec) -> str | None:
        return f"not installed: install {spec.name}" if spec.name in self.missing else None


def spec(name: str, **formats: int) -> LoaderSpec:
    return LoaderSpec(name, name.title(), f"loaders.{name}:E", "s", formats, frozenset())


SPECS = [spec("alpha", hf=10), spec("beta", hf=20, gguf=5), spec("gamma", gguf=50)]
MODEL = ModelFiles("m", "/m", "hf")


def test_rank_orders_by_priority_then_gives_reasons() -> None:
    choices = registry.rank(MODEL, SPECS, Machine())
    assert [c.spec.name for c in choices] == ["beta", "alpha", "gamma"]
    assert choices[-1].reason == "needs a GGUF file; this is a safetensors folder."


def test_rank_puts_the_not_installed_behind() -> None:
    choices = registry.rank(MODEL, SPECS, Machine("beta"))
    assert [(c.spec.name, c.ok, c.installed) for c in choices] == [
        ("alpha", True, True),
        ("beta", False, False),
        ("gamma", False, True),
    ]


def test_select() -> None:
    assert registry.select(MODEL, SPECS, Machine()).name == "beta"
    assert registry.select(MODEL, SPECS, Machine(), "alpha").name == "alpha"
    with pytest.raises(IncompatibleModel, match="GGUF"):
        registry.select(MODEL, SPECS, Machine(), "gamma")
    with pytest.raises(ConfigError):
        registry.select(MODEL, SPECS, Machine(), "delta")
    with pytest.raises(IncompatibleModel, match="install alpha"):
        registry.select(MODEL, SPECS, Machine("alpha", "beta"))


def test_a_problem_of_the_model_is_the_reason() -> None:
    broken = ModelFiles("m", "/m", "hf", problem="The file is cut short: 10 of 20 bytes.")
    assert registry.rank(broken, SPECS, Machine())[0].reason == broken.problem


def test_unknown_loader_names_the_known() -> None:
    with pytest.raises(ConfigError, match="echo"):
        registry.load_spec("nonsense")


@pytest.mark.parametrize("name", registry.loader_names())
def test_specs_are_complete(name: str) -> None:
    found = registry.load_spec(name)
    assert found.title and found.summary and found.formats
    assert found.samplers <= PARAMETERS.keys()
    names = [n for option in found.options for n in (option.name, *option.aliases)]
    assert len(names) == len(set(names)), "two options share a name"
    for option in found.options:
        assert option.help
        assert not option.choices or option.default in option.choices


# --- architecture ----------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "llama_cpp", "xllamacpp", "numpy", "safetensors", "tokenizers", "accelerate", "peft", "ray"}


def test_the_parent_never_imports_a_backend() -> None:
    """server, all of modules and all of loaders, in a fresh interpreter; then no backend is in sys.modules."""
    script = f"""
import importlib, pkgutil, sys
import modules, loaders
worker_only = ("modules.sampler_", "modules.samplers", "modules.opt_weights")
worker_only += ("modules.quantize._", "modules.quantize.child", "modules.convert.children", "modules.ray_engine.router")
def walk(package, page):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.startswith("modules.ui") == page and not found.name.startswith(worker_only) and "._" not in found.name:
            importlib.import_module(found.name)
importlib.import_module("server")
walk(modules, page=False); walk(loaders, page=False)
heavy = {HEAVY!r}
print(sorted(set(sys.modules) & heavy))
walk(modules, page=True)
print(sorted(set(sys.modules) & heavy - {{"numpy"}}))  # Gradio brings numpy
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "[]", ""]


LAYERS = [
    "modules.schema", "modules.protocol", "modules.engine_client", "modules.worker_client", "modules.model_manager",
    "modules.chat", "modules.api",
]  # fmt: skip


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _layer(name: str) -> int | None:
    if name.startswith("modules.ui"):
        name = "modules.api"
    return next((i for i, layer in enumerate(LAYERS) if name == layer or name.startswith(layer + ".")), None)


def test_imports_point_downwards() -> None:
    """ui and api -> chat -> model_manager -> worker_client -> engine_client -> protocol -> schema, never back."""
    for path in sorted((ROOT / "modules").rglob("*.py")):
        own = _layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own is None:
            continue
        for imported in _imports(path):
            other = _layer(imported)
            assert other is None or other <= own, f"{path.relative_to(ROOT)} imports {imported}"

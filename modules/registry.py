"""The loader registry: every `loaders/NAME.py` that defines SPEC, and which of them can take a model and why not.

Importing a loader module is light by rule (standard library and modules.* only), so the parent reads all specs; the
engine class behind `spec.engine` is imported in the worker alone.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import loaders
from modules.engine import Engine
from modules.errors import ConfigError, IncompatibleModel
from modules.schema import LoaderSpec, ModelFiles


@dataclass(frozen=True, slots=True)
class Choice:
    """One loader for one model: `ok`, or the one-line `reason` why not. `installed` is false where only set-up is missing."""

    spec: LoaderSpec
    ok: bool
    reason: str = ""
    installed: bool = True


class Environment(Protocol):
    """What the registry asks of modules.overlays."""

    def unavailable(self, spec: LoaderSpec) -> str | None:
        """Why this loader can't run on this machine now, with the fix, or None."""


def loader_names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(loaders.__path__) if not m.name.startswith("_"))


def load_spec(name: str) -> LoaderSpec:
    """The SPEC of one loader. Raises ConfigError with the known names."""
    if name not in loader_names():
        raise ConfigError(f"There is no loader {name!r}.", hint=f"The loaders are {', '.join(loader_names())}.")
    spec = importlib.import_module(f"loaders.{name}").SPEC
    if not isinstance(spec, LoaderSpec) or spec.name != name:
        raise ConfigError(f"loaders/{name}.py must define SPEC, a LoaderSpec named {name!r}.")
    return spec


def discover() -> dict[str, LoaderSpec]:
    """Every loader, by name."""
    return {name: load_spec(name) for name in loader_names()}


def loader_named(text: str, specs: Mapping[str, LoaderSpec]) -> str | None:
    """A loader by its name or title, however it is written: "llama.cpp", "Transformers". None when there is none."""
    plain = _plain(text)
    return next((name for name, spec in specs.items() if plain and plain in (_plain(name), _plain(spec.title))), None)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def engine_class(spec: LoaderSpec) -> type[Engine]:
    """Import the engine behind a spec ("package.module:Class")."""
    module_name, _, class_name = spec.engine.partition(":")
    engine = getattr(importlib.import_module(module_name), class_name)
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise ConfigError(f"{spec.engine} is no Engine.")
    return engine


def rank(files: ModelFiles, specs: Iterable[LoaderSpec], environment: Environment) -> list[Choice]:
    """Every loader for this model, the best first: those that can take it now, by priority; then those that only lack
    their installation; then the others with their reason."""
    choices = [_judge(files, spec, environment) for spec in specs]

    def order(choice: Choice) -> tuple[bool, bool, int, str]:
        return (not choice.ok, choice.installed, -choice.spec.formats.get(files.format, 0), choice.spec.name)

    return sorted(choices, key=order)


def select(files: ModelFiles, specs: Iterable[LoaderSpec], environment: Environment, name: str | None = None) -> LoaderSpec:
    """The loader asked for, or the best one. Raises IncompatibleModel with the reasons."""
    choices = rank(files, specs, environment)
    if name is not None:
        choices = [c for c in choices if c.spec.name == name]
        if not choices:
            raise ConfigError(f"There is no loader {name!r}.")
    best = choices[0]
    if files.format == "mmproj":
        raise IncompatibleModel(str(files.problem))  # what it is, and where it belongs
    if not best.ok:
        raise IncompatibleModel(
            f"{best.spec.title} can't take {files.id}: {best.reason}" if name else f"No backend can take {files.id} now.",
            hint="" if name else " ".join(f"{c.spec.title}: {c.reason}" for c in choices[:3]),
        )
    return best.spec


def takes(files: ModelFiles, spec: LoaderSpec) -> bool:
    """Whether the loader can read this model, wherever it may run."""
    return files.format in spec.formats and not files.problem and _refusal(files, spec) is None


def _refusal(files: ModelFiles, spec: LoaderSpec) -> str | None:
    """Why a loader that takes the format does not take this model: its module's `refusal(files)`, where it has one."""
    module = sys.modules.get(spec.engine.partition(":")[0])
    refusal = getattr(module, "refusal", None)
    reason: str | None = refusal(files) if refusal else None
    return reason


FORMAT_NAMES = {
    "hf": "a safetensors folder",
    "gguf": "a GGUF file",
    "gptq": "a GPTQ checkpoint",
    "exl2": "an EXL2 checkpoint",
    "exl3": "an EXL3 checkpoint",
    "awq": "an AWQ checkpoint",
    "rwkv": "an RWKV file",
    "flexgen": "FlexGen's converted weights",
    "lora": "a LoRA adapter",
    "remote": "a remote server",
    "echo": "the echo test model",
    "mmproj": "a projector (mmproj)",
    "unknown": "an unknown format",
}


def _judge(files: ModelFiles, spec: LoaderSpec, environment: Environment) -> Choice:
    if files.format not in spec.formats:
        wanted = " or ".join(FORMAT_NAMES[f] for f in sorted(spec.formats, key=lambda f: -spec.formats[f]))
        return Choice(spec, False, f"needs {wanted}; this is {FORMAT_NAMES[files.format]}.")
    if files.problem:
        return Choice(spec, False, files.problem)
    refused = _refusal(files, spec)
    if refused:
        return Choice(spec, False, refused)
    if not any(sys.platform.startswith(p) for p in spec.platforms):
        return Choice(spec, False, f"does not run on {sys.platform}.")
    missing = environment.unavailable(spec)
    if missing:
        return Choice(spec, False, missing, installed=False)
    return Choice(spec, True)

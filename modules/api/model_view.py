"""Models and backends as the page and /v1/internal/model/list show them: what takes which, and in one line why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.errors import AppError
from modules.overlays import env_specs, start_script
from modules.quantize.process import check_source
from modules.registry import rank
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.overlays import EnvSpec, Overlays
    from modules.schema import LoaderSpec, ModelFiles
    from modules.services import Services


class _Once:
    """Each backend asked once per list: a thousand models must not stat its environment a thousand times."""

    def __init__(self, overlays: Overlays) -> None:
        self._overlays = overlays
        self._known: dict[str, str | None] = {}

    def unavailable(self, spec: LoaderSpec) -> str | None:
        if spec.name not in self._known:
            self._known[spec.name] = self._overlays.unavailable(spec)
        return self._known[spec.name]


def listed(services: Services) -> dict[str, Any]:
    """Every model and every backend. Reads the disk: call it in a thread."""
    specs = list(services.specs.values())
    once = _Once(services.overlays)
    environments = env_specs(services.overlays.root)
    return {
        "models": [model_view(model, specs, once) for model in services.library.list()],
        "loaders": [loader_view(services, spec, environments) for spec in specs],
        "make": makers(services.overlays),
    }


def model_views(services: Services) -> list[dict[str, Any]]:
    """Every model with its backends."""
    specs, once = list(services.specs.values()), _Once(services.overlays)
    return [model_view(model, specs, once) for model in services.library.list()]


def model_view(model: ModelFiles, specs: list[LoaderSpec], once: _Once) -> dict[str, Any]:
    loaders = [
        {"name": c.spec.name, "title": c.spec.title, "ok": c.ok, "reason": c.reason or None, "installed": c.installed}
        for c in rank(model, specs, once)
    ]
    # The file names are below the model's own folder; where that is on this machine is nobody's business here.
    return {**to_wire(model), "path": model.id, "loaders": loaders, "plain": _is_plain(model)}


def _is_plain(model: ModelFiles) -> bool:
    """Whether other forms can be made of it without losing twice: a folder in 16 or 32 bits."""
    try:
        check_source(model)
    except AppError:
        return False
    return True


def loader_view(services: Services, spec: LoaderSpec, environments: dict[str, EnvSpec]) -> dict[str, Any]:
    status = services.overlays.status(spec)
    reason = services.overlays.unavailable(spec)
    installed = status.installed and status.importable
    environment = environments.get(spec.overlay or "")
    return {
        "name": spec.name,
        "title": spec.title,
        "summary": spec.summary,
        "installed": installed,
        "installable": not installed and environment is not None and environment.problem() is None,
        "ready": reason is None,
        "reason": reason,
        "fix": status.fix or None,
        "overlay": spec.overlay,
        "options": [to_wire(option) for option in spec.options],
    }


def makers(overlays: Overlays) -> dict[str, str | None]:
    """For each other form of a plain model, None where it can be made here, else what that needs."""
    transformers = (
        None if overlays.complete("transformers") else f"needs the Transformers set: {start_script()} install transformers"
    )
    llama = None if overlays.has_module("llamacpp", "llama_cpp") else f"needs llama-cpp-python: {start_script()} install llamacpp"
    bitsandbytes = transformers
    if bitsandbytes is None and not overlays.has_module("transformers", "bitsandbytes"):
        bitsandbytes = "needs the bitsandbytes package, which has no wheel for this machine."
    return {"gguf": transformers or llama, "gptq": transformers, "bitsandbytes": bitsandbytes}

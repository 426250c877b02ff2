"""What the page's Python side asks of the server: one narrow, reading view of its services.

Gradio calls these from its own threads, so nothing here changes anything; changes go through /ui-api.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.errors import ModelNotFound
from modules.registry import rank
from modules.sampling import PARAMETERS
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.schema import LoaderSpec
    from modules.services import Services


class Access:
    """JSON-safe views of the settings, the models and the backends."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def settings(self) -> dict[str, Any]:
        """Every setting; `sampling` is complete."""
        values: dict[str, Any] = self._services.settings.values()
        return values

    def presets(self) -> list[str]:
        return list(self._services.presets.names())

    def loaders(self) -> list[LoaderSpec]:
        return list(self._services.specs.values())

    def title(self, loader: str) -> str:
        spec = self._services.specs.get(loader)
        return spec.title if spec else loader

    def models(self) -> list[dict[str, Any]]:
        return [to_wire(model) for model in self._services.library.list()]

    def active(self) -> tuple[str, str] | None:
        """(model id, loader) that the chats use."""
        resident = self._services.manager.active()
        return (resident.model.id, resident.loader) if resident else None

    def backends(self, model_id: str | None) -> list[tuple[str, bool, str]]:
        """(loader, ok, reason) for a model, best first; nothing for a model that is gone."""
        if not model_id:
            return []
        try:
            files = self._services.library.find(model_id)
        except ModelNotFound:
            return []
        choices = rank(files, self._services.specs.values(), self._services.overlays)
        return [(choice.spec.name, choice.ok, choice.reason) for choice in choices]

    def load_options(self, model_id: str | None, loader: str) -> dict[str, Any]:
        """What a model was last loaded with on a backend, where that differs from the defaults."""
        options: dict[str, Any] = self._services.model_settings.options(model_id, loader) if model_id else {}
        return options

    def parameter_support(self) -> dict[str, tuple[bool, str]]:
        """Per sampling parameter: whether the active backend honours it, and the reason if not."""
        active = self.active()
        spec = self._services.specs.get(active[1]) if active else None
        if spec is None:
            return dict.fromkeys(PARAMETERS, (True, ""))
        return {name: (name in spec.samplers, f"{spec.title} does not have this.") for name in PARAMETERS}

"""The models a user can choose: what detection finds in the model folders, and what loaders bring themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modules.schema import LoaderSpec, ModelFiles


class Library(Protocol):
    """What the model manager asks for. All three may read the disk: call them in a thread."""

    def list(self) -> list[ModelFiles]: ...

    def find(self, name: str) -> ModelFiles:
        """Raises ModelNotFound."""
        ...

    def check(self, model: ModelFiles) -> None:
        """Raises CorruptModel, UnsafeModel or UnknownFormat."""
        ...


class LocalLibrary:
    """Models below `dirs`, beside the built-in ones of `specs` (echo)."""

    def __init__(self, dirs: Sequence[Path], specs: Iterable[LoaderSpec]) -> None:
        self._dirs = [Path(d) for d in dirs]
        self._admitted: dict[str, ModelFiles] = {}
        self._builtin = {model.id: model for spec in specs for model in spec.builtin}

    @property
    def dirs(self) -> list[Path]:
        return list(self._dirs)

    def list(self) -> list[ModelFiles]:
        from modules import detect

        found = [model for model in detect.list_models(self._dirs) if model.id not in self._builtin]
        return [*found, *self._admitted.values(), *self._builtin.values()]

    def find(self, name: str) -> ModelFiles:
        from modules import detect

        return self._builtin.get(name) or self._admitted.get(name) or detect.find_model(name, self._dirs)

    def admit(self, name: str) -> ModelFiles:
        """Find a model for the operator, who may also name a path outside the folders; such a model then counts as listed.

        Raises ModelNotFound.
        """
        from modules import detect

        if name in self._builtin:
            return self._builtin[name]
        model = detect.find_model(name, self._dirs, allow_paths=True)
        if all(model.id != listed.id for listed in detect.list_models(self._dirs)):
            self._admitted[model.id] = model
        return model

    def check(self, model: ModelFiles) -> None:
        from modules import detect

        if model.id not in self._builtin:
            detect.check(model.path)

    def bundled(self) -> Sequence[ModelFiles]:
        """The models that come with the product, echo left out."""
        return [model for model in self.list() if model.bundled and model.format != "echo" and not model.problem]

"""The models a user can choose: what detection finds in the model folders, and what loaders bring themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from modules.remotes.store import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modules.remotes.watch import Remotes
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
    """Models below `dirs`, beside those of remote servers and the built-in ones of `specs` (echo). `headers` is a file that keeps
    what the models' headers say."""

    def __init__(
        self, dirs: Sequence[Path], specs: Iterable[LoaderSpec], remotes: Remotes | None = None, headers: Path | None = None
    ) -> None:
        from modules.detect.remembered import HeaderCache

        self._headers = HeaderCache(headers) if headers is not None else None
        self._dirs = [Path(d) for d in dirs]
        self._remotes = remotes
        self._admitted: dict[str, ModelFiles] = {}
        self._builtin = {model.id: model for spec in specs for model in spec.builtin}

    @property
    def dirs(self) -> list[Path]:
        return list(self._dirs)

    def list(self) -> list[ModelFiles]:
        from modules import detect

        found = [model for model in detect.list_models(self._dirs, self._headers) if model.id not in self._builtin]
        elsewhere = self._remotes.models() if self._remotes is not None else []
        return [*found, *self._admitted.values(), *elsewhere, *self._builtin.values()]

    def find(self, name: str) -> ModelFiles:
        from modules import detect

        if self._remotes is not None and name.startswith(PREFIX):
            return self._remotes.find(name)
        return self._builtin.get(name) or self._admitted.get(name) or detect.find_model(name, self._dirs, cache=self._headers)

    def admit(self, name: str) -> ModelFiles:
        """Find a model for the operator, who may also name a path outside the folders; such a model then counts as listed.

        Raises ModelNotFound.
        """
        from modules import detect

        if name in self._builtin or name.startswith(PREFIX):
            return self.find(name)
        model = detect.find_model(name, self._dirs, allow_paths=True, cache=self._headers)
        if all(model.id != listed.id for listed in detect.list_models(self._dirs, self._headers)):
            self._admitted[model.id] = model
        return model

    def check(self, model: ModelFiles) -> None:
        from modules import detect

        if model.id not in self._builtin and model.format != "remote":
            detect.check(model.path)

    def bundled(self) -> Sequence[ModelFiles]:
        """The models that come with the product, echo left out."""
        return [model for model in self.list() if model.bundled and model.format != "echo" and not model.problem]

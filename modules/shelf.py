"""The model files under the user's eyes: rename, put into the trash, take out again, empty it.

A model is a folder, a file, or a GGUF's parts. The trash is the folder `_trash` in the model's own root, so that nothing is
copied and no model list looks into it: _trash/ID/info.json says what lies beside it in _trash/ID/files. All of it is file work:
call it in a thread.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import Conflict, InvalidParameter, NotFound, StorageError
from modules.overlays import read_json, write_json
from modules.paths import confine
from modules.yaml_file import save_error

if TYPE_CHECKING:
    from modules.library import LocalLibrary
    from modules.schema import ModelFiles
    from modules.settings import ModelSettings

TRASH = "_trash"
_ID = re.compile(r"[0-9a-f]{12}")
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.[^.]+$)")


@dataclass(frozen=True, slots=True)
class Trashed:
    """`names` are the files and folders below `parent`, which is relative to the model folder; `deleted_at` seconds UTC."""

    id: str
    model: str
    parent: str
    names: list[str]
    size_bytes: int
    deleted_at: float
    settings: dict[str, Any] = field(default_factory=dict)


class Shelf:
    """Over the library's folders. Whether a model is in use is the caller's to ask before."""

    def __init__(self, library: LocalLibrary, settings: ModelSettings) -> None:
        self._library = library
        self._settings = settings

    def parts(self, model: ModelFiles) -> tuple[Path, list[Path]]:
        """(model folder, what belongs to the model). Raises Conflict for what is not the user's to move."""
        if model.bundled:
            raise Conflict(f"{model.id} comes with Switchyard; an update would bring it back.")
        path = Path(model.path)
        root = next((root for root in self._library.dirs if path != root and path.is_relative_to(root)), None)
        if root is None:
            raise Conflict(f"{model.id} is in no model folder.", hint="Move it with your own file manager.")
        if path.is_dir():
            inner = [
                other.id for other in self._library.list() if other.path != model.path and Path(other.path).is_relative_to(path)
            ]
            if inner:
                raise Conflict(f"{inner[0]} lies in the folder of {model.id}.", hint="Delete or rename that one first.")
            return root, [path]
        match = _PART.search(path.name)
        if match is None:
            return root, [path]
        start, end = path.name[: match.start()], path.name[match.end() :]
        wanted = re.compile(re.escape(start) + r"-\d{5}-of-" + match[2] + re.escape(end))
        return root, sorted(part for part in path.parent.iterdir() if wanted.fullmatch(part.name))

    def projector(self, model: ModelFiles) -> Path | None:
        """The model's projector, unless another model in its folder uses it, too."""
        if model.projector is None:
            return None
        path = Path(model.path).with_name(model.projector)
        others = (m for m in self._library.list() if m.projector == model.projector and m.path != model.path)
        return None if any(Path(other.path).parent == path.parent for other in others) else path

    def rename(self, model: ModelFiles, name: str) -> str:
        """Give it another name below its model folder; its saved settings come along. The new id.

        `name` may have folders in it; a file keeps its suffix. Raises InvalidParameter, Conflict, StorageError.
        """
        root, parts = self.parts(model)
        suffix = "" if parts[0].is_dir() else parts[0].suffix
        wanted = confine(root, name.removesuffix(suffix) + suffix, nested=True)
        if wanted.relative_to(root).parts[0].startswith(("_", ".")):
            raise InvalidParameter("The name begins with _ or a dot: models of such names are not listed.", param="name")
        targets = [wanted]
        if len(parts) > 1 or _PART.search(parts[0].name):
            targets = [wanted.with_name(wanted.stem + str(_PART.search(part.name)[0]) + suffix) for part in parts]  # type: ignore[index]
        for part, target in zip(parts, targets, strict=True):
            if target.exists() and not target.samefile(part):
                raise Conflict(f"{target.name} exists already.", hint="Choose another name.")
        moves = list(zip(parts, targets, strict=True))
        projector = self.projector(model)
        if projector is not None and targets[0].parent != projector.parent:
            moves.append((projector, targets[0].with_name(projector.name)))
        self._move(moves)
        new = targets[0].relative_to(root).as_posix()
        self._settings.rename(model.id, new)
        return new

    def trash(self, model: ModelFiles) -> Trashed:
        """Put it into the trash, its saved settings with it. Raises Conflict, StorageError."""
        root, parts = self.parts(model)
        projector = self.projector(model)
        shared = 0
        if projector is not None:
            parts = [*parts, projector]
        elif model.projector is not None:
            shared = Path(model.path).with_name(model.projector).stat().st_size
        entry = Trashed(
            secrets.token_hex(6),
            model.id,
            parts[0].parent.relative_to(root).as_posix(),
            [part.name for part in parts],
            model.size_bytes - shared,
            time.time(),
            self._settings.entry(model.id),
        )
        place = root / TRASH / entry.id
        try:
            write_json(place / "info.json", asdict(entry))
        except OSError as error:
            raise save_error("The trash", error) from error
        self._move([(part, place / "files" / part.name) for part in parts])
        self._settings.forget(model.id)
        return entry

    def trashed(self) -> list[Trashed]:
        """What is in the trash, the newest first."""
        found = []
        for root in self._library.dirs:
            for info in (root / TRASH).glob("*/info.json"):
                entry = self._read(info)
                if entry is not None:
                    found.append(entry)
        return sorted(found, key=lambda entry: -entry.deleted_at)

    def restore(self, entry_id: str) -> str:
        """Put it back where it was, with its settings. The id. Raises NotFound, Conflict, StorageError."""
        root, place, entry = self._entry(entry_id)
        parent = root if entry.parent in ("", ".") else confine(root, entry.parent, nested=True)
        moves = [(place / "files" / name, confine(parent, name)) for name in entry.names]
        for _, target in moves:
            if target.exists():
                raise Conflict(f"{target.name} is there again.", hint="Rename that one first.")
        self._move(moves)
        shutil.rmtree(place, ignore_errors=True)
        self._settings.put_back(entry.model, entry.settings)
        return entry.model

    def empty(self, entry_id: str | None = None) -> int:
        """Delete one entry, or everything in the trash, for good. The bytes that were freed. Raises NotFound, StorageError."""
        wanted = self.trashed() if entry_id is None else [self._entry(entry_id)[2]]
        freed = 0
        for entry in wanted:
            place = self._entry(entry.id)[1]
            freed += entry.size_bytes
            try:
                shutil.rmtree(place)
            except OSError as error:
                raise save_error(entry.model, error) from error
        return freed

    # --- the files of the trash -----------------------------------------------------------------------------------

    def _entry(self, entry_id: str) -> tuple[Path, Path, Trashed]:
        if _ID.fullmatch(entry_id):
            for root in self._library.dirs:
                place = root / TRASH / entry_id
                entry = self._read(place / "info.json")
                if entry is not None:
                    return root, place, entry
        raise NotFound("There is no such model in the trash.", param="id")

    @staticmethod
    def _read(info: Path) -> Trashed | None:
        """None for what is no entry of ours: it is neither shown nor deleted."""
        data = read_json(info)
        names = data.get("names")
        good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if not good or data.get("id") != info.parent.name or not _ID.fullmatch(info.parent.name):
            return None
        try:
            return Trashed(
                str(data["id"]), str(data["model"]), str(data["parent"]), list(data["names"]), int(data["size_bytes"]),
                float(data["deleted_at"]), dict(data.get("settings") or {}),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            return None

    @staticmethod
    def _move(moves: list[tuple[Path, Path]]) -> None:
        """All or nothing. Raises StorageError."""
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
                done.append((source, target))
        except OSError as error:
            for source, target in reversed(done):
                target.rename(source)
            raise StorageError(
                f"{moves[len(done)][0].name} can't be moved: {error.strerror or error}.",
                hint="Another program may have it open, or the folder can't be written.",
            ) from error

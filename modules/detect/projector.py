"""The projector (mmproj) of a GGUF model: the file beside it that turns images into what the model reads.

What a file is, its content says. Which of several projectors in a folder a model gets is by their names, as their content
names no model: the one that is called like the model; where the folder holds forms of one model only, any.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from modules.detect.ggml_types import FILE_TYPES, GGUF_TYPE
from modules.detect.gguf_header import first_keys, read_gguf_header
from modules.errors import CorruptModel, IncompatibleModel, LoadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modules.detect.gguf_header import GgufHeader, Scalar
    from modules.schema import ModelFiles

ARCHITECTURES = frozenset({"clip", "mmproj"})
_PREFERRED = ("F16", "BF16", "Q8_0", "F32")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Words in the names of projectors and of quantisations that say nothing about the model.
_NO_NAME = re.compile(r"(?<![a-z0-9])(mmproj|projector|model|ggml|gguf|vision|i1|imat)(?![a-z0-9])")


@dataclass(frozen=True, slots=True)
class Projector:
    """A projector beside a model. `problem` says why this model can't use it."""

    path: Path
    size_bytes: int
    problem: str | None = None


def is_projector(keys: Mapping[str, Scalar]) -> bool:
    """Whether the first keys of a GGUF are those of a projector, for images or sounds."""
    if keys.get("general.architecture") in ARCHITECTURES or keys.get("general.type") == "mmproj":
        return True
    return keys.get("clip.has_vision_encoder") is True


class Neighbours:
    """The GGUF files of one folder: what each is, and of which model by its name. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".gguf") and e.is_file())
        keys = {name: _keys(folder / name) for name in names}
        self.stems = {name: _stem(name) for name in names}
        self.projectors = [name for name in names if is_projector(keys[name]) and not _of_sounds(keys[name])]
        self.models = {self.stems[name] for name in names if not is_projector(keys[name]) and not _is_companion(keys[name])}


def with_projector(model: ModelFiles, folders: dict[Path, Neighbours] | None = None) -> ModelFiles:
    """A GGUF model as detection describes it, with the projector in its folder as a part of it. `folders` remembers what lies
    in them while many models are asked about."""
    path = Path(model.path)
    if model.format != "gguf" or path.is_dir():
        return model
    found = find_projector(path, folders)
    if found is None:
        return model
    return replace(
        model,
        size_bytes=model.size_bytes + found.size_bytes,
        files=(*model.files, found.path.name),
        projector=found.path.name,
        vision=found.problem is None,
    )


def find_projector(model: Path, folders: dict[Path, Neighbours] | None = None) -> Projector | None:
    """The projector that belongs to the GGUF file `model`, as the files in its folder say."""
    folders = {} if folders is None else folders
    try:
        if model.parent not in folders:
            folders[model.parent] = Neighbours(model.parent)
        found = [_judged(model.parent / name, model) for name in _candidates(model, folders[model.parent])]
    except OSError:
        return None
    return min(found, key=_rank, default=None)


def _candidates(model: Path, near: Neighbours) -> list[str]:
    own = _stem(model.name)
    called_alike = [name for name in near.projectors if near.stems[name] == own]
    return called_alike if called_alike or near.models - {own} else near.projectors


def _judged(path: Path, model: Path) -> Projector:
    try:
        check_projector(path, model)
    except LoadError as error:
        return Projector(path, path.stat().st_size, str(error))
    return Projector(path, path.stat().st_size)


def _rank(found: Projector) -> tuple[bool, int, str]:
    """One that fits before one that does not, 16 bits before others."""
    kind = _keys(found.path).get("general.file_type")
    label = FILE_TYPES.get(kind, "") if isinstance(kind, int) else ""
    place = _PREFERRED.index(label) if label in _PREFERRED else len(_PREFERRED)
    return found.problem is not None, place, found.path.name


def check_projector(path: Path, model: Path) -> None:
    """Raises CorruptModel or IncompatibleModel for a file that is no whole projector for the images of the GGUF `model`."""
    try:
        status = path.stat()
        header = _header(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise IncompatibleModel(
            f"The projector {path.name} can't be read: {error.strerror}.", hint="Check the option mmproj."
        ) from error
    except LoadError as error:
        raise CorruptModel(f"The model's projector can't be used: {error.message}", hint=error.hint) from error
    if not is_projector(header.values):
        raise IncompatibleModel(
            f"{path.name} is no projector (mmproj).", hint="Choose the mmproj file that was published with the model."
        )
    if _of_sounds(header.values):
        raise IncompatibleModel(
            f"{path.name} is a projector for sounds, not for images.", hint="Load the model without it (no_mmproj)."
        )
    own, wanted = _declared_width(header), _width(model)
    if own is not None and wanted is not None and own != wanted:
        raise IncompatibleModel(
            f"{path.name} is the projector of another model: it makes vectors of {own:,} numbers, this model reads {wanted:,}.",
            hint="Get the mmproj file that was published with this model, or load it without one (no_mmproj).",
        )


def _stem(name: str) -> str:
    """What a file's name says of the model: without its type, part and the words of projectors."""
    plain = _SHARD.sub("", name.lower().removesuffix(".gguf"))
    return re.sub(r"[^a-z0-9]", "", _NO_NAME.sub("", GGUF_TYPE.sub("", plain)))


def _keys(path: Path) -> Mapping[str, Scalar]:
    status = path.stat()
    return _keys_of(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8192)
def _keys_of(path: str, size: int, mtime_ns: int) -> Mapping[str, Scalar]:
    return first_keys(Path(path))


@lru_cache(maxsize=256)
def _header(path: str, size: int, mtime_ns: int) -> GgufHeader:
    return read_gguf_header(Path(path))


def _is_companion(keys: Mapping[str, Scalar]) -> bool:
    """What belongs to a model and is none: adapters, importance matrices, vocabularies."""
    return keys.get("general.type") in ("adapter", "imatrix", "vocab")


def _of_sounds(keys: Mapping[str, Scalar]) -> bool:
    return keys.get("clip.has_audio_encoder") is True and keys.get("clip.has_vision_encoder") is not True


def _declared_width(header: GgufHeader) -> int | None:
    """How wide its vectors are. Before general.type was written, the key held something else."""
    return header.integer("clip.vision.projection_dim") if header.text("general.type") == "mmproj" else None


def _width(model: Path) -> int | None:
    keys = _keys(model)
    width = keys.get(f"{keys.get('general.architecture')}.embedding_length")
    return width if type(width) is int else None

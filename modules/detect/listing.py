"""The models under some folders, found by content, and one of them by its name."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from modules.detect.draft import UNFINISHED, folder_files, read_json
from modules.detect.examine import examine
from modules.detect.flexgen import is_flexgen
from modules.detect.projector import Neighbours, with_projector
from modules.detect.sniff import sniff
from modules.errors import CorruptModel, ModelNotFound

if TYPE_CHECKING:
    from modules.detect.remembered import HeaderCache
    from modules.schema import ModelFiles

BUNDLED_FILE = "bundled.json"
MAX_DEPTH = 5
# A link to a whole disk under models/ must not hold the list up.
MAX_FOLDERS = 20_000
MAX_MODELS = 20_000
_MAX_NAME = 300
# A folder with one of these is one model; its other files belong to it.
_FOLDER_MARKS = frozenset({"config.json", "adapter_config.json", "model.safetensors.index.json", "quantize_config.json"})
_SIDECARS = (
    ".json .jsonl .md .txt .py .jinja .yaml .yml .toml .png .jpg .jpeg .gif .webp .svg "
    ".model .log .csv .sh .bat .html .pdf .lock".split()
)
_WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".pth", ".pt", ".ckpt", ".ggml", ".pkl")
_MODEL_KINDS = frozenset({"gguf", "safetensors", "ggml", "torch", "pickle", "lfs", "html"})
_SHARD_PART = "-of-"

Fingerprint = tuple[tuple[str, int, int], ...]


def list_models(dirs: Iterable[Path], cache: HeaderCache | None = None) -> list[ModelFiles]:
    """Every model under `dirs`, broken ones too (`problem` says why), sorted by id.

    The id is the path below its folder with "/". What has not changed on disk is not read again. An id that an earlier
    folder already has gets its folder's name in front. Folders that can't be read are left out. `cache` remembers over a restart.
    A projector (mmproj) is a part of the model beside it, and no model.
    """
    return [model for model in _list_all(dirs, cache) if model.format != "mmproj"]


def _list_all(dirs: Iterable[Path], cache: HeaderCache | None) -> list[ModelFiles]:
    """Models and projectors."""
    found: dict[str, ModelFiles] = {}
    seen: set[str] = set()
    for root in dirs:
        bundled = _bundled(root)
        for path in itertools.islice(_candidates(root, 0, itertools.count()), MAX_MODELS):
            seen.add(str(path))
            files = _examined(path, cache)
            if files is None:
                continue
            name = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
            model = dataclasses.replace(files, id=name, bundled=any(fnmatchcase(name, pattern) for pattern in bundled))
            if name in found:
                model = dataclasses.replace(model, id=f"{root.name}/{name}")
            found.setdefault(model.id, model)
    if cache is not None:
        cache.save(seen)
    with_projectors = {os.path.dirname(model.path) for model in found.values() if model.format == "mmproj"}
    folders: dict[Path, Neighbours] = {}
    models = (with_projector(m, folders) if os.path.dirname(m.path) in with_projectors else m for m in found.values())
    return sorted(models, key=lambda model: model.id.lower())


def find_model(name: str, dirs: Iterable[Path], *, allow_paths: bool = False, cache: HeaderCache | None = None) -> ModelFiles:
    """The model with the id `name`; else the only one whose last part, with or without its suffix, is `name`.

    `allow_paths` (the command line's --model, never the API) also takes a path. Raises ModelNotFound with the nearest ids; the
    answer is the same for a file outside `dirs` and one that is not there.
    """
    roots = list(dirs)
    everything = _list_all(roots, cache)
    models = [model for model in everything if model.format != "mmproj"]
    wanted = unicodedata.normalize("NFC", name).strip().strip("/")
    for model in everything:  # a projector by its own name: `check` says what it is
        if model.id == wanted:
            return model
    folded = wanted.casefold()
    near = [model for model in models if folded in _names(model.id)]
    if len(near) == 1:
        return near[0]
    if allow_paths and name.strip():
        path = Path(name).expanduser()
        if path.exists():
            listed = next((model for model in models if _same(Path(model.path), path)), None)
            return listed or with_projector(examine(path.resolve(), deep=False)[0])
    raise _not_found(name, [model.id for model in near or models], ambiguous=len(near) > 1)


def _names(model_id: str) -> set[str]:
    last = model_id.rpartition("/")[2].casefold()
    whole = model_id.casefold()
    return {whole, last, last.removesuffix(".gguf").removesuffix(".safetensors"), whole.removesuffix(".gguf")}


def _not_found(name: str, ids: list[str], *, ambiguous: bool) -> ModelNotFound:
    shown = name if name.isprintable() and len(name) <= _MAX_NAME and ".." not in name and not name.startswith("/") else ""
    called = f' "{shown}"' if shown else ""
    if ambiguous:
        return ModelNotFound(f"Several models are called{called}.", hint=f"Say which: {', '.join(ids[:5])}.", param="model")
    close = difflib.get_close_matches(name[:_MAX_NAME], ids, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else "See the list of models; put model files under models/ to add one."
    return ModelNotFound(f"There is no model{called}.", hint=hint, param="model")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _bundled(root: Path) -> tuple[str, ...]:
    """Patterns of the ids that ship with the product: bundled.json in the model folder."""
    try:
        ids = read_json(root / BUNDLED_FILE).get("models")
    except (OSError, CorruptModel):  # a folder of the user's own has none
        return ()
    return tuple(item for item in ids if isinstance(item, str)) if isinstance(ids, list) else ()


def _candidates(folder: Path, depth: int, visited: Iterator[int]) -> Iterator[Path]:
    """Paths that may be models: a folder that is one as a whole, or single files. `visited` counts the folders of one walk."""
    if next(visited) >= MAX_FOLDERS:
        return
    try:
        files = folder_files(folder)
        folders = _subfolders(folder)
    except OSError:
        return
    weights = [name for name in files if not name.endswith(tuple(_SIDECARS))]
    if depth and (files.keys() & _FOLDER_MARKS or is_flexgen(files, folder) or _weights_with_tokenizer(files, weights)):
        yield folder
        weights = [name for name in weights if name.endswith(".gguf")]
    for name in weights:
        if _SHARD_PART not in name or "-00001-of-" in name:
            yield folder / name
    if depth < MAX_DEPTH:
        for name in folders:
            yield from _candidates(folder / name, depth + 1, visited)


def _weights_with_tokenizer(files: dict[str, int], weights: list[str]) -> bool:
    has_tokenizer = "tokenizer.json" in files or "tokenizer.model" in files
    return has_tokenizer and any(name.endswith(".safetensors") for name in weights)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] not in "._" and entry.is_dir())


def _examined(path: Path, cache: HeaderCache | None) -> ModelFiles | None:
    try:
        fingerprint = _fingerprint(path)
        # A suffix only gets a broken file into the list, so that its owner sees why; .bin is too common a name for that.
        promises = path.is_dir() or path.name.endswith(_WEIGHT_SUFFIXES)
        if not promises and _sniffed(str(path), fingerprint) not in _MODEL_KINDS:
            return None
    except OSError:  # gone since it was listed, or unreadable: not ours to offer
        return None
    return _inspect_cached(str(path), fingerprint, cache)


def _fingerprint(path: Path) -> Fingerprint:
    """Name, size and time of everything the verdict depends on. A shard's siblings are part of it."""
    if path.is_dir():
        with os.scandir(path) as entries:
            rows = [(e.name, e.stat()) for e in entries if e.is_file() and not e.name.endswith(UNFINISHED)]
        return tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in rows))
    status = path.stat()
    own = (path.name, status.st_size, status.st_mtime_ns)
    if "-00001-of-" in path.name:
        prefix = path.name.split("-00001-of-")[0]
        parts = [(part.name, part.stat()) for part in path.parent.iterdir() if part.name.startswith(prefix)]
        return (own, *sorted((name, status.st_size, status.st_mtime_ns) for name, status in parts))
    return (own,)


@lru_cache(maxsize=8192)
def _inspect_cached(path: str, fingerprint: Fingerprint, cache: HeaderCache | None) -> ModelFiles:
    files = cache.get(path, fingerprint) if cache is not None else None
    if files is None:
        files = examine(Path(path), deep=False)[0]
        if cache is not None:
            cache.put(path, fingerprint, files)
    return files


@lru_cache(maxsize=8192)
def _sniffed(path: str, fingerprint: Fingerprint) -> str:
    return sniff(Path(path))

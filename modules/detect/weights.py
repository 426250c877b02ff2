"""The weight files of a Hugging Face style folder: which ones count, and their headers merged."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from modules.detect.draft import read_json
from modules.detect.safetensors_header import SafetensorsHeader, Tensor, read_safetensors_header, shown
from modules.detect.sniff import no_model, sniff
from modules.errors import CorruptModel, IncompatibleModel, LoadError, UnsafeModel
from modules.paths import name_problem

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64_000_000  # the largest mixtures of experts list 140,000 tensors in 14 MB
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KEPT = 2  # an index and the headers beside it
T = TypeVar("T")
_kept: ContextVar[OrderedDict[Hashable, Any] | None] = ContextVar("kept", default=None)
# Never a model's weights, whatever they hold.
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|rng_state|training_args|scaler|adapter_model|consolidated)\b.*")


@contextlib.contextmanager
def headers_kept() -> Iterator[None]:
    """Within it the headers that were read last are kept, and not read again while their files are as they were: for who looks at
    a model and then plans for it. A large mixture of experts takes a second."""
    token = _kept.set(OrderedDict())
    try:
        yield
    finally:
        _kept.reset(token)


def _once(folder: Path, names: list[str], read: Callable[[], T]) -> T:
    kept = _kept.get()
    if kept is None:
        return read()
    stats = [(folder / name).stat() for name in names]
    key = (str(folder), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)))
    if key not in kept:
        kept[key] = read()
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return kept[key]  # type: ignore[no-any-return]


def find_weights(folder: Path, files: dict[str, int]) -> list[str]:
    """The names of the weight files, in order. Raises when there are none, or when it is unclear which ones count."""
    if INDEX in files:
        return _indexed(folder, files)
    names = [name for name in files if name.endswith(".safetensors") and not _NOT_WEIGHTS.match(name)]
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if len(names) == 1 and not _SHARD.fullmatch(names[0]):
        return names
    if names:
        return _unindexed(names)
    raise _none(folder, files)


def read_weights(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], list[SafetensorsHeader]]:
    """All tensors of the files `names`. Raises CorruptModel for the first one that is damaged or not safetensors at all."""
    return _once(folder, names, lambda: _merged(folder, names))


def _merged(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], list[SafetensorsHeader]]:
    tensors: dict[str, Tensor] = {}
    headers = []
    for name in names:
        header = read_safetensors(folder / name)
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CorruptModel(
                f"Tensor {shown(min(twice))} is in two of the weight files ({name} is the second).", hint="Fetch the model again."
            )
        tensors.update(header.tensors)
        headers.append(header)
    return tensors, headers


def read_safetensors(path: Path) -> SafetensorsHeader:
    """The header of a file that ought to be safetensors; when it is something else, the error says what."""
    kind = sniff(path)
    if kind not in ("safetensors", "other", "json"):
        raise no_model(kind, path.name)
    return read_safetensors_header(path)


def _indexed(folder: Path, files: dict[str, int]) -> list[str]:
    weight_map = _weight_map(folder)
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{INDEX} lists no weights.", hint="Fetch the index again.")
    names: dict[str, None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or (name not in names and name_problem(name)):
            raise UnsafeModel(
                f"{INDEX} puts tensor {shown(tensor)} in {shown(str(name))!r}, which is no file name in the model's folder.",
                hint="The index is damaged or hostile: fetch it again from a source you trust.",
            )
        names[name] = None
    missing = [name for name in names if name not in files]
    if missing:
        raise CorruptModel(
            f"{len(missing)} of {len(names)} weight files are missing, the first is {shown(missing[0])}.",
            hint="Fetch the missing files into the folder (`server.py download OWNER/NAME` fetches what is not there).",
        )
    return sorted(names)


def check_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CorruptModel when the index promises a tensor that no shard holds."""
    absent = sorted(set(_weight_map(folder) or ()) - tensors.keys())
    if absent:
        raise CorruptModel(
            f"{INDEX} lists tensor {shown(absent[0])}, but no weight file holds it.",
            hint="Index and weights differ: fetch both again.",
        )


def _weight_map(folder: Path) -> Any:
    """What the index says, whatever it is."""
    return _once(folder, [INDEX], lambda: read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map"))


def _unindexed(names: list[str]) -> list[str]:
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if len(shards) == len(names) and len({(match[1], match[3]) for match in shards}) == 1:
        count = int(shards[0][3])
        if len(shards) == count:
            raise CorruptModel(
                f"{INDEX} is missing.", hint="Fetch that file into the folder; it says which tensor is in which part."
            )
        raise CorruptModel(
            f"{count - len(shards)} of {count} weight files and {INDEX} are missing.",
            hint="Fetch the missing files into the folder.",
        )
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    raise IncompatibleModel(
        f"The folder holds several weight files ({some}) and nothing says which counts.",
        hint="Keep one of them in the folder, or add the index file they were published with.",
    )


def _none(folder: Path, files: dict[str, int]) -> LoadError:
    pickles = [name for name in files if name.endswith(_PICKLE_SUFFIXES) and not _NOT_WEIGHTS.match(name)]
    if pickles:
        return no_model(sniff(folder / pickles[0]), pickles[0])
    if any(name.endswith(".gguf") for name in files):
        return IncompatibleModel("The folder holds no safetensors weights.", hint="Load the .gguf file in it instead.")
    return CorruptModel("The folder holds a configuration, but no weights.", hint="Fetch the .safetensors files into it.")

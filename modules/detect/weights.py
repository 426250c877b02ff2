"""The weight files of a Hugging Face style folder: which ones count, and their headers merged."""

from __future__ import annotations

import re
from pathlib import Path

from modules.detect.draft import read_json
from modules.detect.safetensors_header import SafetensorsHeader, Tensor, read_safetensors_header, shown
from modules.detect.sniff import no_model, sniff
from modules.errors import CorruptModel, IncompatibleModel, LoadError, UnsafeModel
from modules.paths import name_problem

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64_000_000  # the largest mixtures of experts list 140,000 tensors in 14 MB
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Never a model's weights, whatever they hold.
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|rng_state|training_args|scaler|adapter_model|consolidated)\b.*")


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
    weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{INDEX} lists no weights.", hint="Fetch the index again.")
    names: dict[str, None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name_problem(name):
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
    weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    absent = sorted(set(weight_map or ()) - tensors.keys())
    if absent:
        raise CorruptModel(
            f"{INDEX} lists tensor {shown(absent[0])}, but no weight file holds it.",
            hint="Index and weights differ: fetch both again.",
        )


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

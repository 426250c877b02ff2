"""OPT's weights as NumPy arrays, from FlexGen's folder of arrays or from safetensors. For workers and the converter's child.

Arrays are memory-mapped where the format allows, so that reading one costs its pages and no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from modules.detect.config_keys import CONFIG_FILES, refuse_code
from modules.detect.draft import folder_files, read_json
from modules.detect.flexgen import array_header, is_flexgen
from modules.detect.opt import OptShape, opt_shape, source_name
from modules.detect.weights import INDEX, check_index, find_weights, read_safetensors
from modules.errors import CorruptModel, IncompatibleModel

if TYPE_CHECKING:
    from modules.detect.safetensors_header import Tensor

Array = npt.NDArray[Any]
_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Weights(Protocol):
    """The tensors of one OPT, by FlexGen's names."""

    shape: OptShape

    def array(self, name: str) -> Array:
        """The values, float16 or float32 (bfloat16 comes as float32, which holds it exactly). Read-only."""

    def file(self, name: str) -> Path | None:
        """The .npy file that holds exactly these values, where there is one."""


class NpyWeights:
    """FlexGen's own layout. Raises CorruptModel for an array that is missing, torn or of another shape."""

    def __init__(self, folder: Path, shape: OptShape) -> None:
        self.shape = shape
        self._paths: dict[str, Path] = {}
        files = folder_files(folder)
        for name, expected in shape.tensors().items():
            found = next((n for n in (name, f"{name}.npy") if n in files), None)
            if found is None and shape.default(name) is None:
                raise CorruptModel(
                    f"{name} is missing from the folder.", hint="Convert the model again: it adds what is missing."
                )
            if found is not None:
                header = array_header(folder / found, files[found])
                if header.shape != expected:
                    raise _mismatch(found, header.shape, expected)
                if header.dtype not in ("<f2", "<f4") or header.fortran:
                    problem = f"{found} holds {header.dtype} numbers; FlexGen reads float16 and float32."
                    raise CorruptModel(problem, hint="Convert the model again.")
                self._paths[name] = folder / found

    def file(self, name: str) -> Path | None:
        return self._paths.get(name)

    def array(self, name: str) -> Array:
        path = self._paths.get(name)
        if path is None:
            return _filled(self.shape, name)
        try:
            values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return values
        except (ValueError, OSError, EOFError) as error:
            raise CorruptModel(f"{path.name} can't be read: {error}.", hint="Convert the model again.") from error


class SafetensorsWeights:
    """A Hugging Face folder. Raises CorruptModel for a tensor that is missing or of another shape."""

    def __init__(self, folder: Path, shape: OptShape) -> None:
        self.shape = shape
        files = folder_files(folder)
        where: dict[str, tuple[Path, int, Tensor]] = {}
        for file_name in find_weights(folder, files):
            path = folder / file_name
            header = read_safetensors(path)
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            where |= {name: (path, start, tensor) for name, tensor in header.tensors.items()}
        if INDEX in files:
            check_index(folder, {name: tensor for name, (_, _, tensor) in where.items()})
        self._found: dict[str, tuple[Path, int, Tensor]] = {}
        for name, expected in shape.tensors().items():
            source = source_name(name, where)
            if source is None:
                if shape.default(name) is None:
                    raise CorruptModel(f"Tensor {name} is missing from the weights.", hint="Fetch the model again.")
                continue
            tensor = where[source][2]
            if tensor.shape != expected:
                raise _mismatch(source, tensor.shape, expected)
            if tensor.dtype not in _FLOATS and tensor.dtype != "BF16":
                raise IncompatibleModel(
                    f"Tensor {source} holds {tensor.dtype} numbers; FlexGen takes full-precision weights only.",
                    hint="Use the model's float16 version; FlexGen compresses it itself (compress_weight).",
                )
            self._found[name] = where[source]

    def file(self, name: str) -> Path | None:
        return None

    def array(self, name: str) -> Array:
        if name not in self._found:
            return _filled(self.shape, name)
        path, start, tensor = self._found[name]
        offset = start + tensor.begin
        if tensor.dtype == "BF16":  # the upper half of a float32
            raw = np.memmap(path, np.uint16, "r", offset, tensor.shape)
            return (raw.astype(np.uint32) << 16).view(np.float32)
        values: Array = np.memmap(path, _FLOATS[tensor.dtype], "r", offset, tensor.shape)
        return values.astype(np.float32) if tensor.dtype == "F64" else values


def check_config(folder: Path) -> dict[str, Any]:
    """config.json, once nothing in the folder's JSON would run code. Raises CorruptModel, UnsafeModel."""
    files = folder_files(folder)
    if "config.json" not in files:
        raise CorruptModel(
            "The folder has no config.json, so the model's shape is unknown.",
            hint="Copy config.json and the tokenizer of the same OPT into it, or convert the model again.",
        )
    contents = {name: read_json(folder / name) for name in CONFIG_FILES if name in files}
    for name, content in contents.items():
        refuse_code(name, content)
    return contents["config.json"]


def open_weights(folder: Path) -> Weights:
    """The weights of an OPT in either layout, all shapes checked. Raises LoadError's subclasses."""
    shape = opt_shape(check_config(folder))
    return NpyWeights(folder, shape) if is_flexgen(folder_files(folder), folder) else SafetensorsWeights(folder, shape)


def _filled(shape: OptShape, name: str) -> Array:
    return np.full(shape.tensors()[name], shape.default(name), np.float32)


def _mismatch(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CorruptModel:
    def by(sides: tuple[int, ...]) -> str:
        return " × ".join(map(str, sides))

    return CorruptModel(
        f"{name} is {by(found)}, but config.json says {by(expected)}.",
        hint="The folder mixes files of two models: fetch or convert it again.",
    )

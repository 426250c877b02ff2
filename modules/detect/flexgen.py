"""FlexGen's weights: a folder with one NumPy array per tensor, named after the tensor."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from pathlib import Path

from modules.detect.config_keys import refuse_code
from modules.detect.draft import Draft, folder_files, read_json
from modules.detect.opt import opt_shape
from modules.detect.sniff import kind_of, numpy_header
from modules.errors import CorruptModel, UnsafeModel

_EMBEDDING = "decoder.embed_tokens.weight"
_AGAIN = "Convert the OPT model for FlexGen again."
_FIRST_LAYER = "decoder.layers.0.self_attn.q_proj.weight"


def is_flexgen(files: dict[str, int], folder: Path) -> bool:
    """Whether the arrays FlexGen reads first are there, and arrays they are."""
    name = next((name for name in (_EMBEDDING, _EMBEDDING + ".npy") if name in files), None)
    if name is None:
        return False
    with (folder / name).open("rb") as file:
        return kind_of(file.read(16)) == "npy"


def examine_flexgen(path: Path, draft: Draft) -> None:
    """Fill `draft`; raise UnsafeModel for an array of Python objects, CorruptModel for one that is cut."""
    draft.format = "flexgen"
    draft.architecture = "OPTForCausalLM"
    files = folder_files(path)
    draft.files = list(files)
    draft.size_bytes = sum(files.values())
    draft.parameters = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in files.items():
        if not name.startswith("decoder."):
            continue
        shape = shapes[name.removesuffix(".npy")] = array_header(path / name, size).shape
        draft.parameters += math.prod(shape)
        if name.startswith(_EMBEDDING) and shape:
            draft.vocab_size = shape[0]
        if name.startswith("decoder.embed_positions") and shape:
            draft.context_length = max(shape[0] - 2, 1)  # OPT's table has two rows for padding
    if not any(name.startswith(_FIRST_LAYER) for name in files):
        raise CorruptModel(f"{_FIRST_LAYER} is missing from the folder.", hint=_AGAIN)
    if "config.json" not in files:  # it is written last
        raise CorruptModel(
            "config.json is missing: the conversion was not finished, or the arrays came without it.",
            hint="Convert the model again, which goes on where it stopped, or copy the OPT's config.json and tokenizer here.",
        )
    config = read_json(path / "config.json")
    refuse_code("config.json", config)
    draft.has_chat_template = "chat_template.jinja" in files
    opt = opt_shape(config)
    for name, expected in opt.tensors().items():
        if name not in shapes and opt.default(name) is None:
            raise CorruptModel(f"{name} is missing from the folder.", hint=_AGAIN)
        found = shapes.get(name, expected)
        if found != expected:
            raise CorruptModel(f"{name} is {found}, but config.json says {expected}.", hint=_AGAIN)


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What the head of an .npy file says. `dtype` is NumPy's descriptor, such as "<f2"; `begin` is where the data starts."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    begin: int


def array_header(path: Path, size: int) -> ArrayHeader:
    """The header of the array in a file of `size` bytes. Raises UnsafeModel for Python objects, CorruptModel when it is cut."""
    with path.open("rb") as file:
        head = file.read(4096)
    text = ""
    try:
        text, begin = numpy_header(head) if kind_of(head) == "npy" else ("", 0)
        header = ast.literal_eval(text)
        if not isinstance(header, dict):
            raise ValueError("no header")
        descr, shape, fortran = str(header["descr"]), tuple(header["shape"]), bool(header["fortran_order"])
        width = int(descr[2:])
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError("no shape")
        expected = begin + math.prod(shape) * width
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        if "O" in text.split("fortran")[0]:
            raise UnsafeModel(
                f"{path.name} is an array of Python objects, which can run code when it is opened.",
                hint="Convert the model again.",
            ) from error
        raise CorruptModel(f"{path.name} is no NumPy array or is cut.", hint="Convert the model again.") from error
    if size < expected:
        raise CorruptModel(
            f"{path.name}: file incomplete: {size:,} of at least {expected:,} bytes.", hint="Convert the model again."
        )
    return ArrayHeader(descr, shape, fortran, begin)

"""RWKV weights, by their tensors. Its `.pth` files are pickles: their names are read without running them.

Tensor names and shapes are those of the RWKV-LM training code (Apache-2.0), which the rwkv package reads: facts of the format.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.errors import CorruptModel, IncompatibleModel

# A pickle of a few thousand tensors takes about 100 bytes for each.
_MAX_PICKLE = 8_000_000


Shape = tuple[int, ...]
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_NORM = "ln1.weight ln1.bias ln2.weight ln2.bias"
_MATRICES = "att.key.weight att.value.weight att.receptance.weight att.output.weight"
_FFN = "ffn.key.weight ffn.value.weight"
_LN_X = "att.ln_x.weight att.ln_x.bias"
# What each layer must have beside norms and matrices. A name without a dot belongs to `att.`.
_LAYER: dict[str, str] = {
    "4": f"{_FFN} ffn.receptance.weight ffn.time_mix_k ffn.time_mix_r time_decay time_first time_mix_k time_mix_v time_mix_r",
    "6": f"{_FFN} ffn.receptance.weight ffn.time_maa_k ffn.time_maa_r {_LN_X} att.gate.weight time_decay time_maa_x time_maa_w "
    "time_maa_k time_maa_v time_maa_r time_maa_g time_maa_w1 time_maa_w2 time_decay_w1 time_decay_w2",
    "7": f"{_FFN} ffn.x_k {_LN_X} x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 g1 g2 k_k k_a r_k",
}
_LAYER["5"] = f"{_FFN} ffn.receptance.weight ffn.time_mix_k ffn.time_mix_r {_LN_X} time_decay time_mix_k time_mix_v time_mix_r"
_LAYER["5.1"] = _LAYER["5.2"] = f"{_LAYER['5']} att.gate.weight time_mix_g"
_LATER_LAYERS = {"7": "v0 v1 v2"}  # not in the first layer
_EITHER = ("time_first", "time_faaaa")  # the bonus of v5 and v6 under its old or its new name


@dataclass(frozen=True, slots=True)
class RwkvShape:
    """Version ("4", "5", "5.1", "5.2", "6", "7") and sizes of an RWKV model. `heads` is 0 for v4, which has none."""

    version: str
    layers: int
    hidden: int
    vocab: int
    heads: int


def rwkv_shape(shapes: Mapping[str, Shape]) -> RwkvShape:
    """The version and sizes that these tensors make up, from their names and shapes alone.

    Raises IncompatibleModel when they are another model's, CorruptModel when some are missing or do not fit each other.
    """
    if not looks_like_rwkv(shapes):
        raise IncompatibleModel(
            "These weights are not RWKV's: there is no emb.weight with blocks.0.att beside it.",
            hint="Choose another backend for this model; RWKV runs RWKV files only.",
        )
    version = _version(shapes)
    embedding = shapes["emb.weight"]
    if len(embedding) != 2:
        raise CorruptModel("The tensor emb.weight is no matrix.", hint="Fetch the model again.")
    vocab, hidden = embedding
    layers = 1 + max(int(match[1]) for name in shapes if (match := _BLOCK.match(name)))
    expected = _expected(version, layers, hidden, vocab, shapes)
    for name, shape in expected.items():
        if name not in shapes:
            raise CorruptModel(
                f"The tensor {name} of an RWKV v{version} model is missing.", hint="The file is incomplete: fetch it again."
            )
        if shape is not None and _squeezed(shapes[name]) != shape:
            raise CorruptModel(
                f"The tensor {name} has shape {list(shapes[name])}, not {list(shape)}.",
                hint="The file is damaged: fetch it again.",
            )
    return RwkvShape(version, layers, hidden, vocab, _heads(version, shapes))


def _version(shapes: Mapping[str, Shape]) -> str:
    """As the rwkv package tells them apart, by the tensors of all layers: one that is missing makes no older version."""
    held = {name.split(".", 3)[3] for name in shapes if _BLOCK.match(name) and name.split(".", 3)[2] == "att"}
    if "r_k" in held:
        return "7"
    if any(name.startswith("time_maa") for name in held):
        return "6"
    if not any(name.startswith("ln_x.") for name in held):
        return "4"
    if not held & {"gate.weight", "time_mix_g"}:
        return "5"
    decays = (shape for name, shape in shapes.items() if name.endswith(".att.time_decay"))
    return "5.2" if any(len(_squeezed(shape)) > 1 for shape in decays) else "5.1"


def _heads(version: str, shapes: Mapping[str, Shape]) -> int:
    if version == "4":
        return 0
    if version == "7":
        return shapes["blocks.0.att.r_k"][0]  # all of them are there by now
    name = next((f"blocks.0.att.{n}" for n in _EITHER if f"blocks.0.att.{n}" in shapes), "blocks.0.att.time_decay")
    return shapes[name][0]


def _expected(version: str, layers: int, hidden: int, vocab: int, shapes: Mapping[str, Shape]) -> dict[str, Shape | None]:
    """Every tensor that must be there, with its shape without sides of 1; None where the sizes are free."""
    wanted: dict[str, Shape | None] = {
        "blocks.0.ln0.weight": (hidden,),
        "blocks.0.ln0.bias": (hidden,),
        "ln_out.weight": (hidden,),
        "ln_out.bias": (hidden,),
        "head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        names = f"{_NORM} {_MATRICES} {_LAYER[version]} {_LATER_LAYERS.get(version, '') if layer else ''}".split()
        for name in names:
            full = f"blocks.{layer}.{name if '.' in name else 'att.' + name}"
            wanted[full] = (hidden,) if name in _NORM or (".time_m" in full and not full.endswith(("w1", "w2"))) else None
        attention = shapes.get(f"blocks.{layer}.att.key.weight", ())
        if len(attention) == 2:
            wanted[f"blocks.{layer}.att.key.weight"] = (attention[0], hidden)
            wanted[f"blocks.{layer}.att.output.weight"] = (hidden, attention[0])
        inner = shapes.get(f"blocks.{layer}.ffn.key.weight", ())
        if len(inner) == 2:
            wanted[f"blocks.{layer}.ffn.key.weight"] = (inner[0], hidden)
            wanted[f"blocks.{layer}.ffn.value.weight"] = (hidden, inner[0])
        if version in ("5", "5.1", "5.2", "6") and not any(f"blocks.{layer}.att.{n}" in shapes for n in _EITHER):
            wanted[f"blocks.{layer}.att.{_EITHER[0]}"] = None
    return wanted


def _squeezed(shape: Shape) -> Shape:
    return tuple(side for side in shape if side != 1)


def looks_like_rwkv(names: Iterable[str]) -> str | None:
    """The architecture ("rwkv4" to "rwkv7") when these are the tensors of an RWKV model, else None."""
    held = set(names)
    if "emb.weight" not in held or not any(name.startswith("blocks.0.att.") for name in held):
        return None
    parts = {name.removeprefix("blocks.0.att.") for name in held if name.startswith("blocks.0.att.")}
    if "r_k" in parts or "w0" in parts:
        return "rwkv7"
    if "time_maa_x" in parts or "time_maa_w1" in parts:
        return "rwkv6"
    if "gate.weight" in parts or "ln_x.weight" in parts:
        return "rwkv5"
    return "rwkv4"


def names_in_pickle(path: Path) -> list[str]:
    """The strings in a torch.save file, read from its opcodes. Nothing is unpickled, no class is imported.

    An empty list when the file is no such archive, is larger than any model's table, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((item for item in archive.infolist() if item.filename.endswith("/data.pkl")), None)
            if member is None or member.file_size > _MAX_PICKLE:
                return []
            with archive.open(member) as file:
                raw = file.read(_MAX_PICKLE)
        return [value for _, value, _ in pickletools.genops(raw) if isinstance(value, str)]
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError, EOFError, OSError, RuntimeError, UnicodeError):
        # The file is refused as a pickle anyway; its names would only have made the message better.
        return []

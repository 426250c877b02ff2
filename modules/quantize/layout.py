"""What each packed layer of a GPTQ file holds, from the header of the file alone. Standard library only.

Read are AutoGPTQ's v1 ("gptq", zero − 1 in `qzeros`) and v2 ("gptq_v2"), GPTQ-for-LLaMa's files without any settings, those
without `g_idx`, and the oldest, with `zeros` as float numbers (w = scale · code − zeros, one group per column). Which layers
are quantised, and with how many bits, is what the tensors say; configuration files decide only what shapes can't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modules.detect.safetensors_header import Tensor, shown
from modules.errors import CorruptModel, IncompatibleModel
from modules.quantize.settings import BITS, period

_HINT = "Fetch the file again, or quantise the original model again."
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One packed layer. `zeros`: "v1" and "v2" are packed integers, "float" the oldest form."""

    name: str
    bits: int
    in_features: int
    out_features: int
    groups: int
    zeros: Literal["v1", "v2", "float"]
    has_g_idx: bool
    has_bias: bool

    @property
    def group_size(self) -> int:
        """Inputs per group, where groups are regular."""
        return -(-self.in_features // self.groups)

    @property
    def zeros_name(self) -> str:
        return f"{self.name}.zeros" if self.zeros == "float" else f"{self.name}.qzeros"


def zero_convention(config: Mapping[str, Any]) -> Literal["v1", "v2"]:
    """v1 unless the configuration says gptq_v2. Raises IncompatibleModel for repacked formats."""
    named = str(config.get("checkpoint_format") or "gptq").lower()
    if config.get("is_marlin_format") or named == "marlin":
        raise IncompatibleModel(
            "The checkpoint is repacked for the Marlin kernels, which only run on CUDA.",
            hint="Get the model's plain GPTQ version (checkpoint_format gptq).",
        )
    if named not in ("gptq", "gptq_v2"):
        raise IncompatibleModel(f"The checkpoint's format is {shown(named)}, not gptq or gptq_v2.")
    return "v2" if named == "gptq_v2" else "v1"


def read_layouts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], in_features: Callable[[str], int | None]
) -> dict[str, LayerLayout]:
    """Every packed layer by its name. `in_features(name)` is the model's own width of a layer, or None.

    Raises CorruptModel, naming the tensor, when a layer's tensors don't fit each other or the model.
    """
    convention = zero_convention(config)
    found = {}
    for key in tensors:
        stem, _, kind = key.rpartition(".")
        if kind == "qweight":
            found[stem] = _layer(stem, tensors, config, in_features(stem), convention)
    if not found:
        raise CorruptModel("The file holds no packed layer (no tensor called qweight).", hint="It is no GPTQ checkpoint.")
    return found


def _layer(
    stem: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], width: int | None, convention: Literal["v1", "v2"]
) -> LayerLayout:
    packed = tensors[f"{stem}.qweight"]
    if packed.dtype not in ("I32", "U32") or len(packed.shape) != 2 or not all(packed.shape):
        raise _broken(f"{stem}.qweight", f"is {packed.dtype} {list(packed.shape)}, not a matrix of packed 32-bit words")
    rows, out = packed.shape
    scales = _need(stem, "scales", tensors)
    if scales.dtype not in _FLOATS:
        raise _broken(f"{stem}.scales", f"is {scales.dtype}, not float numbers")
    order = tensors.get(f"{stem}.g_idx")
    if order is not None and not order.elements:  # GPTQ-for-LLaMa writes an empty one in places
        order = None
    old = f"{stem}.zeros" in tensors and f"{stem}.qzeros" not in tensors
    zeros = _need(stem, "zeros" if old else "qzeros", tensors)
    bits = _bits(stem, rows, out, config, order.elements if order else width, None if old else zeros)
    inputs = rows * 32 // bits
    if width is not None and width != inputs:
        raise _broken(f"{stem}.qweight", f"holds {inputs} inputs of {bits} bits; the model's layer has {width}")
    if order is not None and order.elements != inputs:
        raise _broken(f"{stem}.g_idx", f"has {order.elements} entries for {inputs} inputs")
    groups = 1 if old else _groups(stem, scales, out)
    if old:
        if scales.elements != out or zeros.elements != out:
            raise _broken(f"{stem}.zeros", f"and scales have {zeros.elements} and {scales.elements} numbers for {out} outputs")
    elif zeros.shape != (groups, out * bits // 32) or zeros.dtype not in ("I32", "U32"):
        raise _broken(f"{stem}.qzeros", f"is {zeros.dtype} {list(zeros.shape)}, expected I32 {[groups, out * bits // 32]}")
    if groups > inputs:
        raise _broken(f"{stem}.scales", f"has {groups} groups for {inputs} inputs")
    bias = tensors.get(f"{stem}.bias")
    if bias is not None and bias.elements != out:
        raise _broken(f"{stem}.bias", f"has {bias.elements} numbers for {out} outputs")
    return LayerLayout(stem, bits, inputs, out, groups, "float" if old else convention, order is not None, bias is not None)


def _bits(stem: str, rows: int, out: int, config: Mapping[str, Any], inputs: int | None, qzeros: Tensor | None) -> int:
    """Bits by the shapes; by the settings only where no shape tells."""
    if inputs:
        found, rest = divmod(rows * 32, inputs)
        bits = 0 if rest else found
    elif qzeros is not None and len(qzeros.shape) == 2:
        bits = qzeros.shape[1] * 32 // out
    else:
        bits = config.get("bits") or 0
    if bits not in BITS or rows % period(bits)[1]:
        raise _broken(f"{stem}.qweight", f"has {rows} rows of words, which no width of {', '.join(map(str, BITS))} bits explains")
    return int(bits)


def _groups(stem: str, scales: Tensor, out: int) -> int:
    shape = scales.shape if len(scales.shape) == 2 else (1, scales.elements)
    if shape[1] != out or not shape[0]:
        raise _broken(f"{stem}.scales", f"is {list(scales.shape)}, expected [groups, {out}]")
    return shape[0]


def _need(stem: str, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    found = tensors.get(f"{stem}.{kind}")
    if found is None:
        raise _broken(f"{stem}.{kind}", "is missing")
    return found


def _broken(tensor: str, what: str) -> CorruptModel:
    return CorruptModel(f"Tensor {shown(tensor)} {what}.", hint=_HINT)

"""Which quantization a set of tensors holds. What the file holds counts; configuration files only add settings.

Layouts: GPTQ packs `qweight` int32 [in·bits/32, out] with `qzeros`, `scales` [groups, out] and mostly `g_idx`; AWQ has the same
names but packs along the other side, `qweight` [in, out·bits/32]; EXL2 has `q_weight` and `q_groups`; EXL3 has `trellis`;
bitsandbytes has `weight.quant_state.bitsandbytes__nf4` and `weight.absmax`, or `SCB` for 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.detect.draft import integer
from modules.detect.safetensors_header import Tensor, shown
from modules.errors import CorruptModel
from modules.schema import ModelFormat, Quantization

Tensors = Mapping[str, Tensor]
_FORMAT_OF: dict[str, ModelFormat] = {"gptq": "gptq", "awq": "awq", "exl2": "exl2", "exl3": "exl3"}
_OTHER_NAMES = {"bitsandbytes": "bnb", "bnb": "bnb", "gptq_v2": "gptq", "marlin": "gptq"}


def method_of(tensors: Tensors) -> str | None:
    """gptq, awq, exl2, exl3, bnb or fp8 by names, shapes and types; None for plain weights."""
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = tensors.get(f"{stem}.scales") or tensors.get(f"{stem}.zeros")
            if scales and len(scales.shape) == len(tensor.shape) == 2 and scales.shape[1] > tensor.shape[1]:
                return "awq"
            return "gptq"
        if kind in ("q_weight", "q_invperm"):
            return "exl2"
        if kind == "trellis":
            return "exl3"
        if ".quant_state.bitsandbytes__" in name or kind in ("absmax", "SCB"):
            return "bnb"
        if kind == "weight" and tensor.dtype.startswith("F8_E4M3"):
            return "fp8"
    return None


def format_of(method: str | None) -> ModelFormat:
    """The model format for a method: what transformers reads by itself (bnb, fp8, …) stays "hf"."""
    return _FORMAT_OF.get(method or "", "hf")


def declared_method(config: Mapping[str, Any]) -> str | None:
    """The method a quantization configuration names, in our words; AutoGPTQ's old files name none."""
    named = config.get("quant_method") or config.get("checkpoint_format")
    if isinstance(named, str) and named:
        lowered = named.lower()
        return _OTHER_NAMES.get(lowered, lowered)[:40]
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bnb"
    if "zero_point" in config or "w_bit" in config:
        return "awq"
    if "bits" in config and ("group_size" in config or "desc_act" in config):
        return "gptq"
    return None


def describe(method: str, config: Mapping[str, Any], tensors: Tensors) -> Quantization:
    """The quantization's settings, from its configuration where there is one and from the shapes where not."""
    bits = config.get("bits", config.get("w_bit"))
    if not isinstance(bits, (int, float)) or isinstance(bits, bool):
        bits = _bits(method, config, tensors)
    group = config.get("group_size", config.get("q_group_size"))
    group_size = group if type(group) is int else (_group_size(tensors) if method == "gptq" else None)
    desc_act, sym = config.get("desc_act"), config.get("sym")
    return Quantization(
        method,
        bits=bits,
        group_size=group_size,
        desc_act=desc_act if isinstance(desc_act, bool) else None,
        sym=sym if isinstance(sym, bool) else None,
    )


def check_gptq(name: str, tensors: Tensors, bits: float | None) -> None:
    """Raise CorruptModel, naming the tensor, when packed tensors don't fit each other."""
    for key, tensor in tensors.items():
        stem, _, kind = key.rpartition(".")
        if kind != "qweight":
            continue
        scales = tensors.get(f"{stem}.scales")
        zeros = tensors.get(f"{stem}.qzeros") or tensors.get(f"{stem}.zeros")
        if scales is None or zeros is None:
            raise _broken(name, f"tensor {shown(key)} has no {'scales' if scales is None else 'qzeros'} beside it")
        if len(tensor.shape) != 2 or tensor.dtype not in ("I32", "U32"):
            raise _broken(name, f"tensor {shown(key)} is {tensor.dtype} {list(tensor.shape)}, not a packed int32 matrix")
        oldest = f"{stem}.qzeros" not in tensors  # float zeros, and both as [out, 1]
        if not oldest and len(scales.shape) == 2 and scales.shape[1] != tensor.shape[1]:
            raise _broken(
                name, f"tensor {shown(stem)}.scales has {scales.shape[1]} columns, {shown(stem)}.qweight {tensor.shape[1]}"
            )
        order = tensors.get(f"{stem}.g_idx")
        if order and bits in (2, 3, 4, 8) and order.elements and tensor.shape[0] * 32 != order.elements * bits:
            raise _broken(
                name, f"tensor {shown(stem)}.g_idx has {order.elements} entries, which {bits}-bit {shown(key)} doesn't fit"
            )


def _bits(method: str, config: Mapping[str, Any], tensors: Tensors) -> float | None:
    if method == "bnb":
        return 8 if config.get("load_in_8bit") or any(name.endswith(".SCB") for name in tensors) else 4
    if method == "fp8":
        return 8
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight" and len(tensor.shape) == 2:
            order = tensors.get(f"{stem}.g_idx")
            zeros, scales = tensors.get(f"{stem}.qzeros"), tensors.get(f"{stem}.scales")
            if order and order.elements:
                return integer(tensor.shape[0] * 32 // order.elements, maximum=8)
            if zeros and scales and len(zeros.shape) == len(scales.shape) == 2 and scales.shape[1]:
                return integer(zeros.shape[1] * 32 // scales.shape[1], maximum=8)
    return None


def _group_size(tensors: Tensors) -> int | None:
    """Columns per scale of the first packed layer; −1 for one scale per column."""
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        scales, zeros = tensors.get(f"{stem}.scales"), tensors.get(f"{stem}.qzeros")
        if kind != "qweight" or not scales or not zeros or len(scales.shape) != 2 or len(zeros.shape) != 2:
            continue
        bits = zeros.shape[1] * 32 // scales.shape[1] if scales.shape[1] else 0
        rows, groups = (tensor.shape[0] * 32 // bits if bits else 0), scales.shape[0]
        if rows and groups:
            return -1 if groups == 1 else -(-rows // groups)
    return None


def count_parameters(tensors: Tensors, quantization: Quantization | None) -> int:
    """Weights in the model: packed ones unpacked, scales and indices not counted."""
    method = quantization.method if quantization else None
    bits = quantization.bits if quantization else None
    total = 0
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind in ("qweight", "q_weight", "trellis") and bits:
            total += int(tensor.elements * (16 if kind == "trellis" else 32) / bits)
        elif kind in _PACKING or ".quant_state." in name or kind in ("absmax", "quant_map", "SCB", "weight_format"):
            continue
        elif method == "bnb" and bits == 4 and tensor.dtype == "U8":
            total += tensor.elements * 2
        else:
            total += tensor.elements
    return total


_PACKING = frozenset(
    "qzeros zeros scales g_idx q_scale q_scale_max q_groups q_group_map q_perm q_invperm suh svh su sv mcg mul1 weight_scale "
    "weight_scale_inv input_scale nested_absmax nested_quant_map".split()
)


def _broken(name: str, reason: str) -> CorruptModel:
    return CorruptModel(f"{name} is damaged: {reason}.", hint="Fetch the file again, or quantise the original model again.")

"""The kernels of the GPTQ runtime: modules that stand in for a linear layer. Each says which layers it can run, and why not.

int4    torch's int4 op for CPUs (bf16 activations) for one or a few rows; a long prefill is a matrix product with the weight
        dequantised for the moment. 2 and 3 bits fit it as they are; 8 bits run as two 4-bit planes.
dense   the weight dequantised to float32 at load. Exact; the memory of an unquantised model.
unpack  packed codes in memory, dequantised at each call. Exact, small and slow; takes every layer.
triton  CUDA (_gptq_triton).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.quantize._packing import pack_rows

if TYPE_CHECKING:
    from loaders._gptq_tensors import Unpacked

_GROUPS = (256, 128, 64, 32)
# Rows from which dequantising once and multiplying is faster than the int4 op, by the instructions the matrix product has.
_PREFILL_ROWS = 64


class GptqLinear(nn.Module):
    """A linear layer on packed weights. `kernel` names the way it computes."""

    kernel = ""

    def __init__(self, layer: Unpacked) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, layer.bits
        self.register_buffer("perm", layer.perm, persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's type."""
        rows = x.reshape(-1, self.in_features)
        if self.perm is not None:
            rows = rows.index_select(1, self.perm)
        y = self.multiply(rows)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


# --- exact -----------------------------------------------------------------------------------------------------


class DenseLinear(GptqLinear):
    kernel = "dense"

    def __init__(self, layer: Unpacked, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layer)
        weight = layer.weight()
        if layer.perm is not None:  # dense weights can go back to the model's order
            ordered = torch.empty_like(weight)
            ordered[layer.perm] = weight
            weight, self.perm = ordered, None
        self.register_buffer("weight", weight.T.contiguous().to(dtype), persistent=False)

    def multiply(self, rows: Tensor) -> Tensor:
        return functional.linear(rows.to(self.weight.dtype), self.weight)


class UnpackLinear(GptqLinear):
    kernel = "unpack"

    def __init__(self, layer: Unpacked) -> None:
        super().__init__(layer)
        self.width = layer.bits
        self.register_buffer("words", torch.from_numpy(pack_rows(layer.codes.numpy(), layer.bits)), persistent=False)
        self.register_buffer("scales", layer.scales, persistent=False)
        self.register_buffer("zeros", layer.zeros, persistent=False)
        self.register_buffer("groups", layer.groups(), persistent=False)

    def multiply(self, rows: Tensor) -> Tensor:
        codes = unpack_words(self.words, self.width).float()
        return rows.float() @ ((codes - self.zeros[self.groups]) * self.scales[self.groups])


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """`_packing.unpack_rows` on any device: int32 [r, m] -> int32 [r·32/bits, m]."""
    from modules.quantize.settings import period

    values, count = period(bits)
    source = words.reshape(-1, count, words.shape[1])
    parts = []
    for index in range(values):
        word, shift = divmod(index * bits, 32)
        # torch shifts int32 arithmetically: the mask takes the copied sign bits away again
        value = (source[:, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            value = value | ((source[:, word + 1] << (32 - shift)) & ((1 << bits) - 1))
        parts.append(value)
    return torch.stack(parts, dim=1).reshape(-1, words.shape[1])


# --- int4 on a CPU ---------------------------------------------------------------------------------------------


class Int4Linear(GptqLinear):
    """`aten._weight_int4pack_mm_for_cpu`: w = (code − 8) · scale + zero, so scale = s and zero = s · (8 − z).

    Activations, scales and zeros are bfloat16: outputs differ from the exact ones by about 2⁻⁸ of their size.
    """

    kernel = "int4"

    def __init__(self, layer: Unpacked) -> None:
        super().__init__(layer)
        self.group = op_group(layer)
        repeat = layer.group_size // self.group
        scales = layer.scales.repeat_interleave(repeat, dim=0)
        zeros = layer.zeros.repeat_interleave(repeat, dim=0)
        codes = layer.codes.T.contiguous().int()
        self.planes = 2 if layer.bits == 8 else 1
        if layer.bits == 8:  # code = 16·high + low: (code − z)·s = (high − 8)·16s + (low − 8)·s + (136 − z)·s
            self._add_plane("high", codes >> 4, scales * 16, torch.zeros_like(scales))
            self._add_plane("low", codes & 15, scales, scales * (136 - zeros))
        else:
            self._add_plane("low", codes, scales, scales * (8 - zeros))

    def _add_plane(self, name: str, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self.register_buffer(name, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), persistent=False)
        pairs = torch.stack([scales, zeros], dim=-1).to(torch.bfloat16).contiguous()
        self.register_buffer(f"{name}_grid", pairs, persistent=False)

    def multiply(self, rows: Tensor) -> Tensor:
        if len(rows) >= _PREFILL_ROWS and packed_layout(self.out_features):
            dtype = product_dtype()
            return rows.to(dtype) @ self._dense(dtype).T
        x = rows.to(torch.bfloat16).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.low, self.group, self.low_grid)
        if self.planes == 2:
            y = y.float() + torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.high, self.group, self.high_grid).float()
        return y

    def _dense(self, dtype: torch.dtype) -> Tensor:
        weight = self._plane(self.low, self.low_grid)
        if self.planes == 2:
            weight += self._plane(self.high, self.high_grid)
        return weight.to(dtype)

    def _plane(self, packed: Tensor, grid: Tensor) -> Tensor:
        """One plane as float32 [out, in]."""
        codes = unpack_int4(packed, self.out_features, packed_layout(self.out_features))
        values = codes.reshape(self.out_features, -1, self.group).float().sub_(8)
        pairs = grid.float().transpose(0, 1)
        values.mul_(pairs[..., :1]).add_(pairs[..., 1:])
        return values.reshape(self.out_features, self.in_features)


def op_group(layer: Unpacked) -> int:
    """The largest group size of the int4 op that divides the layer's own; 0 when there is none."""
    return next((g for g in _GROUPS if layer.group_size % g == 0), 0)


def why_not_int4(layer: Unpacked) -> str | None:
    """Why the int4 op can't run this layer, or None."""
    if not int4_works():
        return "this processor's torch has no int4 kernel"
    if layer.g_idx is not None:
        return "its groups are of different sizes"
    if not op_group(layer):
        return f"groups of {layer.group_size} don't fill the kernel's"
    if layer.group_size * layer.scales.shape[0] != layer.in_features:
        return "its last group is short"
    if layer.out_features % 16:
        return f"{layer.out_features} outputs are no multiple of 16"
    return None


@cache
def int4_works() -> bool:
    """Whether torch has the op here, in vector instructions, with right results."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    codes = (torch.arange(32 * 64).reshape(32, 64) * 7 % 16).int()
    grid = torch.tensor([1.0, 0.0]).repeat(2, 32, 1).to(torch.bfloat16)
    x = torch.eye(64)[:3].to(torch.bfloat16)
    try:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), 32, grid)
    except RuntimeError:
        return False
    return torch.equal(y.float(), (codes[:, :3].T - 8).float())


@cache
def packed_layout(out_features: int) -> int:
    """How many rows torch's packing interleaves, found by trying (it is not documented); 0 when no known form fits."""
    codes = (torch.arange(out_features * 2).reshape(out_features, 2) * 11 % 13).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32):
        if out_features % block == 0 and torch.equal(unpack_int4(packed, out_features, block).int(), codes):
            return block
    return 0


def unpack_int4(packed: Tensor, out_features: int, block: int) -> Tensor:
    """The codes [out, in] in a tensor of torch's int4 packing: in each block of rows, column by column, the low halves of the
    bytes are the block's first half of rows."""
    view = packed.reshape(out_features // block, -1, block // 2)
    codes = torch.cat([view & 15, view >> 4], dim=2)
    return codes.transpose(1, 2).reshape(out_features, -1)


@cache
def product_dtype() -> torch.dtype:
    """The type in which this processor multiplies large matrices fastest."""
    from torch import cpu

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.bfloat16 if any(getattr(cpu, name, lambda: False)() for name in checks) else torch.float32

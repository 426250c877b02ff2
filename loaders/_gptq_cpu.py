"""A linear layer on our own CPU kernel: repacks a GPTQ layer into the kernel's layout and calls it.

int8    activations rounded to 8 bits with one step for 32 inputs, as llama.cpp does for its quantised models.
exact   float32 activations, the same packed weights.

Any layer fits: groups of any size (short and uneven ones are padded to whole blocks with inputs that are zero), any order of
inputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from loaders._gptq_build import kernel
from loaders._gptq_check import BLOCK, LANES, Weights
from loaders._gptq_linear import GptqLinear
from loaders._gptq_tensors import Unpacked

_CONSTANT, _BYTES, _FLOATS = range(3)
_ROWS = 2048


class PackedLinear(GptqLinear):
    """x [..., in] -> [..., out] in the library's own threads. `weights` is the structure the kernel reads."""

    def __init__(self, layer: Unpacked, exact: bool = False) -> None:
        super().__init__(layer)
        built = kernel()
        assert built.library is not None, built.problem
        self._library = built.library
        self.exact = exact
        self.kernel = "exact" if exact else "int8"
        places, ends = placing(layer)
        self.register_buffer("codes", pack(layer.codes, places, layer.bits), persistent=False)
        self.register_buffer("scales", _half_if_exact(_panels(layer.scales)), persistent=False)
        self.register_buffer("group_end", ends, persistent=False)
        order = _order(layer, places)
        self.register_buffer("perm", order, persistent=False)
        kind, zero, zeros = _zeros(layer)
        self.register_buffer("zeros", zeros, persistent=False)
        self.weights = Weights(
            layer.bits, self.out_features, self.in_features, len(places) // BLOCK, len(ends), self.scales.dtype == torch.float16
        )
        self.weights.zero_kind, self.weights.zero = kind, zero
        for name in ("codes", "scales", "zeros", "group_end", "perm", "bias"):
            tensor = getattr(self, name)
            setattr(self.weights, name, None if tensor is None else tensor.data_ptr())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.in_features).to("cpu", torch.float32).contiguous()
        y = torch.empty((len(rows), self.out_features), dtype=torch.float32)
        status = self._library.gptq_linear(ctypes.byref(self.weights), rows.data_ptr(), len(rows), y.data_ptr(), int(self.exact))
        if status:
            raise MemoryError("not enough memory for the layer's activations")
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def placing(layer: Unpacked) -> tuple[Tensor, Tensor]:
    """(row of `codes` at each place, −1 for padding: int64 [blocks · 32]; end of each group in blocks: int32 [groups])."""
    count = layer.scales.shape[0]
    sizes = torch.bincount(layer.groups(), minlength=count)
    padded = (sizes + BLOCK - 1) // BLOCK * BLOCK
    ends = padded.cumsum(0)
    starts = ends - padded
    first = sizes.cumsum(0) - sizes
    places = torch.full((int(ends[-1]),), -1)
    groups = layer.groups()
    rows = torch.arange(layer.in_features)
    places[starts[groups] + rows - first[groups]] = rows
    return places, (ends // BLOCK).int()


def _order(layer: Unpacked, places: Tensor) -> Tensor | None:
    """The input of each place, int32; None when all are in the model's order."""
    if layer.perm is None:
        if len(places) == layer.in_features and torch.equal(places, torch.arange(len(places))):
            return None
        return places.int()
    return torch.where(places < 0, places, layer.perm[places.clamp(min=0)]).int()


def pack(codes: Tensor, places: Tensor, bits: int) -> Tensor:
    """Codes uint8 [in, out] -> the kernel's bytes [panels, blocks, bits · 32] (see _gptq_kernel.h)."""
    panels, blocks = -(-codes.shape[1] // LANES), len(places) // BLOCK
    held = torch.zeros((len(places), panels * LANES), dtype=torch.uint8)
    inside = places >= 0
    held[inside, : codes.shape[1]] = codes if bool(inside.all()) else codes[places[inside]]
    # [block, quad, j, panel, lane] -> [panel, block, quad, lane · 4 + j]
    quads = held.reshape(blocks, 8, 4, panels, LANES).permute(3, 0, 1, 4, 2).reshape(panels, blocks, 8, 32)
    if bits == 8:
        return quads.contiguous()
    if bits == 3:
        high = _join((quads >> 2).reshape(panels, blocks, 1, 8, 32), 1)
        return torch.cat([_join((quads & 3).reshape(panels, blocks, 2, 4, 32), 2), high], dim=2)
    return _join(quads.reshape(panels, blocks, bits, 8 // bits, 32), bits)


def _join(parts: Tensor, bits: int) -> Tensor:
    """[..., n, 32] values of `bits` bits -> [..., 32], the first lowest."""
    joined = parts[..., 0, :].clone()
    for index in range(1, parts.shape[-2]):
        joined |= parts[..., index, :] << (index * bits)
    return joined


def _panels(grid: Tensor) -> Tensor:
    """[groups, out] -> [panels, groups, 8], padded with zeros."""
    groups, out = grid.shape
    panels = -(-out // LANES)
    held = torch.zeros((groups, panels * LANES), dtype=grid.dtype)
    held[:, :out] = grid
    return held.reshape(groups, panels, LANES).transpose(0, 1).contiguous()


def _half_if_exact(scales: Tensor) -> Tensor:
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales


def _zeros(layer: Unpacked) -> tuple[int, float, Tensor | None]:
    zeros = layer.zeros
    first = zeros.flatten()[0]
    if bool((zeros == first).all()):
        return _CONSTANT, float(first), None
    whole = zeros.round()
    if torch.equal(whole, zeros) and int(whole.min()) >= 0 and int(whole.max()) <= 255:
        return _BYTES, 0.0, _panels(whole.to(torch.uint8))
    return _FLOATS, 0.0, _panels(zeros.contiguous())


def round_to_8_bits(linear: nn.Linear) -> Unpacked:
    """A plain layer rounded to nearest, 8 bits, groups of 32: for an output layer, which GPTQ files leave unquantised."""
    weight = linear.weight.detach()
    out, inputs = weight.shape
    group = BLOCK if inputs % BLOCK == 0 else inputs
    scales = torch.empty((inputs // group, out))
    codes = torch.empty((inputs, out), dtype=torch.uint8)
    for first in range(0, out, _ROWS):  # in parts: the whole as float32 is the largest thing in a load's memory
        parts = weight[first : first + _ROWS].float().reshape(-1, inputs // group, group)
        steps = (parts.abs().amax(dim=2) / 127).half().float().clamp(min=2**-24)
        rounded = parts.div_(steps[:, :, None]).round_().clamp_(-127, 127).add_(128)
        codes[:, first : first + _ROWS] = rounded.to(torch.uint8).reshape(len(parts), inputs).T
        scales[:, first : first + _ROWS] = steps.T
    bias = None if linear.bias is None else linear.bias.detach().float()
    return Unpacked(codes, scales, torch.full_like(scales, 128.0), 8, group, None, None, bias)

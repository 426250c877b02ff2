"""The tensors of a packed layer, unpacked: what every kernel starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.errors import CorruptModel
from modules.quantize._packing import unpack_rows, unpack_zeros

if TYPE_CHECKING:
    from modules.quantize.layout import LayerLayout


@dataclass
class Unpacked:
    """One layer: w[i, o] = (codes[i, o] − zeros[g, o]) · scales[g, o] with g = g_idx[i].

    `codes` uint8 [in, out]; `scales` and `zeros` float32 [groups, out]; `g_idx` int64 [in], None where input i is in group
    i // group_size. `perm` (with `g_idx` None) lists the inputs in the order of the codes' rows: act-order undone.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    g_idx: Tensor | None
    perm: Tensor | None
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[1])

    def groups(self) -> Tensor:
        """The group of each row of `codes`."""
        return self.g_idx if self.g_idx is not None else torch.arange(self.in_features) // self.group_size

    def weight(self) -> Tensor:
        """The dequantised weight in the order of the rows of `codes`: float32 [in, out]."""
        index = self.groups()
        return (self.codes.float() - self.zeros[index]) * self.scales[index]


def unpack(layout: LayerLayout, read: Callable[[str], Tensor], sym: bool | None) -> Unpacked:
    """Read and check one layer's tensors. Raises CorruptModel for NaN, bad indices, or zero points of the other convention."""
    name = layout.name
    codes = torch.from_numpy(unpack_rows(read(f"{name}.qweight").numpy(), layout.bits))
    scales = read(f"{name}.scales").float().reshape(-1, layout.out_features)
    _finite(f"{name}.scales", scales)
    zeros = _zeros(layout, read(layout.zeros_name), scales, sym)
    bias = None
    if layout.has_bias:
        bias = read(f"{name}.bias").float().reshape(-1)
        _finite(f"{name}.bias", bias)
        if not bias.count_nonzero():  # AutoGPTQ writes one for every layer
            bias = None
    unpacked = Unpacked(codes, scales, zeros, layout.bits, layout.group_size, None, None, bias)
    if layout.has_g_idx:
        _order(unpacked, read(f"{name}.g_idx").reshape(-1).long(), layout)
    return unpacked


def _zeros(layout: LayerLayout, stored: Tensor, scales: Tensor, sym: bool | None) -> Tensor:
    if layout.zeros == "float":
        values = stored.float().reshape(1, -1)
        _finite(layout.zeros_name, values)
        return values / torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = torch.from_numpy(unpack_zeros(stored.numpy(), layout.bits, v1=layout.zeros == "v1"))
    if sym:
        middle = 1 << (layout.bits - 1)
        other = middle + (1 if layout.zeros == "v1" else -1)
        if bool((zeros == other).all()):
            raise CorruptModel(
                f"{layout.zeros_name} holds {other} everywhere where a symmetric {layout.zeros} checkpoint means {middle}: the "
                "file is of the other zero convention than its settings say.",
                hint=f'Set "checkpoint_format" to "{"gptq_v2" if layout.zeros == "v1" else "gptq"}" in its configuration.',
            )
    return zeros.float()


def _order(unpacked: Unpacked, g_idx: Tensor, layout: LayerLayout) -> None:
    """Sort the rows by group when g_idx is not in order (act-order), so that groups are regular again where they can be."""
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= layout.groups:
        raise CorruptModel(
            f"{layout.name}.g_idx points to group {int(g_idx.max())} of {layout.groups}.", hint="Fetch the file again."
        )
    regular = torch.arange(layout.in_features) // layout.group_size
    if torch.equal(g_idx, regular):
        return
    perm = torch.argsort(g_idx, stable=True)
    unpacked.codes = unpacked.codes[perm].contiguous()
    unpacked.perm = perm
    if not torch.equal(g_idx[perm], regular):
        unpacked.g_idx = g_idx[perm]


def _finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CorruptModel(
            f"Tensor {name} holds NaN or infinite numbers.", hint="The file is damaged: fetch it, or quantise the model, again."
        )

"""Linear layers with the same inputs: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization
for Generative Pre-trained Transformers", 2022, arXiv 2210.17323) and rounding to nearest.

Weights are held as [in, out] here: a column of the paper is a row of ours, so that the inner loop runs over memory in order.

The paper walks over the columns with the Cholesky factor of the inverse Hessian. The same numbers come from a factor of the
Hessian itself: with H = R Rᵀ, R upper triangular, the output's error is |Rᵀ e|² for e = w − ŵ, and its k-th term is
R[k,k] · (e[k] + Σ_{j<k} R[j,k]/R[k,k] · e[j]). So each weight is rounded after the errors before it, times those ratios, are
added: no matrix is inverted, and the sum of the terms is the loss. (Chee, Cai, Kuleshov, De Sa: "QuIP", 2023, arXiv 2307.13304,
shows that the two are one algorithm.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modules.errors import IncompatibleModel
from modules.quantize._grid import encode, make_grid

if TYPE_CHECKING:
    from torch import Tensor

    from modules.quantize.settings import QuantizeSettings

_BLOCK = 128
_MAX_DAMP = 1.01
Grid = tuple["Tensor", "Tensor"]


@dataclass
class QuantizedLayer:
    """`codes` uint8 [in, out], `scales` float16 [groups, out], `zeros` uint8 [groups, out], `g_idx` int32 [in].

    `loss` is the squared error of the layer's output over its squared output, on the calibration inputs; without them
    the same of the weights. `damp` is the damping that was needed (more than asked for when the Hessian was near singular).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    loss: float
    damp: float = 0.0

    def weight(self) -> Tensor:
        """The dequantised weight, float32 [in, out]."""
        index = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[index]) * self.scales.float()[index]


def quantize_rtn(weight: Tensor, settings: QuantizeSettings) -> QuantizedLayer:
    """Round `weight` [in, out] to the nearest point of its groups' grids."""
    rows = weight.float()
    count = rows.shape[0]
    size = settings.group_size if settings.group_size > 0 else count
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales, zeros = [], []
    for start in range(0, count, size):
        part = rows[start : start + size]
        scale, zero = make_grid(part, settings.bits, sym=settings.sym, mse=settings.mse)
        codes[start : start + size] = encode(part, scale, zero, settings.maxq).to(torch.uint8)
        scales.append(scale)
        zeros.append(zero)
    g_idx = (torch.arange(count, device=rows.device) // size).int()
    layer = QuantizedLayer(codes, torch.stack(scales).half(), torch.stack(zeros).to(torch.uint8), g_idx, 0.0)
    layer.loss = float((layer.weight() - rows).pow(2).sum() / rows.pow(2).sum().clamp(min=1e-30))
    return layer


def quantize_group(weights: list[Tensor], hessian: Tensor, settings: QuantizeSettings) -> list[QuantizedLayer]:
    """Quantise layers `weights` [in, out_i] that are given the same inputs, so that their outputs change little.

    `hessian` [in, in], which is overwritten, is the mean of x xᵀ over the calibration tokens (the paper's 2 X Xᵀ up to a factor,
    which changes nothing). Raises IncompatibleModel when it can't be factored, CorruptModel for weights that are not finite.
    """
    rows = torch.cat([weight.float() for weight in weights], dim=1)
    moments = hessian.float()
    count = rows.shape[0]
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1
    rows[dead] = 0
    size = settings.group_size if settings.group_size > 0 else count
    fixed = _fixed_grids(rows, size, settings) if settings.static_groups else None
    order = torch.arange(count, device=rows.device)
    if settings.desc_act:
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        rows, moments = rows[order], moments[order][:, order]
    whole = (rows * (moments @ rows)).sum(dim=0)
    ratios, terms, added, damp = _factor(moments, settings.damp_percent)
    group_of = order // size if fixed else torch.arange(count, device=rows.device) // size
    sweep = _Sweep(rows, ratios, terms, size, settings)
    codes, grids, error = sweep.run(group_of.tolist(), fixed)
    error -= added * sweep.errors.square_().sum(dim=0)  # what damping added to the Hessian is no error of the output

    g_idx = torch.empty(count, dtype=torch.int32, device=rows.device)
    g_idx[order] = group_of.int()
    original = torch.empty_like(codes)
    original[order] = codes
    scales = torch.stack([scale for scale, _ in grids]).half()
    zeros = torch.stack([zero for _, zero in grids]).to(torch.uint8)
    layers = []
    first = 0
    for weight in weights:
        own = slice(first, first + weight.shape[1])
        loss = float(error[own].sum().clamp(min=0) / whole[own].sum().clamp(min=1e-30))
        parts = (original[:, own].contiguous(), scales[:, own].contiguous(), zeros[:, own].contiguous())
        layers.append(QuantizedLayer(*parts, g_idx, loss, damp))
        first = own.stop
    return layers


def _fixed_grids(rows: Tensor, size: int, settings: QuantizeSettings) -> list[Grid]:
    return [
        make_grid(rows[start : start + size], settings.bits, sym=settings.sym, mse=settings.mse)
        for start in range(0, rows.shape[0], size)
    ]


def _factor(moments: Tensor, damp_percent: float) -> tuple[Tensor, Tensor, float, float]:
    """(ratios R[j,k] / R[k,k], squares of the diagonal, what was added to the Hessian's diagonal, the share of its mean that is).

    Damps more where it has to. A lower factor of the matrix read backwards is an upper one of the matrix.
    """
    mean = float(moments.diagonal().mean())
    _flip(moments)
    plain = moments.diagonal().clone()
    damp = damp_percent
    while damp <= _MAX_DAMP:
        moments.diagonal().copy_(plain + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            _flip(lower)
            diagonal = lower.diagonal().clone()
            return lower.div_(diagonal), diagonal.square_(), damp * mean, damp
        damp *= 10
    raise IncompatibleModel(
        "The calibration inputs of a layer have no usable second moments (not finite, or all alike).",
        hint="Use other or more calibration text, or --method rtn.",
    )


def _flip(matrix: Tensor) -> None:
    """Both axes turned round, in place: these are the largest matrices at work."""
    count = len(matrix)
    for first in range(0, count // 2, _BLOCK):
        last = min(first + _BLOCK, count // 2)
        head = matrix[first:last].flip(0, 1)
        matrix[first:last] = matrix[count - last : count - first].flip(0, 1)
        matrix[count - last : count - first] = head
    if count % 2:
        matrix[count // 2] = matrix[count // 2].flip(0)


class _Sweep:
    """Round row after row. Each block's weights take the errors of all rows before it at once, those within it one by one."""

    def __init__(self, rows: Tensor, ratios: Tensor, terms: Tensor, size: int, settings: QuantizeSettings) -> None:
        self._rows, self._ratios, self._terms, self._size, self._settings = rows, ratios, terms, size, settings
        self.errors = rows.clone()  # weight minus grid, as far as the sweep has come
        self._codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        self._loss = torch.zeros(rows.shape[1], device=rows.device)
        self._grids: list[Grid] = []

    def run(self, group_of: list[int], fixed: list[Grid] | None) -> tuple[Tensor, list[Grid], Tensor]:
        """(codes, grids, loss of each column with damping)."""
        count = self._rows.shape[0]
        self._grids = list(fixed) if fixed else []
        # A group's grid is made when the errors of all rows before it are in its weights, so a segment holds whole groups.
        step = _BLOCK if fixed else self._size * max(_BLOCK // self._size, 1)
        for first in range(0, count, step):
            last = min(first + step, count)
            if first:
                self._rows[first:last].addmm_(self._ratios[:first, first:last].T, self.errors[:first])
            for start in range(first, last, _BLOCK):
                stop = min(start + _BLOCK, last)
                self._block(start, stop, group_of, fixed is None)
                if stop < last:
                    self._rows[stop:last].addmm_(self._ratios[start:stop, stop:last].T, self.errors[start:stop])
        return self._codes, self._grids, self._loss

    def _block(self, start: int, stop: int, group_of: list[int], fresh: bool) -> None:
        settings, size = self._settings, self._size
        block, errors = self._rows[start:stop], self.errors[start:stop]
        ratios = self._ratios[start:stop, start:stop]
        reached = torch.empty_like(block)
        for index in range(stop - start):
            if fresh and (start + index) % size == 0:
                part = self._rows[start + index : start + index + size]
                self._grids.append(make_grid(part, settings.bits, sym=settings.sym, mse=settings.mse))
            scale, zero = self._grids[group_of[start + index]]
            code = encode(block[index], scale, zero, settings.maxq)
            self._codes[start + index] = code
            torch.mul(code.sub_(zero), scale, out=reached[index])
            error = errors[index].sub_(reached[index])
            if index + 1 < stop - start:
                block[index + 1 :].addr_(ratios[index, index + 1 :], error)
        self._loss += (reached.sub_(block).square_() * self._terms[start:stop, None]).sum(dim=0)

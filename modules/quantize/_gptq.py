"""One linear layer: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022, arXiv 2210.17323) and rounding to nearest.

Weights are held as [in, out] here: a column of the paper is a row of ours, so that the inner loop runs over memory in order.
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


def quantize_gptq(weight: Tensor, hessian: Tensor, settings: QuantizeSettings) -> QuantizedLayer:
    """Quantise `weight` [in, out] so that its output changes little on inputs with the second moments `hessian` [in, in].

    `hessian` is the mean of x xᵀ over the calibration tokens (the paper's 2 X Xᵀ up to a factor, which changes nothing).
    """
    rows = weight.float().clone()
    moments = hessian.float().clone()
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
    target = rows.clone()
    upper, damp = _inverse_root(moments, settings.damp_percent)
    group_of = order // size if fixed else torch.arange(count, device=rows.device) // size
    codes, scales, zeros = _sweep(rows, upper, size, group_of.tolist(), fixed, settings)

    g_idx = torch.empty(count, dtype=torch.int32, device=rows.device)
    g_idx[order] = group_of.int()
    original = torch.empty_like(codes)
    original[order] = codes
    layer = QuantizedLayer(original, scales.half(), zeros.to(torch.uint8), g_idx, 0.0, damp)
    layer.loss = _output_error(layer.weight()[order] - target, target, moments)
    return layer


def _fixed_grids(rows: Tensor, size: int, settings: QuantizeSettings) -> list[tuple[Tensor, Tensor]]:
    return [
        make_grid(rows[start : start + size], settings.bits, sym=settings.sym, mse=settings.mse)
        for start in range(0, rows.shape[0], size)
    ]


def _inverse_root(moments: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """(U, damping) with UᵀU the inverse of the damped Hessian, U upper triangular. Damps more where it has to."""
    mean = moments.diagonal().mean()
    damp = damp_percent
    while damp <= _MAX_DAMP:
        damped = moments.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damp
        damp *= 10
    raise IncompatibleModel(
        "The calibration inputs of a layer have no usable second moments (not finite, or all alike).",
        hint="Use other or more calibration text, or --method rtn.",
    )


def _sweep(
    rows: Tensor,
    upper: Tensor,
    size: int,
    group_of: list[int],
    fixed: list[tuple[Tensor, Tensor]] | None,
    settings: QuantizeSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise row after row, spreading each one's error over those after it: at once within a block, for the rest of the
    layer when the block is done. Returns (codes, scales, zeros); changes `rows`."""
    count = rows.shape[0]
    # Groups start with a block or lie within one, so that a grid is made from weights that carry all errors so far.
    step = _BLOCK if fixed or size >= _BLOCK else size * (_BLOCK // size)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    grids: list[tuple[Tensor, Tensor]] = list(fixed) if fixed else []
    maxq = settings.maxq
    for first in range(0, count, step):
        last = min(first + step, count)
        block = rows[first:last]
        inverse = upper[first:last, first:last]
        errors = torch.empty_like(block)
        for index in range(last - first):
            if not fixed and (first + index) % size == 0:
                part = rows[first + index : first + index + size]
                grids.append(make_grid(part, settings.bits, sym=settings.sym, mse=settings.mse))
            scale, zero = grids[group_of[first + index]]
            code = encode(block[index], scale, zero, maxq)
            codes[first + index] = code.to(torch.uint8)
            error = errors[index]
            torch.sub(block[index], (code - zero) * scale, out=error)
            error.div_(inverse[index, index])
            if index + 1 < last - first:
                block[index + 1 :].addr_(inverse[index, index + 1 :], error, alpha=-1)
        if last < count:
            rows[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return codes, torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _output_error(off: Tensor, target: Tensor, moments: Tensor) -> float:
    """‖(Ŵ − W) x‖² over ‖W x‖², both as means over the calibration inputs."""
    error = float((off * (moments @ off)).sum())
    whole = float((target * (moments @ target)).sum())
    return max(error, 0.0) / max(whole, 1e-30)

"""Scales and zero points: w ≈ scale · (code − zero), codes 0 … 2^bits − 1.

Scales are rounded to float16 here already, so that codes are chosen for the numbers the checkpoint holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modules.errors import CorruptModel

if TYPE_CHECKING:
    from torch import Tensor

# The MSE search: shrink the range by steps of 1 % down to 20 %; errors count to the power 2.4 (GPTQ's choice).
_STEPS = 80
_STEP = 0.01
_NORM = 2.4
_SMALLEST = 2.0**-24


def make_grid(rows: Tensor, bits: int, *, sym: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """One grid for each column of `rows` [n, out], over its n values: (scale, zero), both float32 [out]."""
    maxq = 2**bits - 1
    low = rows.amin(dim=0).clamp(max=0)
    high = rows.amax(dim=0).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = (high == 0) & (low == 0)
    high = torch.where(empty, torch.ones_like(high), high)
    low = torch.where(empty, -torch.ones_like(low), low)
    scale, zero = _from_range(low, high, maxq, sym)
    if mse:
        best = _error(rows, scale, zero, maxq)
        for step in range(1, _STEPS):
            share = 1 - step * _STEP
            other_scale, other_zero = _from_range(low * share, high * share, maxq, sym)
            error = _error(rows, other_scale, other_zero, maxq)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, other_scale, scale)
            zero = torch.where(better, other_zero, zero)
    return scale, zero


def _from_range(low: Tensor, high: Tensor, maxq: int, sym: bool) -> tuple[Tensor, Tensor]:
    scale = _as_half((high - low) / maxq)
    if sym:
        return scale, torch.full_like(scale, (maxq + 1) // 2)
    # v1 files hold zero − 1, so a zero point of 0 (no weight below 0) becomes 1 with one step less above it.
    positive = torch.round(-low / scale) < 1
    scale = torch.where(positive, _as_half(torch.maximum(high / (maxq - 1), -low)), scale)
    return scale, torch.round(-low / scale).clamp(1, maxq)


def _as_half(scale: Tensor) -> Tensor:
    rounded = scale.to(torch.float16).to(torch.float32).clamp(min=_SMALLEST)
    if not torch.isfinite(rounded).all():
        raise CorruptModel(
            "The weights are not finite, or too large for scales in float16.",
            hint="The base model is damaged, or was stored in a number format that overflows: fetch it again.",
        )
    return rounded


def encode(rows: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tensor:
    """The nearest codes, as float32."""
    return torch.round(rows / scale + zero).clamp_(0, maxq)


def _error(rows: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tensor:
    off = (encode(rows, scale, zero, maxq) - zero) * scale - rows
    return off.abs_().pow_(_NORM).sum(dim=0)

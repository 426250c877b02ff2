"""GPTQ's codes as GGUF's blocks (NumPy): what `modules.convert.gptq` promises, for rows of one layer.

A block is 32 inputs of one output. Q4_0: float16 d, 16 bytes; Q4_1: float16 d, float16 m, 16 bytes; Q8_0: float16 d, 32 int8. In
4 bits, byte i holds element i in its low half and element i + 16 in its high half. Source: ggml's block_q4_0, _q4_1, _q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modules.convert.gptq import BLOCK

_LARGEST = float(np.finfo(np.float16).max)
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True)
class Packed:
    """One layer: `codes` uint8 [in, out], `scales` float32 [groups, out], `zeros` float32 [groups, out], `g_idx` int [in]."""

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.float32]
    g_idx: npt.NDArray[np.int64]
    bits: int

    def weight(self) -> npt.NDArray[np.float32]:
        """The dequantised weight, float32 [out, in]."""
        w: npt.NDArray[np.float32] = (self.codes - self.zeros[self.g_idx]) * self.scales[self.g_idx]
        return np.ascontiguousarray(w.T)


def problem(layer: Packed, kind: str) -> str | None:
    """Why the layer's numbers don't fit `kind`, or None."""
    blocks = layer.g_idx.reshape(-1, BLOCK)
    if not (blocks == blocks[:, :1]).all():
        return "has groups that are scattered over the inputs (desc_act)"
    if np.abs(layer.scales).max() > _LARGEST:
        return "has scales beyond the range of float16"
    if kind == "Q4_1":
        if np.abs(layer.scales * layer.zeros).max() > _LARGEST:
            return "has zero points beyond the range of float16"
    elif not (layer.zeros == 1 << (layer.bits - 1)).all():
        return "has zero points where its settings say it is symmetric"
    return None


def rounded(layer: Packed, kind: str) -> bool:
    """Whether scales or minima change when they become float16 (by 2⁻¹¹ of their size at most)."""
    numbers = [layer.scales] + ([layer.scales * layer.zeros] if kind == "Q4_1" else [])
    return any(bool((n.astype(np.float16).astype(np.float32) != n).any()) for n in numbers)


def to_blocks(layer: Packed, kind: str, rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The outputs `rows` of a layer as uint8 [len(rows), in / 32 · bytes per block]."""
    groups = layer.g_idx[::BLOCK]
    codes = layer.codes[:, rows].T.reshape(len(rows), -1, BLOCK)
    scales = layer.scales[groups][:, rows].T
    halves = [scales]
    if kind == "Q4_1":
        halves.append(-scales * layer.zeros[groups][:, rows].T)
    heads = np.stack(halves, axis=-1).astype("<f2").view(np.uint8)
    middle = 1 << (layer.bits - 1)
    if kind == "Q8_0":
        body = (codes.astype(np.int16) - middle).astype(np.int8).view(np.uint8)
    else:
        shifted = codes + np.uint8(8 - middle) if kind == "Q4_0" else codes
        body = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << np.uint8(4))
    return np.concatenate([heads.reshape(*body.shape[:2], -1), body], axis=-1).reshape(len(rows), -1)

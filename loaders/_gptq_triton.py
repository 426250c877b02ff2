"""CUDA kernel of the GPTQ runtime: x [m, in] times packed weights, dequantised tile by tile, in Triton.

Written for 2, 4 and 8 bits (3-bit words straddle tiles: `unpack` runs those). This project's tests have no GPU and run it in
Triton's interpreter where Triton is installed; on first use the result is compared with the exact product, and a kernel that
is off is not used.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loaders._gptq_linear import GptqLinear, UnpackLinear
from modules.quantize._packing import pack_rows

if TYPE_CHECKING:
    from loaders._gptq_tensors import Unpacked

_BLOCK_N = 64
_TOLERANCE = 0.02


def why_not(layer: Unpacked) -> str | None:
    """Why the Triton kernel can't run this layer, or None."""
    if layer.bits == 3:
        return "3-bit words straddle the kernel's tiles"
    if layer.g_idx is not None:
        return "its groups are of different sizes"
    if layer.in_features % 64 or layer.group_size % 32:
        return "its shape does not fill the kernel's tiles"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if _kernel() is None:
        return "Triton is not installed"
    return None


@cache
def _kernel() -> Any:
    """The compiled function, None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def gptq_matmul(
        x_ptr,
        words_ptr,
        scales_ptr,
        zeros_ptr,
        y_ptr,
        m,
        n,
        k,
        group_size,
        BITS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        per_word: tl.constexpr = 32 // BITS
        mask: tl.constexpr = (1 << BITS) - 1
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, k, BLOCK_K):
            index = start + inner
            x = tl.load(x_ptr + rows[:, None] * k + index[None, :], mask=rows[:, None] < m, other=0.0)
            words = tl.load(words_ptr + (index // per_word)[:, None] * n + columns[None, :], mask=columns[None, :] < n, other=0)
            codes = (words >> ((index % per_word) * BITS)[:, None]) & mask
            # BLOCK_K divides the group size: one group per tile
            group = start // group_size
            scale = tl.load(scales_ptr + group * n + columns, mask=columns < n, other=0.0)
            zero = tl.load(zeros_ptr + group * n + columns, mask=columns < n, other=0.0)
            weight = (codes.to(tl.float32) - zero[None, :]) * scale[None, :]
            total += tl.dot(x, weight.to(x.dtype))
        tl.store(
            y_ptr + rows[:, None] * n + columns[None, :],
            total.to(y_ptr.dtype.element_ty),
            mask=(rows[:, None] < m) & (columns[None, :] < n),
        )

    return gptq_matmul


class TritonLinear(GptqLinear):
    kernel = "triton"

    def __init__(self, layer: Unpacked) -> None:
        super().__init__(layer)
        self.group_size = layer.group_size
        self.block_k = 32 if layer.group_size % 64 else 64
        self.register_buffer("words", torch.from_numpy(pack_rows(layer.codes.numpy(), layer.bits)), persistent=False)
        self.register_buffer("scales", layer.scales, persistent=False)
        self.register_buffer("zeros", layer.zeros, persistent=False)
        self._fallback: UnpackLinear | None = None
        self._checked = False
        self._layer: Unpacked | None = layer

    def multiply(self, rows: Tensor) -> Tensor:
        if not self._checked:
            self._check(rows)
        return self._fallback.multiply(rows) if self._fallback is not None else self.launch(rows)

    def launch(self, rows: Tensor) -> Tensor:
        """The kernel itself."""
        rows = rows.contiguous()
        y = torch.empty((len(rows), self.out_features), dtype=rows.dtype, device=rows.device)
        block_m = 16 if len(rows) <= 16 else 64
        grid = (-(-len(rows) // block_m), -(-self.out_features // _BLOCK_N))
        _kernel()[grid](
            rows,
            self.words,
            self.scales,
            self.zeros,
            y,
            len(rows),
            self.out_features,
            self.in_features,
            self.group_size,
            BITS=self.bits,
            BLOCK_M=block_m,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=self.block_k,
        )
        return y

    def _check(self, rows: Tensor) -> None:
        """Compare with the exact product once; keep the exact kernel when they differ."""
        self._checked = True
        assert self._layer is not None
        exact = UnpackLinear(self._layer).to(rows.device)
        self._layer = None
        wanted = exact.multiply(rows[:1])
        error = (self.launch(rows[:1]).float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        if not float(error) < _TOLERANCE:
            print(f"gptq: the Triton kernel is off by {float(error):.3f}; using the exact one", flush=True)
            self._fallback = exact

"""Products of 16-bit matrices on a CPU that has no instructions for them, in float32, a piece of the matrix at a time.

torch multiplies such matrices with a plain loop there, so that a prompt of 256 tokens costs 256 times what one token costs. A
piece that fits into the cache, made float32 for the moment, goes through the same product as a float32 model: the sums are as
exact or more, the weights stay 16-bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from modules.schema import ModelInfo

_ROWS = 8  # below, one row at a time is as fast
_COLUMNS = 512  # of the piece: 4 MB in float32 for 2,048 inputs
_SMALL = 1 << 16  # elements of a matrix that is not worth the pieces
_LARGE = 1 << 25  # elements of a stack that is not made float32 as a whole: the weights of a mixture's experts
_STACKED = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})  # as attention has them where it is written out
_GAIN = 1.3  # what it must bring, measured, to be used


def product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ matrix + bias`, [..., in] @ [in, out], summed in float32 and rounded once to the type of `rows`."""
    wide = rows.reshape(-1, rows.shape[-1]).float()
    out = torch.empty(wide.shape[0], matrix.shape[1], dtype=rows.dtype)
    for start in range(0, matrix.shape[1], _COLUMNS):
        piece = wide @ matrix[:, start : start + _COLUMNS].float()
        out[:, start : start + _COLUMNS] = piece if bias is None else piece + bias[start : start + _COLUMNS].float()
    return out.view(*rows.shape[:-1], matrix.shape[1])


class WideProducts(TorchFunctionMode):
    """While it is entered, products of 16-bit matrices and of stacks of them are float32 inside; everything else is as it was."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name == "linear" and not named and _suits(args[0], args[1].t()):
            return product(args[0], args[1].t(), args[2] if len(args) > 2 else None)
        if name in ("matmul", "__matmul__", "mm") and not named and _suits(args[0], args[1]):
            return product(args[0], args[1])
        if name == "addmm" and not named and args[0].dim() == 1 and _suits(args[1], args[2]):
            return product(args[1], args[2], args[0])
        tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)] if name in _STACKED else []
        if tensors and all(_half(tensor) and tensor.dim() > 2 and tensor.numel() <= _LARGE for tensor in tensors):
            more = {key: _float(value) for key, value in named.items()}
            return func(*map(_float, args), **more).to(tensors[0].dtype)
        return func(*args, **named)


def _suits(rows: Tensor, matrix: Tensor) -> bool:
    return (
        matrix.dim() == 2
        and rows.dim() >= 2
        and rows.dtype == matrix.dtype
        and _half(rows)
        and _half(matrix)
        and matrix.numel() >= _SMALL
        and rows.numel() >= _ROWS * rows.shape[-1]
    )


def _half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.device.type == "cpu"


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class AsLaid(TorchFunctionMode):
    """While it is entered, `contiguous` gives the tensor as it lies: a transposed matrix stays in columns, and is not copied."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if getattr(func, "__name__", "") == "contiguous" else func(*args, **(kwargs or {}))


def in_columns(matrix: Tensor) -> Tensor:
    """The same matrix [in, out] with each column in one piece of memory: torch reads it 10 to 30 times as fast for one row."""
    return matrix.t().contiguous().t()


class Products:
    """How a loaded model's matrices are multiplied: `with products(rows):` around each of its forward passes.

    `wide` is None where nothing is gained.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.wide = WideProducts() if set(info.device_map) == {"cpu"} and gain(info.dtype) else None

    def __call__(self, rows: int) -> contextlib.AbstractContextManager[Any]:
        return self.wide if self.wide is not None and rows >= _ROWS else contextlib.nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        """Lay in columns what is kept as [in, out]: GPT-2's Conv1D."""
        if self.wide is None:
            return
        for part in model.modules():
            if type(part).__name__ == "Conv1D" and _half(part.weight):
                part.weight.data = in_columns(part.weight.data)


@cache
def gain(dtype: str) -> bool:
    """Whether this machine multiplies matrices of this type faster so: by trying, as its instructions do not tell. Some 30 ms."""
    if dtype not in ("bfloat16", "float16"):
        return False
    kind = getattr(torch, dtype)
    rows, matrix = torch.ones(32, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind).t()

    def best(work: Callable[[Tensor, Tensor], Tensor]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work(rows, matrix)
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.inference_mode():
        return best(torch.matmul) > _GAIN * best(product)

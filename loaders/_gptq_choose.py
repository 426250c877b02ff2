"""Which kernel runs a packed layer; and the entry for other loaders that want our layers in their models.

`linear_from_tensors(...)` takes a layer's tensors as they lie in a file and gives the nn.Module to put in its place:

    new = linear_from_tensors(old.qweight, old.qzeros, old.scales, old.g_idx, bits=4, group_size=128, bias=old.bias)
    model.set_submodule(name, new)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loaders._estimate import SMALL_BYTES
from loaders._gptq_build import Kernel, kernel
from loaders._gptq_linear import DenseLinear, GptqLinear, Int4Linear, UnpackLinear, why_not_int4
from loaders._gptq_tensors import Unpacked, unpack
from modules.errors import CorruptModel
from modules.quantize.layout import LayerLayout

if TYPE_CHECKING:
    from typing import Literal

_COMPILED = ("int8", "exact")


class Chooser:
    """Which kernel runs a layer, by what device, layer and machine allow. One answer for one file on one machine: no timing.

    `reasons` counts why layers did not get the kernel that was wanted; `used` is what the model as a whole runs on.
    """

    def __init__(
        self,
        wanted: str,
        device: torch.device,
        layouts: Mapping[str, LayerLayout],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.device = device
        self.reasons: Counter[str] = Counter()
        self.wanted = wanted
        if device.type == "cpu" and wanted in ("auto", *_COMPILED):
            small = 4 * sum(layout.in_features * layout.out_features for layout in layouts.values()) <= SMALL_BYTES
            self.wanted = self._on_cpu(small, kernel(say))

    def _on_cpu(self, small: bool, built: Kernel) -> str:
        if built.library is not None:
            return self.wanted if self.wanted != "auto" else "exact" if small else "int8"
        self.reasons[built.problem] += 1
        if self.wanted == "exact":
            return "dense" if small else "unpack"
        return "dense" if small and self.wanted == "auto" else "int4"

    def __call__(self, layer: Unpacked) -> GptqLinear:
        if self.device.type == "cuda":
            return self._on_cuda(layer)
        if self.wanted in _COMPILED:
            from loaders._gptq_cpu import PackedLinear

            return PackedLinear(layer, exact=self.wanted == "exact")
        if self.wanted == "dense":
            return DenseLinear(layer)
        if self.wanted in ("unpack", "triton"):
            return UnpackLinear(layer)
        reason = why_not_int4(layer)
        if reason:
            self.reasons[reason] += 1
            return UnpackLinear(layer)
        return Int4Linear(layer)

    def _on_cuda(self, layer: Unpacked) -> GptqLinear:
        from loaders import _gptq_triton

        if self.wanted == "dense":
            return DenseLinear(layer, torch.float16)
        reason = "it was not asked for" if self.wanted == "unpack" else _gptq_triton.why_not(layer)
        if reason is None:
            return _gptq_triton.TritonLinear(layer)
        if self.wanted != "unpack":
            self.reasons[f"the Triton kernel does not run: {reason}"] += 1
        return UnpackLinear(layer)


def linear_from_tensors(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    zeros: Literal["v1", "v2", "float"] = "v1",
    kernel: str = "auto",
    device: torch.device | str = "cpu",
) -> GptqLinear:
    """Our layer for one packed layer's tensors: qweight int32 [in·bits/32, out], qzeros int32 [groups, out·bits/32] (float [out]
    with `zeros` "float"), scales [groups, out], g_idx [in] or None, bias [out] or None; group_size −1 is one group.

    x [..., in] -> [..., out] in x's type. "auto" takes the float32-exact kernel for a layer by itself; pass "int8" for speed.
    Raises CorruptModel when the tensors do not fit each other or hold NaN.
    """
    if bits not in (2, 3, 4, 8) or qweight.dim() != 2 or qweight.shape[0] * 32 % bits:
        raise CorruptModel(f"qweight {list(qweight.shape)} holds no whole number of {bits}-bit values.")
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    if scales.numel() != groups * outputs or (g_idx is not None and g_idx.numel() not in (0, inputs)):
        raise CorruptModel(
            f"scales {list(scales.shape)} or g_idx do not fit {inputs} inputs in groups of {group_size} and {outputs} outputs."
        )
    ordered = g_idx is not None and bool(g_idx.numel())
    layout = LayerLayout("layer", bits, inputs, outputs, groups, zeros, ordered, bias is not None)
    tensors = {"qweight": qweight, "qzeros": qzeros, "zeros": qzeros, "scales": scales, "g_idx": g_idx, "bias": bias}

    def read(name: str) -> Tensor:
        found = tensors[name.rpartition(".")[2]]
        assert found is not None
        return found.detach().cpu()

    where = torch.device(device)
    return Chooser(kernel, where, {"layer": layout})(unpack(layout, read, None)).to(where)

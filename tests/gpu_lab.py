"""Experiments for tests/gpu, in the Transformers environment of a CUDA machine:

python tests/gpu_lab.py FOLDER     reads names of experiments, prints one line of JSON for each: {"result"} or {"error"}
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from serve_lab import serve

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loaders import _gptq_triton as triton_kernels  # noqa: E402
from loaders._gptq_linear import UnpackLinear  # noqa: E402
from loaders._gptq_tensors import Unpacked  # noqa: E402


def packed(inputs: int, outputs: int, bits: int, group: int, ordered: bool = False, ragged: bool = False) -> Unpacked:
    """A random packed layer; `ordered` with its inputs in another order, `ragged` with groups of different sizes."""
    torch.manual_seed(inputs + outputs + bits + group)
    size = inputs if group == -1 else group
    groups = inputs // size
    codes = torch.randint(0, 2**bits, (inputs, outputs), dtype=torch.uint8)
    scales = torch.rand(groups, outputs) / 50 + 0.01
    zeros = torch.randint(1, 2**bits, (groups, outputs)).float()
    perm = torch.randperm(inputs) if ordered else None
    g_idx = torch.sort(torch.randint(0, groups, (inputs,))).values if ragged else None
    return Unpacked(codes, scales, zeros, bits, size, g_idx, perm, torch.randn(outputs))


def card(_: Path) -> Any:
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"available": torch.cuda.is_available(), "torch": torch.__version__, "cuda": torch.version.cuda, "name": name}


def triton(_: Path) -> Any:
    """The Triton kernel against the exact product, for one row and many."""
    rows = []
    for bits in (2, 4, 8):
        for group in (32, 64, 128, -1):
            for ordered in (False, True):
                layer = packed(512, 448, bits, group, ordered)
                why_not = triton_kernels.why_not(layer)
                exact = UnpackLinear(layer).cuda()
                kernel = triton_kernels.TritonLinear(layer).cuda()
                error = 0.0
                for count in (1, 7, 130):
                    x = torch.randn(count, 512, device="cuda", dtype=torch.float16)
                    wanted = exact(x.float())
                    error = max(error, float((kernel(x).float() - wanted).abs().max() / wanted.abs().max()))
                fell_back = kernel._fallback is not None
                rows.append({"case": [bits, group, ordered], "why_not": why_not, "error": error, "fell_back": fell_back})
    return rows


def triton_leaves(_: Path) -> Any:
    """What the kernel does not take, by the exact one on the GPU."""
    rows = []
    for layer in (packed(512, 448, 3, 128), packed(512, 448, 4, 128, ragged=True), packed(480, 448, 4, 32)):
        kernel = UnpackLinear(layer).cuda()
        x = torch.randn(5, layer.in_features)
        wanted = x @ layer.weight() + layer.bias
        error = float((kernel(x.cuda()).cpu() - wanted).abs().max() / wanted.abs().max())
        rows.append({"bits": layer.bits, "why_not": triton_kernels.why_not(layer), "error": error})
    return rows


EXPERIMENTS = {work.__name__: work for work in (card, triton, triton_leaves)}


if __name__ == "__main__":
    serve(EXPERIMENTS, sys.argv[1])

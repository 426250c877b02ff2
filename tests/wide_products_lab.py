"""Experiments on 16-bit products, run in the Transformers environment by tests/unit/test_wide_products.py.

Reads names of experiments from stdin, answers one JSON line for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import models_lab  # noqa: E402
import torch  # noqa: E402
from serve_lab import serve  # noqa: E402
from torch.nn import functional  # noqa: E402

from loaders import _wide_products  # noqa: E402
from loaders._wide_products import Products, WideProducts, gain, product  # noqa: E402
from modules.schema import ModelInfo  # noqa: E402

HALF = (torch.bfloat16, torch.float16)


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, in roundings of the type at the largest value."""
    unit = torch.finfo(found.dtype).eps * float(exact.abs().max())
    return float((found.double() - exact).abs().max()) / unit


def products(_folder: Path) -> dict[str, float]:
    """Sizes that are no multiple of a piece, a batch of sequences, both layouts, with and without bias."""
    found = {}
    for dtype in HALF:
        rows, matrix, bias = draw(dtype, 2, 5, 192), draw(dtype, 192, 1300), draw(dtype, 1300)
        exact = rows.double() @ matrix.double()
        found[f"{dtype}"] = off(product(rows, matrix), exact)
        found[f"{dtype} in columns"] = off(product(rows, matrix.t().contiguous().t()), exact)
        found[f"{dtype} with bias"] = off(product(rows, matrix, bias), exact + bias.double())
    return found


def calls(_folder: Path) -> dict[str, float]:
    """Each way in which networks multiply: its error while the mode is entered."""
    found = {}
    for dtype in HALF:
        rows, matrix, bias = draw(dtype, 9, 300), draw(dtype, 300, 300), draw(dtype, 300)
        left, right, added = draw(dtype, 3, 9, 40), draw(dtype, 3, 40, 9), draw(dtype, 3, 9, 9)
        ways: dict[str, Any] = {
            "linear": lambda r, m, b, *_: functional.linear(r, m.t(), b),
            "linear without bias": lambda r, m, *_: functional.linear(r, m.t()),
            "at": lambda r, m, *_: r @ m,
            "mm": lambda r, m, *_: torch.mm(r, m),
            "addmm": lambda r, m, b, *_: torch.addmm(b, r, m),
            "stack": lambda r, m, b, x, y, z: x @ y,
            "bmm": lambda r, m, b, x, y, z: torch.bmm(x, y),
            "baddbmm": lambda r, m, b, x, y, z: z.baddbmm(batch1=x, batch2=y, beta=0.5, alpha=2.0),
        }
        for name, way in ways.items():
            values = (rows, matrix, bias, left, right, added)
            exact = way(*(value.double() for value in values))
            wide, taken = watched(partial(way, *values))
            assert wide.dtype == dtype and taken
            found[f"{name} {dtype}"] = off(wide, exact)
    return found


def untouched(_folder: Path) -> dict[str, bool]:
    """What it has no business with: True where torch's own product was left to it."""
    rows, matrix = draw(torch.bfloat16, 9, 300), draw(torch.bfloat16, 300, 300)
    cases = {
        "float32": (rows.float(), matrix.float()),
        "few rows": (rows[:3], matrix),
        "a small matrix": (rows, matrix[:, :20]),
        "a vector": (rows[0], matrix),
        "a large stack": (draw(torch.bfloat16, 3, 9, 40), draw(torch.bfloat16, 3, 40, 900)),
    }
    with patch.object(_wide_products, "_LARGE", 100_000):
        return {name: not watched(partial(torch.matmul, *pair))[1] for name, pair in cases.items()}


def watched(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What it gives while the mode is entered, and whether it went another way than torch's own."""
    whole = patch.object(_wide_products, "product", wraps=product)
    stacked = patch.object(_wide_products, "_float", wraps=_wide_products._float)
    with whole as one, stacked as other, WideProducts():
        result = work()
    return result, bool(one.called or other.called)


def models(_folder: Path) -> dict[str, dict[str, float]]:
    """Each architecture in bfloat16: how far its logits are from those in float32, both ways."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(64)[None] * 3 % 256
    found = {}
    for name, config in models_lab.configs().items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.bfloat16).eval()
        with torch.inference_mode():
            own = model(ids).logits.float()
            products = Products(info("bfloat16"))
            products.lay_out(model)
            with patch.object(_wide_products, "_SMALL", 1), WideProducts():  # these models are small throughout
                wide = model(ids).logits.float()
            exact = model.float()(ids).logits
        scale = float(exact.abs().max())
        found[name] = {"wide": float((wide - exact).abs().max()) / scale, "own": float((own - exact).abs().max()) / scale}
    return found


def info(dtype: str, **device_map: float) -> ModelInfo:
    return ModelInfo(
        name="x", path="x", loader="transformers", format="hf", architecture="x", quantization=None, dtype=dtype,
        context_length=1, vocab_size=1, chat_template=None, bos_token=None, eos_token=None, eos_token_ids=(),
        device_map=device_map or {"cpu": 1.0}, memory_bytes=0, engine="x",
    )  # fmt: skip


def choice(_folder: Path) -> dict[str, bool]:
    return {
        "float32": Products(info("float32")).wide is not None,
        "on a GPU": Products(info("bfloat16", **{"cuda:0": 1.0})).wide is not None,
        "on both": Products(info("bfloat16", **{"cuda:0": 0.5, "cpu": 0.5})).wide is not None,
        "as measured": (Products(info("bfloat16")).wide is not None) == gain("bfloat16"),
    }


EXPERIMENTS = {item.__name__: item for item in (products, calls, untouched, models, choice)}

if __name__ == "__main__":
    serve(EXPERIMENTS, sys.argv[1])

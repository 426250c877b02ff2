"""The names `convert --type` takes, and what they mean for the way there."""

from __future__ import annotations

import difflib

from modules.detect.ggml_types import FILE_TYPES
from modules.errors import InvalidParameter

# What llama.cpp's converter writes by itself; everything else is quantized from one of the first three.
FROM_CONVERTER = ("F32", "F16", "BF16")
_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE"}
# Measured bits per weight where blocks alone don't tell; only for asking whether the disk has room.
_MIXED_BITS = {
    "Q2_K": 3.4,
    "Q2_K_S": 3.2,
    "Q3_K_S": 3.7,
    "Q3_K_M": 4.1,
    "Q3_K_L": 4.4,
    "Q4_0": 4.8,
    "Q4_1": 5.3,
    "Q4_K_S": 4.8,
    "Q4_K_M": 5.1,
    "Q5_0": 5.7,
    "Q5_1": 6.2,
    "Q5_K_S": 5.7,
    "Q5_K_M": 5.9,
    "Q6_K": 6.8,
}


def gguf_type(name: str) -> str:
    """The exact type for what a user typed, in any case. Raises InvalidParameter with the nearest names."""
    wanted = name.strip().upper().replace("-", "_")
    wanted = _ALIASES.get(wanted, wanted)
    names = sorted(FILE_TYPES.values())
    if wanted in names:
        return wanted
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"The types are {', '.join(names)}."
    raise InvalidParameter(f"There is no GGUF type {name[:40]!r}.", hint=hint, param="type")


def estimated_bytes(parameters: int, kind: str) -> int:
    """An upper estimate of a GGUF's size, with its vocabulary."""
    bits = 32.5 if kind == "F32" else 16.5 if kind in ("F16", "BF16") else 9.0 if kind == "Q8_0" else _MIXED_BITS.get(kind, 6.0)
    return int(parameters * bits / 8) + 4_000_000

"""Calibration text as windows of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from torch import Tensor

    from modules.quantize.settings import QuantizeSettings

BUNDLED = Path(__file__).with_name("calibration.txt")
_MAX_BYTES = 256 << 20
_MIN_TOKENS = 1024


@dataclass(frozen=True)
class Calibration:
    """`windows` int64 [n, length]; `name`, `sha256` and `tokens` go into the checkpoint's provenance."""

    windows: Tensor
    name: str
    sha256: str
    tokens: int
    notes: tuple[str, ...] = ()


def read_calibration(tokenizer: Any, settings: QuantizeSettings, context: int) -> Calibration:
    """Windows from the settings' text, evenly spread over it. Raises InvalidParameter when it is unreadable or too short."""
    path = BUNDLED if settings.calibration == "bundled" else Path(settings.calibration)
    raw = _read(path)
    notes = []
    length = settings.seqlen
    if length > context:
        notes.append(f"Windows of {context} tokens instead of {length}: that is the model's context.")
        length = context
    ids = tokenizer(raw.decode("utf-8-sig"), add_special_tokens=False, verbose=False)["input_ids"]
    wanted = settings.nsamples * length
    if len(ids) < max(_MIN_TOKENS, length):
        raise InvalidParameter(
            f"The calibration text {path.name} has {len(ids)} tokens; it needs at least {max(_MIN_TOKENS, length)}.",
            hint=f"Give a longer text; {wanted:,} tokens would fill {settings.nsamples} windows of {length}.",
            param="calibration",
        )
    count = settings.nsamples
    if len(ids) < wanted:
        count = len(ids) // length
        notes.append(f"The calibration text fills {count} windows of {length} tokens, not {settings.nsamples}.")
    stride = (len(ids) - length) / max(count - 1, 1)
    starts = [round(index * stride) for index in range(count)]
    windows = torch.tensor([ids[start : start + length] for start in starts], dtype=torch.long)
    name = "bundled" if path == BUNDLED else path.name
    return Calibration(windows, name, hashlib.sha256(raw).hexdigest(), windows.numel(), tuple(notes))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidParameter(
                f"The calibration text {path.name} is over {_MAX_BYTES >> 20} MB.", hint="Cut a part of it.", param="calibration"
            )
        raw = path.read_bytes()
        raw.decode("utf-8-sig")
    except OSError as error:
        raise InvalidParameter(
            f"The calibration text {path} can't be read: {error.strerror or error}.",
            hint="Give a text file, or leave --calibration out for the bundled one.",
            param="calibration",
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidParameter(
            f"The calibration file {path.name} is no UTF-8 text.", hint="Save it as UTF-8.", param="calibration"
        ) from error
    return raw

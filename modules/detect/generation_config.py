"""A model's own sampling defaults (generation_config.json), cleaned: a wrong value is dropped with a warning, never used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from modules.detect.draft import read_json
from modules.errors import LoadError

# name: (lowest, highest) that makes sense; everything else in the file is about the library's own work.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 5.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.01, 10.0),
    "no_repeat_ngram_size": (0, 100),
    "max_new_tokens": (1, 2**31),
    "max_length": (1, 2**31),
}
_WHOLE = frozenset({"top_k", "no_repeat_ngram_size", "max_new_tokens", "max_length"})
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_defaults(folder: Path, vocab_size: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """The usable values of `folder`'s generation_config.json, and a warning for each one dropped.

    Token ids come as lists. A missing file gives no values and no warning.
    """
    try:
        config = read_json(folder / "generation_config.json")
    except FileNotFoundError:
        return {}, []
    except (LoadError, OSError) as error:
        return {}, [f"generation_config.json is ignored: {error}"]
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for name, (low, high) in _RANGES.items():
        value = config.get(name)
        if value is None:
            continue
        whole = type(value) is int
        if not (whole or (type(value) is float and name not in _WHOLE)) or not math.isfinite(value) or not low <= value <= high:
            warnings.append(f"generation_config.json: {name} {_shown(value)} is ignored, it must be from {low:g} to {high:g}.")
            continue
        values[name] = value
    for name in _TOKEN_IDS:
        value = config.get(name)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        good = [item for item in ids if type(item) is int and 0 <= item < (vocab_size or 2**31)]
        if len(good) != len(ids):
            warnings.append(f"generation_config.json: {name} {_shown(value)} is outside the vocabulary and is ignored.")
        if good:
            values[name] = good
    if isinstance(config.get("do_sample"), bool):
        values["do_sample"] = config["do_sample"]
    return values, warnings


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

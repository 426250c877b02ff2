"""Sampling fields of llama.cpp's family (llama-server, Ollama, KoboldCpp) in this product's terms.

Names alone are aliases in modules.sampling. Here are the conventions that differ in meaning: -1 for "the whole context", a range
around a temperature, lists of samplers, lists of biases.
"""

from __future__ import annotations

from typing import Any

from modules import sampling
from modules.api.turn import split_extras
from modules.errors import InvalidParameter, UnsupportedParameter

# llama.cpp's order, which its clients' numbers were chosen for: truncation first, temperature last.
LLAMA_ORDER = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
    "dynamic_temperature",
)
_TRUNCATION = frozenset({"top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc_probability"})
# A word of llama-server's `samplers` -> (steps of our order, parameters that are off where it is left out)
_SAMPLERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "penalties": (
        ("repetition_penalty", "presence_penalty", "frequency_penalty"),
        ("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
    "dry": (("dry",), ("dry_multiplier",)),
    "top_n_sigma": (("top_n_sigma",), ("top_n_sigma",)),
    "top_k": (("top_k",), ("top_k",)),
    "typ_p": (("typical_p",), ("typical_p",)),
    "top_p": (("top_p",), ("top_p",)),
    "min_p": (("min_p",), ("min_p",)),
    "xtc": (("xtc",), ("xtc_probability",)),
    "temperature": (("temperature", "dynamic_temperature"), ("temperature", "dynamic_temperature")),
    "adaptive_p": (("adaptive_p",), ("adaptive_target",)),
}
_WORDS = {"typical_p": "typ_p", "typical": "typ_p", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "temp": "temperature"}
# KoboldAI's numbers of its samplers, in `sampler_order`.
_KOBOLD_STEPS: tuple[tuple[str, ...], ...] = (
    ("top_k",),
    ("top_a",),
    ("top_p", "min_p"),
    ("tfs",),
    ("typical_p",),
    ("temperature", "dynamic_temperature", "quadratic_sampling"),
    ("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def llama_sampling(fields: dict[str, Any], no_effect: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A body's further fields -> (checked sampling parameters, warnings). `no_effect`: fields of the protocol that mean nothing
    here -> why, "" for those to be passed over in silence. Raises InvalidParameter and UnsupportedParameter."""
    fields = {name: value for name, value in fields.items() if value is not None}
    warnings = [f"{name}: {reason}" for name, reason in no_effect.items() if reason and name in fields]
    for name in no_effect:
        fields.pop(name, None)
    _windows(fields)
    _bias(fields)
    spread = fields.pop("dynatemp_range", None)
    words = fields.pop("samplers", None)
    order = _kobold_order(fields.pop("sampler_order", None))
    values, unknown = split_extras(fields)
    if spread is not None:
        _spread(values, spread)
    if words is not None:
        order = _chosen(values, words)
    active = sampling.active(values)
    if not order and not values.get("sampler_priority") and "temperature" in active and _TRUNCATION & active.keys():
        order = LLAMA_ORDER
    if order:
        values["sampler_priority"] = order
    return values, [*warnings, *unknown]


def _windows(fields: dict[str, Any]) -> None:
    """llama.cpp's windows of the last n tokens: -1 is the whole context, which is 0 here, and 0 is off."""
    if fields.get("repeat_last_n") == 0:
        for name in ("repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty"):
            fields.pop(name, None)
    if fields.get("dry_penalty_last_n") == 0:
        fields.pop("dry_penalty_last_n")
        fields.pop("dry_multiplier", None)
    for name in ("repeat_last_n", "dry_penalty_last_n"):
        if fields.get(name) == -1:
            fields[name] = 0


def _bias(fields: dict[str, Any]) -> None:
    """[[token id, bias], …] beside the map; false bans a token."""
    pairs = fields.get("logit_bias")
    if not isinstance(pairs, list):
        return
    mapped: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidParameter("logit_bias must be a list of [token id, bias].", param="logit_bias")
        token, bias = pair
        if isinstance(token, str):
            raise UnsupportedParameter(
                "logit_bias takes token ids here, no text.", hint="Get them from /tokenize.", param="logit_bias"
            )
        mapped[str(token)] = -100 if bias is False else bias
    fields["logit_bias"] = mapped


def _spread(values: dict[str, Any], spread: Any) -> None:
    """`dynatemp_range`: the temperature moves this far to both sides."""
    wide = sampling.PARAMETERS["dynatemp_high"].check(spread, "dynatemp_range")
    if wide > 0:
        middle = values.get("temperature", 1.0)
        low, high = max(0.0, middle - wide), middle + wide
        values.update(sampling.check({"dynamic_temperature": True, "dynatemp_low": low, "dynatemp_high": high}))


def _chosen(values: dict[str, Any], words: Any) -> tuple[str, ...]:
    """The order of `samplers`. What it leaves out is off, as in llama-server."""
    if isinstance(words, str):
        words = words.split(";")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InvalidParameter("samplers must be a list of names.", param="samplers")
    names = [_WORDS.get(word, word) for word in words]
    order = tuple(dict.fromkeys(step for name in names if name in _SAMPLERS for step in _SAMPLERS[name][0]))
    for name, (_, parameters) in _SAMPLERS.items():
        if name not in names:
            for parameter in parameters:
                values.pop(parameter, None)
    return order


def _kobold_order(numbers: Any) -> tuple[str, ...]:
    if numbers is None:
        return ()
    valid = isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 6 for n in numbers)
    if not valid or len(set(numbers)) != len(numbers):
        raise InvalidParameter("sampler_order must hold different numbers from 0 to 6.", param="sampler_order")
    return tuple(step for number in numbers for step in _KOBOLD_STEPS[number])

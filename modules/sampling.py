"""THE table of sampling parameters.

A parameter lives here and nowhere else: the UI's sliders, the API's fields and aliases, the preset checks, the generated
documentation and each loader's mapping are loops over PARAMETERS. A parameter at its neutral value is off.

Origins are in each help text. Ranges are what a request may carry; `ui` is what a slider shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modules.errors import InvalidParameter, UnsupportedParameter

MAX_TEXT = 100_000
Kind = Literal["float", "int", "bool", "text", "strings", "names", "bias"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One sampling parameter.

    `neutral` switches it off; `initial` is what the UI starts with where that differs. `minimum` and `maximum` are the
    accepted range (inclusive; with `above` the minimum itself is out). `group` is the UI section. `ui` is (low, high, step) for
    the slider.
    """

    name: str
    kind: Kind
    neutral: Any
    group: str
    minimum: float | None = None
    maximum: float | None = None
    ui: tuple[float, float, float] | None = None
    aliases: tuple[str, ...] = ()
    initial: Any = None
    choices: tuple[str, ...] = ()
    above: bool = False
    help: str = field(kw_only=True)

    @property
    def default(self) -> Any:
        """What a fresh settings page holds."""
        return self.neutral if self.initial is None else self.initial

    def check(self, value: Any, name: str | None = None) -> Any:
        """The value as its kind, or InvalidParameter that names the range. Strict: "12" and true are no numbers."""
        name = name or self.name
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise self._invalid(name, "must be true or false")
            return value
        if self.kind in ("float", "int"):
            return self._check_number(value, name)
        if self.kind in ("strings", "names"):
            return self._check_strings(value, name)
        if self.kind == "text":
            if not isinstance(value, str) or len(value) > MAX_TEXT:
                raise self._invalid(name, f"must be text of at most {MAX_TEXT} characters")
            return value
        return self._check_bias(value, name)

    def _check_number(self, value: Any, name: str) -> float | int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._invalid(name, "must be a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._invalid(name, "must be a finite number")
        if self.kind == "int" and value != int(value):
            raise self._invalid(name, "must be a whole number")
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high) or (self.above and value == low):
            raise self._invalid(name, f"must be {_range_text(low, high, above=self.above)}")
        return int(value) if self.kind == "int" else float(value)

    def _check_strings(self, value: Any, name: str) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
            raise self._invalid(name, "must be a list of non-empty strings")
        if len(value) > 64 or any(len(item) > 256 for item in value):
            raise self._invalid(name, "must hold at most 64 strings of at most 256 characters")
        unknown = [item for item in value if self.choices and item not in self.choices]
        if unknown:
            raise self._invalid(name, f"knows no {unknown[0]!r}; the names are {', '.join(self.choices)}")
        return tuple(value)

    def _check_bias(self, value: Any, name: str) -> dict[str, float]:
        if not isinstance(value, Mapping) or len(value) > 1024:
            raise self._invalid(name, "must map at most 1024 token ids to numbers")
        checked = {}
        for token, bias in value.items():
            if not str(token).isascii() or not str(token).isdigit() or len(str(token)) > 9:
                raise self._invalid(name, "must have token ids as keys")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                raise self._invalid(name, "must have numbers from -100 to 100 as values")
            checked[str(token)] = float(bias)
        return checked

    def _invalid(self, name: str, what: str) -> InvalidParameter:
        return InvalidParameter(f"{name} {what}.", param=name)


def _range_text(low: float | None, high: float | None, *, above: bool = False) -> str:
    if above:
        return f"above {low:g} and at most {high:g}"
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"


# The order in which samplers run when `sampler_priority` is empty.
SAMPLER_ORDER = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry",
    "top_n_sigma",
    "temperature",
    "dynamic_temperature",
    "quadratic_sampling",
    "top_k",
    "top_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "tfs",
    "top_a",
    "min_p",
    "adaptive_p",
    "mirostat",
    "xtc",
    "encoder_repetition_penalty",
    "no_repeat_ngram",
)

_P = Parameter
PARAMETERS: dict[str, Parameter] = {
    p.name: p
    for p in (
        _P("temperature", "float", 1.0, "Basics", 0.0, 100.0, (0.0, 5.0, 0.01), initial=0.7,
           help="Divides the logits: lower is safer, higher is wilder, 0 is greedy."),
        _P("top_p", "float", 1.0, "Basics", 0.0, 1.0, (0.01, 1.0, 0.01), initial=0.95, above=True,
           help="Nucleus sampling: keep the likeliest tokens that add up to this probability (Holtzman et al. 2019)."),
        _P("top_k", "int", 0, "Basics", -1, 1_000_000, (0, 200, 1),
           help="Keep this many likeliest tokens; 0 keeps all (Fan et al. 2018)."),
        _P("min_p", "float", 0.0, "Basics", 0.0, 1.0, (0.0, 1.0, 0.01), initial=0.05,
           help="Drop tokens less likely than this share of the likeliest (Nguyen et al. 2024)."),
        _P("seed", "int", -1, "Basics", -1, 2**63 - 1, None, ("sampler_seed",),
           help="Same seed, same text; -1 takes a new one each time."),
        _P("repetition_penalty", "float", 1.0, "Penalties", 0.01, 10.0, (1.0, 1.5, 0.01), ("repeat_penalty", "rep_pen"),
           help="Multiplicative penalty on tokens of the window (Keskar et al. 2019)."),
        _P("frequency_penalty", "float", 0.0, "Penalties", -2.0, 2.0, (0.0, 2.0, 0.05),
           help="Subtracted once per earlier occurrence (OpenAI)."),
        _P("presence_penalty", "float", 0.0, "Penalties", -2.0, 2.0, (0.0, 2.0, 0.05),
           help="Subtracted once if the token occurred at all (OpenAI)."),
        _P("repetition_penalty_range", "int", 0, "Penalties", 0, 1_000_000, (0, 4096, 64), ("repeat_last_n", "rep_pen_range"),
           initial=1024, help="Penalty window: how many tokens to look back; 0 is the whole context."),
        _P("encoder_repetition_penalty", "float", 1.0, "Penalties", 0.01, 10.0, (0.8, 1.5, 0.01),
           help="Above 1 favours tokens of the prompt (HF transformers)."),
        _P("no_repeat_ngram_size", "int", 0, "Penalties", 0, 1000, (0, 20, 1),
           help="No n-gram of this length occurs twice; 0 is off (Paulus et al. 2017)."),
        _P("dry_multiplier", "float", 0.0, "Penalties", 0.0, 100.0, (0.0, 5.0, 0.01),
           help="DRY: penalty for going on with a repeated sequence; 0 is off (p-e-w 2024)."),
        _P("dry_base", "float", 1.75, "Penalties", 1.0, 100.0, (1.0, 4.0, 0.01),
           help="DRY: growth of the penalty per repeated token."),
        _P("dry_allowed_length", "int", 2, "Penalties", 1, 1000, (1, 20, 1), help="DRY: repeats up to this length are free."),
        _P("dry_penalty_last_n", "int", 0, "Penalties", 0, 1_000_000, (0, 4096, 64),
           help="DRY: window in tokens; 0 is the whole context."),
        _P("dry_sequence_breakers", "strings", ("\n", ":", '"', "*"), "Penalties",
           help="DRY: strings that end a repeated sequence."),
        _P("top_n_sigma", "float", 0.0, "Truncation", 0.0, 100.0, (0.0, 5.0, 0.01), ("nsigma",),
           help="Keep logits within n standard deviations of the largest; 0 is off (Tang et al. 2024)."),
        _P("typical_p", "float", 1.0, "Truncation", 0.0, 1.0, (0.01, 1.0, 0.01), ("typical",), above=True,
           help="Locally typical sampling (Meister et al. 2022)."),
        _P("tfs", "float", 1.0, "Truncation", 0.0, 1.0, (0.0, 1.0, 0.01), ("tfs_z",),
           help="Tail-free sampling: cut where the curvature of the sorted probabilities fades (Bricken 2019)."),
        _P("top_a", "float", 0.0, "Truncation", 0.0, 1.0, (0.0, 1.0, 0.01),
           help="Drop tokens below this times the square of the largest probability (BlinkDL)."),
        _P("epsilon_cutoff", "float", 0.0, "Truncation", 0.0, 10_000.0, (0.0, 9.0, 0.01),
           help="Drop tokens below this probability, in units of 1e-4 (Hewitt et al. 2022)."),
        _P("eta_cutoff", "float", 0.0, "Truncation", 0.0, 10_000.0, (0.0, 20.0, 0.01),
           help="Entropy-dependent cut-off, in units of 1e-4 (Hewitt et al. 2022)."),
        _P("xtc_probability", "float", 0.0, "Truncation", 0.0, 1.0, (0.0, 1.0, 0.01),
           help="Exclude top choices: how often the likeliest ones are dropped; 0 is off (p-e-w 2024)."),
        _P("xtc_threshold", "float", 0.1, "Truncation", 0.0, 1.0, (0.0, 0.5, 0.01),
           help="XTC: tokens above this probability, but the least likely of them, are dropped."),
        _P("dynamic_temperature", "bool", False, "Shape",
           help="Temperature follows the entropy between low and high (kalomaze 2023)."),
        _P("dynatemp_low", "float", 1.0, "Shape", 0.0, 100.0, (0.01, 5.0, 0.01), help="Dynamic temperature: lowest."),
        _P("dynatemp_high", "float", 1.0, "Shape", 0.0, 100.0, (0.01, 5.0, 0.01), help="Dynamic temperature: highest."),
        _P("dynatemp_exponent", "float", 1.0, "Shape", 0.0, 100.0, (0.01, 5.0, 0.01),
           help="Dynamic temperature: curve from entropy to temperature."),
        _P("smoothing_factor", "float", 0.0, "Shape", 0.0, 100.0, (0.0, 10.0, 0.01),
           help="Quadratic sampling; 0 is off (kalomaze 2024)."),
        _P("smoothing_curve", "float", 1.0, "Shape", 1.0, 100.0, (1.0, 10.0, 0.01), help="Quadratic sampling: cubic share."),
        _P("mirostat_mode", "int", 0, "Shape", 0, 2, (0, 2, 1), ("mirostat",),
           help="Steer towards a perplexity: 0 off, 1 or 2 (Basu et al. 2020)."),
        _P("mirostat_tau", "float", 5.0, "Shape", 0.0, 100.0, (0.0, 10.0, 0.01), help="Mirostat: target surprise in bits."),
        _P("mirostat_eta", "float", 0.1, "Shape", 0.0, 1.0, (0.0, 1.0, 0.01), help="Mirostat: learning rate."),
        _P("adaptive_target", "float", 0.0, "Shape", 0.0, 1.0, (0.0, 1.0, 0.01),
           help="Adaptive-p: probability to aim at; 0 is off (llama.cpp)."),
        _P("adaptive_decay", "float", 0.9, "Shape", 0.0, 0.99, (0.0, 0.99, 0.01), help="Adaptive-p: memory of the running mean."),
        _P("guidance_scale", "float", 1.0, "Search", -10.0, 100.0, (-0.5, 2.5, 0.05),
           help="Classifier-free guidance against the negative prompt; 1 is off (Sanchez et al. 2023)."),
        _P("negative_prompt", "text", "", "Search",
           help="Guidance: the text to lead away from; empty is the prompt's last token."),
        _P("penalty_alpha", "float", 0.0, "Search", 0.0, 5.0, (0.0, 5.0, 0.01),
           help="Contrastive search with top_k; 0 is off (Su et al. 2022)."),
        _P("num_beams", "int", 1, "Search", 1, 32, (1, 20, 1),
           help="Beam search width; 1 is off. Beams come as one piece at the end."),
        _P("length_penalty", "float", 1.0, "Search", -10.0, 10.0, (-5.0, 5.0, 0.1),
           help="Beam search: exponent on the length; above 0 favours longer text."),
        _P("early_stopping", "bool", False, "Search", help="Beam search: stop when enough beams have ended."),
        _P("prompt_lookup_num_tokens", "int", 0, "Search", 0, 100, (0, 10, 1),
           help="Prompt-lookup decoding: draft this many tokens from the prompt; 0 is off (Saxena 2023)."),
        _P("temperature_last", "bool", False, "Order", help="Apply the temperature after all other samplers."),
        _P("sampler_priority", "names", (), "Order", choices=SAMPLER_ORDER,
           help="Order of the samplers; empty is the default order."),
        _P("ban_eos_token", "bool", False, "Tokens", aliases=("ignore_eos",), help="Never end by itself."),
        _P("skip_special_tokens", "bool", True, "Tokens", help="Leave special tokens out of the text."),
        _P("logit_bias", "bias", {}, "Tokens", help="Added to the logits of these token ids, -100 to 100."),
    )
}  # fmt: skip
ALIASES: dict[str, str] = {alias: p.name for p in PARAMETERS.values() for alias in p.aliases}

# Parameters that only shape another one: they count as set only when their master is on.
SUBORDINATE: dict[str, str] = {
    "repetition_penalty_range": "repetition_penalty",
    "dry_base": "dry_multiplier",
    "dry_allowed_length": "dry_multiplier",
    "dry_penalty_last_n": "dry_multiplier",
    "dry_sequence_breakers": "dry_multiplier",
    "xtc_threshold": "xtc_probability",
    "dynatemp_low": "dynamic_temperature",
    "dynatemp_high": "dynamic_temperature",
    "dynatemp_exponent": "dynamic_temperature",
    "smoothing_curve": "smoothing_factor",
    "mirostat_tau": "mirostat_mode",
    "mirostat_eta": "mirostat_mode",
    "adaptive_decay": "adaptive_target",
    "negative_prompt": "guidance_scale",
    "length_penalty": "num_beams",
    "early_stopping": "num_beams",
}
_WINDOWED = ("repetition_penalty", "frequency_penalty", "presence_penalty")

# What the field calls a preset that picks greedily or switches everything off.
CLASSIC = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})


def is_neutral(name: str, value: Any) -> bool:
    """Whether this value switches the parameter off. top_k -1 means off, as 0 does."""
    if name == "top_k":
        return bool(value <= 0)
    neutral = PARAMETERS[name].neutral
    return bool((list(value) == list(neutral)) if isinstance(neutral, tuple) else value == neutral)


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical names, checked values, None dropped. Raises InvalidParameter for an unknown name or a bad value."""
    checked: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in PARAMETERS:
            raise InvalidParameter(f"There is no sampling parameter {given!r}.", param=given)
        if value is not None:
            checked[name] = PARAMETERS[name].check(value, given)
    return checked


def active(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that do something: not neutral, and not subordinate to one that is off."""
    on = {name: value for name, value in values.items() if not is_neutral(name, value)}

    def in_force(name: str) -> bool:
        if name == "repetition_penalty_range":
            return any(p in on for p in _WINDOWED)
        return SUBORDINATE.get(name, name) in on

    return {name: value for name, value in on.items() if in_force(name)}


def split_supported(values: Mapping[str, Any], supported: Iterable[str], title: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(parameters a loader honours, active parameter it can't -> reason). `title` names the loader in the reason."""
    names = set(supported)
    honoured = {name: value for name, value in values.items() if name in names}
    ignored = {name: f"{title} does not have {name}." for name in active(values) if name not in names}
    return honoured, ignored


def require_supported(values: Mapping[str, Any], supported: Iterable[str], title: str) -> None:
    """Raise UnsupportedParameter for the first active parameter the loader can't honour (a strict request)."""
    for name, reason in split_supported(values, supported, title)[1].items():
        raise UnsupportedParameter(reason, hint="Leave it out, choose another backend, or send strict=false.", param=name)


def neutral_values() -> dict[str, Any]:
    return {name: p.neutral for name, p in PARAMETERS.items()}


def default_values() -> dict[str, Any]:
    """What the UI starts with."""
    return {name: p.default for name, p in PARAMETERS.items()}


def without_neutral(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset file holds: only what differs from neutral."""
    return {name: value for name, value in values.items() if not is_neutral(name, value)}

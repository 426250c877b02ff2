"""What a quantisation can be asked for, and which combinations the checkpoint format can't hold. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from modules.errors import IncompatibleModel, InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Mapping

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256)
METHODS = ("gptq", "rtn")
FORMATS = ("gptq", "gptq_v2")
# Who quantises: this product, or the auto-gptq package in its own environment.
ENGINES = ("switchyard", "auto-gptq")
# The format's readers unpack 32 values at a time, whatever the bits.
ROW_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """The algorithm's settings, under the names of quantize_config.json where it has one.

    `damp_percent` is the share of the Hessian's mean diagonal that is added to it. `nsamples` windows of `seqlen` tokens are
    read from `calibration`: a text file, or "bundled". `engine` is one of ENGINES.
    `checkpoint_format` gptq stores zero points − 1, gptq_v2 as they are.
    """

    bits: int = 4
    group_size: int = 128
    method: str = "gptq"
    desc_act: bool = False
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    damp_percent: float = 0.01
    mse: bool = False
    calibration: str = "bundled"
    nsamples: int = 128
    seqlen: int = 512
    engine: str = "switchyard"
    checkpoint_format: str = "gptq"

    @property
    def tag(self) -> str:
        """The part of a file name that says what this is: GPTQ-4bit-128g."""
        group = f"-{self.group_size}g" if self.group_size > 0 else ""
        name = self.method.upper() if self.engine == "switchyard" else "AutoGPTQ"
        return f"{name}-{self.bits}bit{group}" + ("-actorder" if self.scattered else "")

    @property
    def scattered(self) -> bool:
        """Whether act-order leaves the inputs of a group apart, so that a reader needs g_idx and pays for it."""
        return self.desc_act and not self.static_groups and self.group_size > 0

    @property
    def maxq(self) -> int:
        return int(2**self.bits - 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def complete_settings(given: Mapping[str, Any]) -> QuantizeSettings:
    """The settings asked for, the others at their defaults. Unless the order is asked for, GPTQ takes the inputs by falling
    activation where that costs nothing at run time: with the groups fixed first, or with none."""
    settings = QuantizeSettings(**given)
    if "desc_act" in given or "static_groups" in given or (settings.method, settings.engine) != ("gptq", "switchyard"):
        return settings
    return dataclasses.replace(settings, desc_act=True, static_groups=settings.group_size > 0)


def check_settings(settings: QuantizeSettings) -> None:
    """Raise InvalidParameter for a value or a combination that makes no sense."""
    s = settings
    _one_of("bits", s.bits, BITS)
    _one_of("group_size", s.group_size, GROUP_SIZES)
    _one_of("method", s.method, METHODS)
    _one_of("checkpoint_format", s.checkpoint_format, FORMATS)
    _one_of("engine", s.engine, ENGINES)
    _within("damp", s.damp_percent, 1e-6, 1.0)
    _within("nsamples", s.nsamples, 1, 100_000)
    _within("seqlen", s.seqlen, 8, 1_000_000)
    if s.method == "rtn" and (s.desc_act or s.static_groups):
        raise InvalidParameter(
            "desc_act and static_groups order GPTQ's columns; rounding to nearest has no order.",
            hint="Leave them out, or use --method gptq.",
            param="desc_act",
        )
    if s.engine == "auto-gptq" and (s.method != "gptq" or s.mse):
        raise InvalidParameter(
            "auto-gptq has neither rounding to nearest nor the search for the least error.",
            hint="Leave --engine out: this product's own quantiser has both.",
            param="engine",
        )
    if s.static_groups and s.group_size == -1:
        raise InvalidParameter(
            "static_groups needs groups.", hint="Give --group-size 128, or leave it out.", param="static_groups"
        )


def check_layer(name: str, in_features: int, out_features: int, settings: QuantizeSettings) -> None:
    """Raise IncompatibleModel when the format can't hold a layer of this shape at these settings."""
    for side, size in (("inputs", in_features), ("outputs", out_features)):
        if size % ROW_MULTIPLE:
            raise IncompatibleModel(
                f"Layer {name} has {size} {side}; a GPTQ checkpoint packs multiples of {ROW_MULTIPLE}.",
                hint="Convert this model to GGUF instead (server.py convert), which pads.",
            )
    if settings.group_size > 0 and in_features % settings.group_size:
        fitting = [g for g in GROUP_SIZES if g > 0 and in_features % g == 0]
        raise IncompatibleModel(
            f"Layer {name} has {in_features} inputs, which groups of {settings.group_size} don't divide.",
            hint=f"Use --group-size {' or '.join(map(str, [*fitting, -1]))}.",
        )


def period(bits: int) -> tuple[int, int]:
    """(values, words): the fewest values that fill whole 32-bit words. 4 bits: (8, 1); 3 bits: (32, 3)."""
    values = 32 // gcd(bits, 32)
    return values, values * bits // 32


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise InvalidParameter(f"{name} is {value!r}; it must be one of {', '.join(map(str, known))}.", param=name)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidParameter(f"{name} is {value}; it must be between {low:g} and {high:g}.", param=name)

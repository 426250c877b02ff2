from __future__ import annotations

from typing import Any

import pytest

from modules import sampling
from modules.errors import InvalidParameter, UnsupportedParameter
from modules.sampling import ALIASES, PARAMETERS, SAMPLER_ORDER, SUBORDINATE


@pytest.mark.parametrize("parameter", PARAMETERS.values(), ids=lambda p: p.name)
def test_table_is_consistent(parameter: sampling.Parameter) -> None:
    assert parameter.help.endswith((".", ")."))
    assert sampling.is_neutral(parameter.name, parameter.check(parameter.neutral))
    parameter.check(parameter.default)
    if parameter.ui:
        low, high, step = parameter.ui
        assert low < high and step > 0
        parameter.check(high)
        assert low <= (parameter.default if parameter.kind != "bool" else low) <= high


def test_aliases_and_masters_exist() -> None:
    assert not ALIASES.keys() & PARAMETERS.keys()
    for name, master in SUBORDINATE.items():
        assert name in PARAMETERS and master in PARAMETERS
    assert len(SAMPLER_ORDER) == len(set(SAMPLER_ORDER)) == 21


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1),
        ("temperature", 1e6),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2**63),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("seed", 2**70),
        ("seed", -2),
        ("ban_eos_token", 1),
        ("logit_bias", {"abc": 1}),
        ("logit_bias", {"1": float("nan")}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("sampler_priority", ["nonsense"]),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", "abc"),
        ("no_such_parameter", 1),
    ],
)
def test_bad_values_are_refused_with_their_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        sampling.check({name: value})
    assert caught.value.param == name
    assert name in caught.value.message


def test_check_takes_aliases_and_drops_none() -> None:
    assert sampling.check({"rep_pen": 1.2, "top_k": 5.0, "seed": None}) == {"repetition_penalty": 1.2, "top_k": 5}


def test_active_leaves_out_neutral_and_idle_subordinates() -> None:
    values = {"temperature": 1.0, "top_k": -1, "dry_base": 3.0, "xtc_probability": 0.5, "xtc_threshold": 0.2}
    assert sampling.active(values) == {"xtc_probability": 0.5, "xtc_threshold": 0.2}
    window = {"repetition_penalty_range": 64}
    assert sampling.active(window) == {}
    assert sampling.active(window | {"presence_penalty": 0.5}) == window | {"presence_penalty": 0.5}


def test_split_supported_reports_only_what_matters() -> None:
    values = {"temperature": 0.5, "tfs": 0.9, "top_a": 0.0}
    assert sampling.split_supported(values, {"temperature"}, "X") == ({"temperature": 0.5}, {"tfs": "X does not have tfs."})
    with pytest.raises(UnsupportedParameter, match="tfs"):
        sampling.require_supported(values, {"temperature"}, "X")


def test_presets_hold_what_differs() -> None:
    assert sampling.without_neutral(sampling.neutral_values() | {"top_p": 0.95}) == {"top_p": 0.95}

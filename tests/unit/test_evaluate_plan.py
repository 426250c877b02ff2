"""What an evaluation may be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from modules.command_line import parse
from modules.errors import BackendUnavailable, InvalidParameter
from modules.evaluate.bench import device_options
from modules.evaluate.plan import Plan, SpeedPlan, Target, cross, parse_target
from modules.registry import discover

SPECS = discover()


def test_targets_name_model_loader_and_options() -> None:
    assert parse_target("wren-6m", SPECS) == Target("wren-6m")
    assert parse_target("a/b@c.gguf@llamacpp", SPECS) == Target("a/b@c.gguf", "llamacpp")
    assert parse_target("me@home", SPECS) == Target("me@home")
    made = parse_target(r"C:\models\x.gguf@llamacpp:threads=2,flash-attn=off,no_mmap=true,rope_freq_base=1e4", SPECS)
    assert made == Target(
        r"C:\models\x.gguf", "llamacpp", {"threads": 2, "flash_attn": "off", "no_mmap": True, "rope_freq_base": 1e4}
    )
    assert parse_target("m@transformers:dtype=float32", SPECS).options == {"dtype": "float32"}
    for wrong in ("m@llamacpp:threads", "m@llamacpp:threads=two", "m@llamacpp:no_mmap=perhaps"):
        with pytest.raises(InvalidParameter):
            parse_target(wrong, SPECS)


def test_every_model_meets_every_loader_once() -> None:
    both = cross([Target("a"), Target("b", "echo"), Target("a")], ["transformers", "llamacpp"])
    assert [t.label for t in both] == ["a@transformers", "a@llamacpp", "b@echo"]
    assert cross([Target("a"), Target("a")], []) == (Target("a"),)


def plan(**changes: Any) -> dict[str, Any]:
    return {"targets": [{"model": "m"}], "data": ["bundled"], **changes}


def test_a_plan_survives_its_own_json() -> None:
    made = Plan.from_dict(
        plan(
            speed={"beams": [1, 4]},
            questions={"questions": ["Why?"], "reference": 0},
            tasks={"tasks": ["x"], "limit": 3},
            context=512,
            stride=256,
        )
    )
    assert made.speed == SpeedPlan(beams=(1, 4))
    assert Plan.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": []},
        {"targets": "m"},
        {"targets": [{"model": ""}]},
        {"targets": [{"model": "m", "path": "/etc"}]},
        {"targets": [{"model": "m", "loader": 3}]},
        {"data": [], "speed": None},
        {"data": "bundled"},
        {"data": [3]},
        {"context": -1},
        {"context": True},
        {"context": 8, "stride": 9},
        {"windows": "none"},
        {"speed": {"beams": []}},
        {"speed": {"beams": ["4"]}},
        {"speed": {"repetitions": 0}},
        {"speed": [1]},
        {"questions": {"questions": []}},
        {"questions": {"questions": ["a"], "reference": 1}},
        {"tasks": {"tasks": []}},
        {"tasks": {"tasks": ["a"], "few_shot": -1}},
        {"nonsense": 1},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        Plan.from_dict(plan(**wrong))


def test_devices_become_each_loaders_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_options(SPECS["transformers"], "cpu") == {"cpu": True}
    assert device_options(SPECS["llamacpp"], "cpu") == {"gpu_layers": 0}
    assert device_options(SPECS["llamacpp"], "auto") == {}
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("modules.evaluate.bench.detect", lambda: type("H", (), {"kind": "cpu", "name": "no GPU"})())
    with pytest.raises(BackendUnavailable, match="no cuda device"):
        device_options(SPECS["transformers"], "cuda")


def test_a_subcommand_s_own_flags_are_no_other_product_s() -> None:
    config = parse(["bench", "echo", "--num_beams", "1", "4", "--max_tokens", "9"], environ={})
    assert config.arguments is not None
    assert (config.arguments.num_beams, config.arguments.max_tokens, config.arguments.models) == ([1, 4], 9, ["echo"])
    assert config.warnings == ()

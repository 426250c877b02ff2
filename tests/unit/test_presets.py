"""Presets: the starter set, foreign files, bad names and bad content."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules import sampling
from modules.errors import ConfigError, InvalidParameter, NotFound, StorageError
from modules.presets import Presets

ROOT = Path(__file__).resolve().parents[2]


def test_the_starter_set_reads_without_a_problem() -> None:
    presets = Presets(ROOT / "presets").all()
    assert len(presets) >= 10
    for preset in presets:
        assert preset.problems == (), preset
        assert preset.sampling and sampling.check(preset.sampling) == preset.sampling
    assert {"Deterministic", "Creative", "simple-1"} <= {preset.name for preset in presets}


def test_save_load_delete(tmp_path: Path) -> None:
    presets = Presets(tmp_path / "prä sets")
    assert presets.names() == []
    saved = presets.save("My préset 1", {"temperature": 0.5, "top_p": 1.0, "dry_sequence_breakers": ["\n"], "rep_pen": 1.1})
    assert saved.sampling == {"temperature": 0.5, "dry_sequence_breakers": ("\n",), "repetition_penalty": 1.1}
    assert presets.load("My préset 1") == saved
    assert "top_p" not in (tmp_path / "prä sets" / "My préset 1.yaml").read_text(encoding="utf-8")
    presets.save("My préset 1", {"temperature": 0.9})
    assert presets.load("My préset 1").sampling == {"temperature": 0.9}
    presets.delete("My préset 1")
    assert presets.names() == []
    for action in (presets.load, presets.delete):
        with pytest.raises(NotFound):
            action("My préset 1")


DRY = 'dry_multiplier: 1\ndry_sequence_breakers: \'"\\n", "x"\'\n'


@pytest.mark.parametrize(
    ("text", "values", "problem"),
    [
        ("do_sample: false\ntop_k: 1\n", {"temperature": 0.0, "top_k": 1}, None),
        ("", {}, None),
        ("temperature: 1\ntop_p: 1\n", {}, None),
        (DRY, {"dry_multiplier": 1.0, "dry_sequence_breakers": ("\n", "x")}, None),
        ("sampler_priority: |-\n  temperature\n  top_k\n", {"sampler_priority": ("temperature", "top_k")}, None),
        ("rep_pen: 1.2\n", {"repetition_penalty": 1.2}, None),
        ("temperature: 0.5\nmagic: 1\n", {"temperature": 0.5}, "magic"),
        ("temperature: hot\ntop_k: 3\n", {"top_k": 3}, "temperature"),
        ("temperature: .nan\ntop_k: 3\n", {"top_k": 3}, "temperature"),
        ("top_k: true\nmin_p: 7\n", {}, "min_p"),
        ("- a\n- b\n", {}, "no map"),
        ("\ufefftop_k: 3\n", {"top_k": 3}, None),
    ],
)  # fmt: skip
def test_foreign_files(tmp_path: Path, text: str, values: dict[str, object], problem: str | None) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    preset = Presets(tmp_path).load("x")
    assert preset.sampling == values
    assert (problem in " ".join(preset.problems)) if problem else preset.problems == ()


BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"


@pytest.mark.parametrize(
    "data",
    [
        b"!!python/object/apply:os.system ['true']",
        b"temperature: !!python/name:os.system",
        BOMB.encode(),
        b"\xff\xfe\x00t",
        b"{unclosed",
        b"[" * 5000,
        b"x: 1\n" * 20_000,
        b"\x00\x01\x02",
    ],
)
def test_hostile_files_are_config_errors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    presets = Presets(tmp_path)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        presets.load("x")
    assert presets.all()[0].problems


@pytest.mark.parametrize(
    "name",
    ["../x", "..\\x", "/etc/passwd", "C:x", "a/b", "", ".", "..", ".hidden", "CON", "x\0y", "a ", "%2e%2e/x", "n" * 300, "a\nb"],
)
def test_bad_names(tmp_path: Path, name: str) -> None:
    presets = Presets(tmp_path / "presets")
    for action in (presets.load, presets.delete, lambda n: presets.save(n, {})):
        with pytest.raises(InvalidParameter):
            action(name)
    assert not list(tmp_path.rglob("*.yaml"))


def test_twins_by_case_are_refused(tmp_path: Path) -> None:
    presets = Presets(tmp_path)
    presets.save("Creative", {"top_k": 3})
    with pytest.raises(InvalidParameter, match="Creative"):
        presets.save("creative", {"top_k": 4})
    assert presets.names() == ["Creative"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError):
        Presets(tmp_path / "file").save("x", {"top_k": 3})


def test_bad_values_are_not_saved(tmp_path: Path) -> None:
    presets = Presets(tmp_path)
    with pytest.raises(InvalidParameter):
        presets.save("x", {"temperature": "hot"})
    with pytest.raises(InvalidParameter):
        presets.save("x", {"magic": 1})
    assert presets.names() == []

"""Settings: defaults, checks, files that are broken, disks that refuse; and load options that stay with their model."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from modules import sampling, yaml_file
from modules.errors import InvalidParameter, NotFound, StorageFull, StorageReadOnly
from modules.presets import Presets
from modules.schema import LoaderSpec, OptionSpec
from modules.settings import SETTINGS, ModelSettings, Settings

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "dätä" / "settings.yaml"
    settings = Settings(path)
    assert settings.problems == [] and not path.exists()
    assert set(settings.values()) == set(SETTINGS)
    assert settings.values()["sampling"].keys() == sampling.PARAMETERS.keys()
    settings.update({"max_tokens": None, "stop": ["END", "\n\n"], "sampling": {"temperature": 0.25, "rep_pen": 1.2}})
    again = Settings(path)
    assert again.problems == [] and again["max_tokens"] is None and again["stop"] == ["END", "\n\n"]
    assert again.values()["sampling"]["repetition_penalty"] == 1.2
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["sampling"] == {"temperature": 0.25, "repetition_penalty": 1.2}


def test_sampling_is_merged_and_null_resets(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "settings.yaml")
    settings.update({"sampling": {"temperature": 0.25, "top_k": 5}})
    values = settings.update({"sampling": {"temperature": None, "min_p": 0.2}})["sampling"]
    assert (values["temperature"], values["top_k"], values["min_p"]) == (sampling.PARAMETERS["temperature"].default, 5, 0.2)
    settings.update({"theme": "dark"})
    settings.update({"theme": None})
    assert settings["theme"] == "system"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": "12"}, {"max_tokens": 2**31}, {"stop": "x"}, {"stop": [""]},
        {"stop": ["x"] * 65}, {"theme": "pink"}, {"system_prompt": 3}, {"system_prompt": "x" * 100_001}, {"show_receipts": 1},
        {"system_prompt": "\ud800"}, {"stop": ["\udfff"]},
        {"sampling": {"temperature": float("nan")}}, {"sampling": {"nope": 1}}, {"sampling": []}, {"__class__": 1},
        {"last_model": {"model": "x"}},
    ],
)  # fmt: skip
def test_bad_values_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = Settings(tmp_path / "settings.yaml")
    settings.update({"max_tokens": 7})
    before = settings.values()
    with pytest.raises(InvalidParameter):
        settings.update({"theme": "dark", **changes})
    assert settings.values() == before


def test_a_preset_brings_its_values(tmp_path: Path) -> None:
    presets = Presets(tmp_path / "presets")
    presets.save("Hot", {"temperature": 1.5, "xtc_probability": 0.5})
    settings = Settings(tmp_path / "settings.yaml", presets)
    settings.update({"sampling": {"top_k": 3}})
    values = settings.update({"preset": "Hot"})
    assert values["preset"] == "Hot"
    assert sampling.active(values["sampling"]) == {"temperature": 1.5, "xtc_probability": 0.5}
    assert sampling.active(Settings(tmp_path / "settings.yaml").values()["sampling"]) == sampling.active(values["sampling"])
    kept = settings.update({"preset": "Hot", "sampling": {"temperature": 1.1}})["sampling"]
    assert kept["temperature"] == 1.1, "values that come along win"
    with pytest.raises(NotFound):
        settings.update({"preset": "Nope"})
    assert settings["preset"] == "Hot"


def test_a_file_with_bad_values_keeps_the_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    text = "max_tokens: many\ntheme: dark\nunknown_thing: 1\nsampling:\n  temperature: 99999\n  top_k: 7\n"
    path.write_text(text, encoding="utf-8")
    settings = Settings(path)
    assert settings["theme"] == "dark" and settings["max_tokens"] == SETTINGS["max_tokens"].default
    assert settings.values()["sampling"]["top_k"] == 7
    for word in ("max_tokens", "unknown_thing", "temperature", "settings.yaml.bad"):
        assert any(word in problem for problem in settings.problems), word
    settings.update({"theme": "light"})
    assert (tmp_path / "settings.yaml.bad").read_text(encoding="utf-8") == text
    assert Settings(path).problems == []


@pytest.mark.parametrize("data", [b"\x00\xff", b"{", b"- 1\n- 2\n", b"just text", b"a: &a [1]\nb: *a\n"])
def test_a_broken_file_is_kept_and_the_defaults_used(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(data)
    settings = Settings(path)
    assert settings.problems and settings["theme"] == "system"
    settings.update({"theme": "dark"})
    assert (tmp_path / "settings.yaml.bad").read_bytes() == data
    assert Settings(path)["theme"] == "dark"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EROFS, StorageReadOnly), (errno.EIO, StorageReadOnly)]
)
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]) -> None:
    path = tmp_path / "settings.yaml"
    settings = Settings(path)
    settings.update({"theme": "dark"})
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(yaml_file.os, "fsync", refuse)
    values = settings.update({"theme": "light"})
    assert values["theme"] == "light", "the value counts until the server ends"
    assert isinstance(settings.unsaved, kind) and "settings.yaml" in str(settings.unsaved)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["settings.yaml"], "no half-written file is left"
    monkeypatch.undo()
    settings.update({"max_tokens": 5})
    assert settings.unsaved is None and Settings(path)["theme"] == "light"


# -- model settings

SPECS = {
    name: LoaderSpec(
        name=name, title=name, engine="x:y", summary="", formats={"gguf": 1}, samplers=frozenset(),
        options=(OptionSpec("n_ctx", "int", 4096, "", minimum=0, aliases=("ctx_size",)), OptionSpec("mmap", "bool", True, "")),
    )
    for name in ("llamacpp", "other")
}  # fmt: skip


def test_load_options_stay_with_their_model(tmp_path: Path) -> None:
    path = tmp_path / "model_settings.yaml"
    saved = ModelSettings(path, SPECS)
    saved.save("a/b.gguf", "llamacpp", {"ctx_size": 512, "mmap": True})
    saved.save("c.gguf", "other", {"mmap": False})
    for settings in (saved, ModelSettings(path, SPECS)):
        assert settings.problems == []
        assert settings.options("a/b.gguf", "llamacpp") == {"n_ctx": 512}
        assert settings.options("a/b.gguf", "other") == {} == settings.options("c.gguf", "llamacpp")
        assert settings.options("new.gguf", "llamacpp") == {}
        assert (settings.loader("a/b.gguf"), settings.loader("c.gguf"), settings.loader("new")) == ("llamacpp", "other", None)
    saved.save("a/b.gguf", "llamacpp", {})
    assert saved.options("a/b.gguf", "llamacpp") == {}
    saved.forget("a/b.gguf")
    assert ModelSettings(path, SPECS).loader("a/b.gguf") is None
    with pytest.raises(InvalidParameter):
        saved.save("c.gguf", "other", {"n_ctx": -5})


def test_bad_saved_options_are_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model_settings.yaml"
    path.write_text(
        "m:\n  loader: gone\n  options:\n    llamacpp: {n_ctx: lots, mmap: false, magic: 1}\n    gone: {}\nn: 3\n",
        encoding="utf-8",
    )
    settings = ModelSettings(path, SPECS)
    assert settings.options("m", "llamacpp") == {"mmap": False} and settings.loader("m") is None
    for word in ("gone", "n_ctx", "magic", "n has no map", "model_settings.yaml.bad"):
        assert any(word in problem for problem in settings.problems), word
    for data in (b"\x00", b"- 1\n"):
        path.write_bytes(data)
        assert ModelSettings(path, SPECS).problems

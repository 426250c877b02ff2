"""Model files renamed, put into the trash and taken out again; config-user.yaml; which browser may open a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modules.api.ui_library import from_here
from modules.errors import Conflict, InvalidParameter, ModelNotFound, NotFound, StorageError
from modules.library import LocalLibrary
from modules.open_folder import opener
from modules.registry import discover
from modules.schema import ModelFiles
from modules.settings import ModelSettings
from modules.shelf import TRASH, Shelf
from modules.user_config import read_user_config
from tests.unit.model_files import LLAMA, llama_tensors, safetensors_bytes, tokenizer_json

SPECS = discover()
SMALL = {**LLAMA, "vocab_size": 256, "hidden_size": 64}


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    (path / "model.safetensors").write_bytes(safetensors_bytes(llama_tensors({"vocab_size": 256, "hidden_size": 64})))


class Place:
    def __init__(self, root: Path) -> None:
        self.root = root / "models ü"
        self.root.mkdir()
        self.library = LocalLibrary([self.root], SPECS.values())
        self.settings = ModelSettings(root / "model_settings.yaml", SPECS)
        self.shelf = Shelf(self.library, self.settings)

    def find(self, name: str) -> ModelFiles:
        return self.library.find(name)

    def ids(self) -> list[str]:
        return [model.id for model in self.library.list() if model.format != "echo"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    make_folder(made.root / "llama")
    for part in ("00001", "00002"):
        (made.root / f"big-{part}-of-00002.gguf").write_bytes(b"GGUF broken")
    (made.root / "one.gguf").write_bytes(b"GGUF broken, too")
    return made


def test_a_renamed_model_takes_its_settings_along_and_leaves_none(place: Place) -> None:
    place.settings.save("llama", "transformers", {"load_in_4bit": True})
    place.settings.save("other", "transformers", {"load_in_8bit": True})
    assert place.shelf.rename(place.find("llama"), "mine/lläma") == "mine/lläma"
    assert place.find("mine/lläma").format == "hf"
    assert place.settings.options("mine/lläma", "transformers") == {"load_in_4bit": True}
    assert place.settings.loader("llama") is None and place.settings.options("llama", "transformers") == {}
    assert place.settings.options("other", "transformers") == {"load_in_8bit": True}
    with pytest.raises(ModelNotFound):
        place.find("llama")


def test_a_file_keeps_its_suffix_and_its_parts_stay_together(place: Place) -> None:
    assert place.shelf.rename(place.find("one.gguf"), "two") == "two.gguf"
    new = place.shelf.rename(place.find("big-00001-of-00002.gguf"), "huge.gguf")
    assert new == "huge-00001-of-00002.gguf"
    names = sorted(path.name for path in place.root.glob("*.gguf"))
    assert names == ["huge-00001-of-00002.gguf", "huge-00002-of-00002.gguf", "two.gguf"]


@pytest.mark.parametrize(
    "name", ["", "../out", "/etc/x", "a/../../b", "CON", "x\0", ".hidden", "_trash/x", "a/b/" * 9 + "c", "x" * 300]
)
def test_names_that_are_none(place: Place, name: str) -> None:
    before = sorted(path.name for path in place.root.iterdir())
    with pytest.raises(InvalidParameter):
        place.shelf.rename(place.find("llama"), name)
    assert sorted(path.name for path in place.root.iterdir()) == before


def test_nothing_is_overwritten(place: Place) -> None:
    with pytest.raises(Conflict, match="exists already"):
        place.shelf.rename(place.find("one.gguf"), "big-00002-of-00002")
    make_folder(place.root / "llama2")
    with pytest.raises(Conflict, match="exists already"):
        place.shelf.rename(place.find("llama"), "llama2")


def test_the_trash_gives_back_what_it_took(place: Place) -> None:
    place.settings.save("llama", "transformers", {"load_in_4bit": True})
    weights = (place.root / "llama" / "model.safetensors").read_bytes()
    folder = place.shelf.trash(place.find("llama"))
    parts = place.shelf.trash(place.find("big-00001-of-00002.gguf"))
    assert place.ids() == ["one.gguf"]
    assert [entry.model for entry in place.shelf.trashed()] == ["big-00001-of-00002.gguf", "llama"]
    assert place.settings.options("llama", "transformers") == {}
    assert place.shelf.restore(folder.id) == "llama" and place.shelf.restore(parts.id) == "big-00001-of-00002.gguf"
    assert (place.root / "llama" / "model.safetensors").read_bytes() == weights
    assert (place.root / "big-00002-of-00002.gguf").is_file()
    assert place.settings.options("llama", "transformers") == {"load_in_4bit": True}
    assert place.shelf.trashed() == [] and list((place.root / TRASH).iterdir()) == []


def test_what_came_in_its_place_is_kept(place: Place) -> None:
    entry = place.shelf.trash(place.find("one.gguf"))
    (place.root / "one.gguf").write_bytes(b"GGUF a new one")
    with pytest.raises(Conflict, match="there again"):
        place.shelf.restore(entry.id)
    assert (place.root / "one.gguf").read_bytes() == b"GGUF a new one"
    assert len(place.shelf.trashed()) == 1


def test_emptying_deletes_entries_and_nothing_else(place: Place) -> None:
    first, second = place.shelf.trash(place.find("one.gguf")), place.shelf.trash(place.find("llama"))
    (place.root / TRASH / "notes.txt").write_text("mine", encoding="utf-8")
    assert place.shelf.empty(first.id) == first.size_bytes
    assert place.shelf.empty() == second.size_bytes
    assert [path.name for path in (place.root / TRASH).iterdir()] == ["notes.txt"]
    for entry_id in (first.id, "../llama", "", "0" * 12):
        with pytest.raises(NotFound):
            place.shelf.empty(entry_id)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: {**info, "parent": "../.."},
        lambda info: {**info, "names": ["../../../evil"]},
        lambda info: {**info, "names": "llama"},
        lambda info: {**info, "id": "0" * 12},
        lambda info: {**info, "size_bytes": "x"},
        lambda info: [],
    ],
)
def test_an_edited_entry_leads_nowhere(place: Place, change: Callable[[Any], Any]) -> None:
    entry = place.shelf.trash(place.find("one.gguf"))
    info = place.root / TRASH / entry.id / "info.json"
    info.write_text(json.dumps(change(json.loads(info.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises((NotFound, InvalidParameter)):
        place.shelf.restore(entry.id)
    assert (place.root / TRASH / entry.id / "files" / "one.gguf").is_file()


def test_a_folder_with_another_model_in_it_stays(place: Place) -> None:
    (place.root / "llama" / "quant.gguf").write_bytes(b"GGUF broken")
    with pytest.raises(Conflict, match="lies in the folder"):
        place.shelf.trash(place.find("llama"))


def test_what_comes_with_the_product_stays(place: Place) -> None:
    (place.root / "bundled.json").write_text('{"models": ["llama"]}', encoding="utf-8")
    with pytest.raises(Conflict, match="comes with"):
        place.shelf.trash(place.find("llama"))


def test_a_model_outside_the_folders_is_not_ours(place: Place, tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere")
    model = place.library.admit(str(tmp_path / "elsewhere"))
    with pytest.raises(Conflict, match="no model folder"):
        place.shelf.trash(model)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_can_not_be_written(place: Place) -> None:
    place.root.chmod(0o500)
    try:
        with pytest.raises(StorageError):
            place.shelf.trash(place.find("llama"))
    finally:
        place.root.chmod(0o700)


def test_half_a_move_is_taken_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "big-00002-of-00002.gguf":
            raise PermissionError(13, "in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="in use"):
        place.shelf.rename(place.find("big-00001-of-00002.gguf"), "huge")
    assert (place.root / "big-00001-of-00002.gguf").is_file()


# --- config-user.yaml ------------------------------------------------------------------------------------------------

MODELS = [ModelFiles(name, name, "gguf") for name in ("Llama-3-8B.Q4_K_M.gguf", "sub/qwen.gguf", "TheBloke_Wizard-GPTQ")]


def test_a_config_of_the_other_product_is_read() -> None:
    text = """
Llama-3-8B.Q4_K_M.gguf$:
  loader: llama.cpp
  gpu_layers: 20
  ctx-size: 8192
  threads: 4
  instruction_template: Llama-v3
  no_such_thing: 1
  lora: /etc/passwd
.*wizard.*gptq:
  loader: ExLlamav2_HF
nobody:
  loader: Transformers
"""
    found = read_user_config(text, MODELS, SPECS)
    (llama, loader, options), (wizard, exllama, _) = found.saved
    assert (llama, loader) == ("Llama-3-8B.Q4_K_M.gguf", "llamacpp")
    for name, value in (("gpu_layers", 20), ("ctx_size", 8192)):
        option = SPECS["llamacpp"].option(name)
        assert option is not None and options[option.name] == value
    assert (wizard, exllama) == ("TheBloke_Wizard-GPTQ", "exllama")
    reasons = dict(found.skipped)
    assert "no model here" in reasons["nobody"]
    assert "template" in reasons["Llama-3-8B.Q4_K_M.gguf: instruction_template"]
    assert "no such option" in reasons["Llama-3-8B.Q4_K_M.gguf: no_such_thing"]
    assert not any("passwd" in str(value) for value in options.values())


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("qwen.gguf$", ["sub/qwen.gguf"]),
        ("qwen$", ["sub/qwen.gguf"]),
        ("sub/qwen", ["sub/qwen.gguf"]),
        (r"llama-3-8b\.q4", ["Llama-3-8B.Q4_K_M.gguf"]),
        ("wen", []),
        ("(a+)+$", []),
        (".*" * 50 + "x", []),
        (".*", []),
    ],
)
def test_patterns_are_names_with_wildcards(pattern: str, matching: list[str]) -> None:
    text = json.dumps({pattern: {"loader": "llama.cpp"}})
    assert [model for model, _, _ in read_user_config(text, MODELS, SPECS).saved] == matching


@pytest.mark.parametrize(
    "text", ["- a\n- b", "a: [", "x: &a [1]\ny: *a", "!!python/object/apply:os.system ['true']", "\x00", "{" * 5000]
)
def test_what_is_no_such_file_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter):
        read_user_config(text, MODELS, SPECS)


def test_bad_values_are_left_out_and_said() -> None:
    found = read_user_config("qwen: {loader: llama.cpp, threads: many, n_ctx: -5}\nllama: {}\nwizard: 3", MODELS, SPECS)
    (saved,) = found.saved
    assert saved[2] == {}
    assert len(found.skipped) == 4


# --- the folder on the desktop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "headers", "here"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("192.168.1.5", {}, False),
        ("127.0.0.1", {"x-forwarded-for": "1.2.3.4"}, False),
        ("127.0.0.1", {"forwarded": "for=1.2.3.4"}, False),
        ("testclient", {}, False),
    ],
)
def test_who_is_on_this_machine(host: str, headers: dict[str, str], here: bool) -> None:
    request: Any = SimpleNamespace(client=SimpleNamespace(host=host), headers=headers)
    assert from_here(request) is here


def test_what_opens_a_folder(tmp_path: Path) -> None:
    assert opener("win32", {}) == "explorer" and opener("darwin", {}) == "open"
    assert opener("linux", {"PATH": str(tmp_path)}) is None
    if os.name == "posix":
        (tmp_path / "xdg-open").write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / "xdg-open").chmod(0o755)
        assert opener("linux", {"PATH": str(tmp_path), "DISPLAY": ":0"}) == "xdg-open"
        assert opener("linux", {"PATH": str(tmp_path)}) is None

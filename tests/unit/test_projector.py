"""Projectors (mmproj): a part of the model beside them, in the list, in the plan, in a download and on the shelf."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from loaders.llamacpp import SPEC, estimate
from loaders.llamacpp import settings as worth_trying
from modules.detect import check, find_model, inspect, list_models
from modules.detect.gguf_header import first_keys
from modules.detect.projector import check_projector, find_projector
from modules.detect.remembered import HeaderCache
from modules.download import add_parser, run
from modules.download.plan import RepoFile, best_projector, choose_files, variants
from modules.errors import CorruptModel, IncompatibleModel, LoadError
from modules.library import LocalLibrary
from modules.plan.planner import complete
from modules.plan.shape import read_shape
from modules.plan.types import Machine
from modules.settings import ModelSettings
from modules.shelf import Shelf
from tests.unit.hub_server import FakeHub
from tests.unit.model_files import BOOL, STRING, U32, gguf_bytes, gguf_keys, projector_bytes

MODEL = gguf_bytes()


def folder(root: Path, **files: bytes) -> Path:
    """GGUF files by name, without their suffix."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / f"{name}.gguf").write_bytes(data)
    return root


def found(root: Path, model: str) -> str | None:
    chosen = find_projector(root / model)
    return chosen.path.name if chosen is not None else None


def test_a_projector_is_a_part_of_the_model_beside_it(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", seer_Q8_0=MODEL, eyes=projector_bytes())  # by content: its name says nothing
    (tmp_path / "other.gguf").write_bytes(MODEL)
    models = {model.id: model for model in list_models([tmp_path])}
    assert list(models) == ["m/seer_Q8_0.gguf", "other.gguf"]
    seer = models["m/seer_Q8_0.gguf"]
    assert (seer.vision, seer.projector, seer.files) == (True, "eyes.gguf", ("seer_Q8_0.gguf", "eyes.gguf"))
    assert seer.size_bytes == len(MODEL) + (root / "eyes.gguf").stat().st_size
    assert not models["other.gguf"].vision and models["other.gguf"].projector is None
    assert inspect(root / "seer_Q8_0.gguf").projector == "eyes.gguf"
    assert check(root / "seer_Q8_0.gguf").problem is None


def test_a_projector_that_comes_and_goes_is_noticed(tmp_path: Path) -> None:
    root, cache = folder(tmp_path, seer=MODEL), HeaderCache(tmp_path / "headers.json")
    assert not list_models([root], cache)[0].vision
    folder(root, mmproj=projector_bytes())
    assert list_models([root], cache)[0].vision
    (root / "mmproj.gguf").unlink()
    assert not list_models([root], cache)[0].vision


def test_alone_it_is_no_model_and_says_what_it_is(tmp_path: Path) -> None:
    folder(tmp_path, mmproj_F16=projector_bytes())
    assert list_models([tmp_path]) == []
    named = find_model("mmproj_F16.gguf", [tmp_path])
    assert named.format == "mmproj" and "multimodal projector" in str(named.problem)
    with pytest.raises(IncompatibleModel, match="multimodal projector"):
        check(tmp_path / "mmproj_F16.gguf")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["mmproj-BF16", "mmproj-F32", "mmproj-F16"], "mmproj-F16.gguf"),
        (["mmproj-F32", "mmproj-BF16"], "mmproj-BF16.gguf"),
        (["mmproj-F32"], "mmproj-F32.gguf"),
    ],
)
def test_of_several_the_one_in_16_bits(tmp_path: Path, names: list[str], chosen: str) -> None:
    types = {"F16": 1, "BF16": 32, "F32": 0}
    for name in names:
        (tmp_path / f"{name}.gguf").write_bytes(projector_bytes(kind=types[name.removeprefix("mmproj-")]))
    imatrix = gguf_bytes({"general.type": (STRING, "imatrix"), **gguf_keys()})
    folder(tmp_path, seer_Q8_0=MODEL, seer_Q4_K_M=MODEL, imatrix_unheard=imatrix)
    assert found(tmp_path, "seer_Q8_0.gguf") == chosen


def test_in_a_folder_of_several_models_the_name_decides(tmp_path: Path) -> None:
    for name in ("Big.Seer-7B-Q4_K_M", "Small-Seer-2B-Q8_0", "Blind-7B-F16"):
        (tmp_path / f"{name}.gguf").write_bytes(MODEL)
    for name in ("mmproj-Big.Seer-7B-f16", "Small-Seer-2B-mmproj-model-f16", "mmproj-F16"):
        (tmp_path / f"{name}.gguf").write_bytes(projector_bytes())
    assert found(tmp_path, "Big.Seer-7B-Q4_K_M.gguf") == "mmproj-Big.Seer-7B-f16.gguf"
    assert found(tmp_path, "Small-Seer-2B-Q8_0.gguf") == "Small-Seer-2B-mmproj-model-f16.gguf"
    assert found(tmp_path, "Blind-7B-F16.gguf") is None


def test_one_that_does_not_fit_or_is_damaged_is_named_before_a_load(tmp_path: Path) -> None:
    root = folder(tmp_path, seer=MODEL, mmproj=projector_bytes(width=64))
    with pytest.raises(IncompatibleModel, match=r"vectors of 64 numbers, this model reads 32"):
        check_projector(root / "mmproj.gguf", root / "seer.gguf")
    assert (inspect(root / "seer.gguf").projector, inspect(root / "seer.gguf").vision) == ("mmproj.gguf", False)
    (root / "mmproj.gguf").write_bytes(projector_bytes()[:-100])
    with pytest.raises(CorruptModel, match="projector can't be used"):
        check_projector(root / "mmproj.gguf", root / "seer.gguf")
    assert find_projector(root / "seer.gguf") is not None, "the load has to say so"
    for data in (MODEL, projector_bytes(clip__has_vision_encoder=None, clip__has_audio_encoder=(BOOL, True)), b"", b"GGUF"):
        (root / "mmproj.gguf").write_bytes(data)
        with pytest.raises(LoadError):
            check_projector(root / "mmproj.gguf", root / "seer.gguf")
    with pytest.raises(IncompatibleModel, match="No such file"):
        check_projector(root / "none.gguf", root / "seer.gguf")


def test_an_old_projector_is_not_judged_by_a_key_that_meant_something_else(tmp_path: Path) -> None:
    root = folder(tmp_path, seer=MODEL, mmproj=projector_bytes(width=768, general__type=None))
    check_projector(root / "mmproj.gguf", root / "seer.gguf")


def test_a_projector_for_sounds_is_left_alone(tmp_path: Path) -> None:
    sounds = projector_bytes(clip__has_vision_encoder=None, clip__has_audio_encoder=(BOOL, True))
    root = folder(tmp_path, talker=MODEL, mmproj=sounds)
    assert found(root, "talker.gguf") is None and [model.id for model in list_models([root])] == ["talker.gguf"]


def test_the_first_keys_are_read_without_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(gguf_keys())[:600])  # cut inside the tokenizer's keys
    assert first_keys(path)["llama.embedding_length"] == 32
    path.write_bytes(b"<html>")
    assert first_keys(path) == {}


def test_its_memory_is_planned_for(tmp_path: Path) -> None:
    root = folder(tmp_path, seer=gguf_bytes(gguf_keys(llama__attention__head_count=(U32, 2))), mmproj=projector_bytes())
    shape = read_shape(inspect(root / "seer.gguf"))
    machine = Machine(1 << 34, 1 << 34)
    assert shape.sight == 4096 and shape.sight_buffers > 0
    seeing = estimate(shape, complete(SPEC, {}), machine)
    blind = estimate(shape, complete(SPEC, {"no_mmproj": True}), machine)
    assert seeing.weights == blind.weights + 4096
    assert any(setting.options == {"no_mmproj": True} for setting in worth_trying(shape, machine))


# --- downloads -----------------------------------------------------------------------------------------------------


def repository(*names: str) -> list[RepoFile]:
    return [RepoFile(name, 1000, "0" * 64) for name in names]


def test_a_download_of_a_gguf_takes_its_projector_along() -> None:
    files = repository("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "README.md")
    plan = choose_files("o/n", "c" * 40, files, ["*Q4_K_M*"])
    assert [file.path for file in plan.files] == ["README.md", "m-Q4_K_M.gguf", "mmproj-F16.gguf"]
    assert plan.projector == "mmproj-F16.gguf" and plan.projector not in plan.skipped
    assert "mmproj-BF16.gguf" in plan.skipped
    assert choose_files("o/n", "c" * 40, files, ["*Q4_K_M*"], with_projector=False).projector is None
    one = choose_files("o/n", "c" * 40, [file for file in files if "Q8" not in file.path])
    assert one.projector == "mmproj-F16.gguf" and len(one.files) == 3
    asked = choose_files("o/n", "c" * 40, files, ["*Q4_K_M*", "mmproj-BF16*"])
    assert asked.projector is None and "mmproj-BF16.gguf" in [file.path for file in asked.files]
    alone = choose_files("o/n", "c" * 40, files, ["mmproj-F32.gguf"])
    assert [file.path for file in alone.files] == ["README.md", "mmproj-F32.gguf"]


def test_the_command_says_that_the_projector_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    config = SimpleNamespace(model_dir=tmp_path, user_data_dir=tmp_path / "data", hub_endpoint=None, hub_proxy=None)
    with FakeHub({"m-Q4_K_M.gguf": MODEL, "m-Q8_0.gguf": MODEL, "mmproj-F16.gguf": projector_bytes()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert run(parser.parse_args(["download", "owner/name", "--include", "*Q4_K_M*"]), config) == 0
    assert "with mmproj-F16.gguf" in capsys.readouterr().out
    assert [(model.id, model.vision) for model in list_models([tmp_path])] == [("owner_name/m-Q4_K_M.gguf", True)]


def test_projectors_are_named_in_the_list_of_forms() -> None:
    files = repository("m-Q4_K_M.gguf", "m-mmproj-model.gguf", "mmproj-Q8_0.gguf")
    assert [form.label for form in variants(files)] == ["Q4_K_M", "projector Q8_0", "projector m-mmproj-model"]
    best = best_projector(files)
    assert best is not None and best.path == "mmproj-Q8_0.gguf"
    assert best_projector(files[:1]) is None


# --- the shelf -----------------------------------------------------------------------------------------------------


def shelf(root: Path, data: Path) -> tuple[LocalLibrary, Shelf]:
    library = LocalLibrary([root], [])
    return library, Shelf(library, ModelSettings(data / "models.yaml", {}))


def test_the_last_form_of_a_model_takes_its_projector_into_the_trash(tmp_path: Path) -> None:
    root = folder(tmp_path / "models", seer_Q8_0=MODEL, seer_Q4_0=MODEL, mmproj=projector_bytes())
    library, kept = shelf(root, tmp_path)
    first = kept.trash(library.find("seer_Q8_0.gguf"))
    assert first.names == ["seer_Q8_0.gguf"] and first.size_bytes == len(MODEL), "the other one still needs the projector"
    last = kept.trash(library.find("seer_Q4_0.gguf"))
    assert last.names == ["seer_Q4_0.gguf", "mmproj.gguf"]
    assert kept.restore(last.id) == "seer_Q4_0.gguf" and library.find("seer_Q4_0.gguf").vision


def test_a_model_that_moves_keeps_its_eyes(tmp_path: Path) -> None:
    root = folder(tmp_path / "models", seer=MODEL, mmproj=projector_bytes())
    library, kept = shelf(root, tmp_path)
    assert library.find(kept.rename(library.find("seer.gguf"), "see")).vision
    new = kept.rename(library.find("see.gguf"), "own/see")
    assert library.find(new).vision and not (root / "mmproj.gguf").exists()

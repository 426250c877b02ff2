"""Conversion: the parts by themselves, and its steps with a stand-in for the children."""

from __future__ import annotations

import argparse
import array
import asyncio
import errno
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from modules.convert import ConvertJob, convert, convert_pickle, default_output
from modules.convert import gguf as convert_gguf
from modules.convert.children.imatrix import read_imatrix
from modules.convert.children.tokenizer_rules import merge_scores, plain_byte_level
from modules.convert.cli import add_parser, run
from modules.convert.gguf_types import estimated_bytes, gguf_type
from modules.convert.library import ConverterError, converter_dir
from modules.detect import check, list_models
from modules.errors import (
    BackendUnavailable,
    Conflict,
    CorruptModel,
    IncompatibleModel,
    InvalidParameter,
    LoadError,
    StorageFull,
    UnsafeModel,
)
from modules.overlays import Overlays
from tests.unit.model_files import U32, gguf_bytes, gguf_keys, hf_folder, tokenizer_json, write_json

if TYPE_CHECKING:
    from modules.schema import LoadProgress


def ignore(progress: LoadProgress) -> None:
    return None


# --- names and types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind"),
    [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("f16", "F16"), ("fp16", "F16"), (" Q8-0 ", "Q8_0"), ("iq2_xxs", "IQ2_XXS")],
)
def test_types_are_taken_in_any_case(given: str, kind: str) -> None:
    assert gguf_type(given) == kind


def test_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(InvalidParameter, match="Did you mean Q4"):
        gguf_type("Q4_KM")
    with pytest.raises(InvalidParameter, match="The types are"):
        gguf_type("zzz")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/m/wren-6m/hf", "wren-6m-Q4_0.gguf"),
        ("/m/Llama 3.1 8B", "Llama 3.1 8B-Q4_0.gguf"),
        ("/m/a-F16.gguf", "a-Q4_0.gguf"),
        ("/m/a.Q4_K_M.gguf", "a-Q4_0.gguf"),
        ("/m/model-v1.1.gguf", "model-v1.1-Q4_0.gguf"),
    ],
)
def test_the_output_lies_beside_the_source(source: str, name: str) -> None:
    assert default_output(Path(source), "Q4_0") == Path(source).parent / name


def test_the_estimate_is_above_the_blocks_own_size() -> None:
    assert estimated_bytes(10**9, "F32") > 4e9
    assert estimated_bytes(10**9, "Q4_0") > 10**9 * 4.5 / 8
    assert estimated_bytes(10**9, "Q8_0") > 10**9 * 8.5 / 8


# --- tokenizers the converter does not know --------------------------------------------------------------------


def test_plain_byte_level_is_recognised() -> None:
    assert plain_byte_level(tokenizer_json()) is None
    wrapped = tokenizer_json()
    wrapped["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [wrapped["pre_tokenizer"]]}
    assert plain_byte_level(wrapped) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
            "Split, ByteLevel",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "no pattern"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({"pre_tokenizer": None}, "None"),
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"model": {"type": "Unigram"}}, "not BPE"),
        ({"model": {"type": "BPE", "ignore_merges": True}}, "ignore_merges"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "byte_fallback"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)
def test_anything_else_is_not_taken_for_it(changes: dict[str, Any], why: str) -> None:
    assert why in (plain_byte_level({**tokenizer_json(), **changes}) or "")


def test_scores_follow_the_merges() -> None:
    scores = merge_scores({"model": {"merges": ["a b", ["ab", "c"], "x y"]}})
    assert scores == {"ab": 0.0, "abc": -1.0, "xy": -2.0}
    assert merge_scores({}) == {}


# --- the steps, with a stand-in for the children ---------------------------------------------------------------


class FakeOverlays(Overlays):
    """A set whose environments are said to be complete."""

    def __init__(self, tmp_path: Path, *, llama_cpp: bool = True, converter: bool = True) -> None:
        super().__init__(tmp_path / "set", Path.cwd())
        self.llama_cpp = llama_cpp
        if converter:
            folder = converter_dir(self.env_dir("transformers"))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "VERSION").write_text(convert_gguf.has_converter.__defaults__[0], encoding="utf-8")  # type: ignore[index]
            (folder / "convert_hf_to_gguf.py").write_text("", encoding="utf-8")

    def complete(self, env: str) -> bool:
        return True

    def has_module(self, overlay: str | None, name: str) -> bool:
        return self.llama_cpp


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Children that write a whole GGUF as large as the test's model; their arguments are kept."""
    calls: list[list[str]] = []

    async def run(python: Path, module: str, arguments: list[str], *rest: Any) -> tuple[dict[str, Any], list[str]]:
        calls.append([module.rpartition(".")[2], *arguments])
        out = Path(arguments[2] if module.endswith("hf_to_gguf") else arguments[1])
        out.write_bytes(
            gguf_bytes(
                gguf_keys(llama__block_count=(U32, 1)), {"token_embd.weight": ((32, 200), 0, 25600), "blk.0.x": ((8,), 0, 32)}
            )
        )
        return {}, ["note"]

    monkeypatch.setattr(convert_gguf, "run_child", run)
    return calls


def test_a_float_type_takes_one_step(tmp_path: Path, steps: list[list[str]]) -> None:
    folder = hf_folder(tmp_path / "Möwe" / "hf")
    done = asyncio.run(convert(ConvertJob(folder, "f16"), ignore, FakeOverlays(tmp_path)))
    assert done.path == tmp_path / "Möwe" / "Möwe-F16.gguf"
    assert (done.type, done.notes) == ("F16", ("note",))
    assert [step[0] for step in steps] == ["hf_to_gguf"]
    assert steps[0][-1] == "Möwe"
    assert check(done.path).format == "gguf"


def test_a_quantised_type_takes_two_and_loses_nothing_between(tmp_path: Path, steps: list[list[str]]) -> None:
    folder = hf_folder(tmp_path / "m")
    done = asyncio.run(convert(ConvertJob(folder, "Q4_0"), ignore, FakeOverlays(tmp_path)))
    assert [step[0] for step in steps] == ["hf_to_gguf", "gguf_quantize"]
    assert steps[0][4] == "F16"
    assert steps[1][3] == "Q4_0"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() or path.name == "m") == ["m", "m-Q4_0.gguf"]
    assert done.path.stat().st_size == done.size_bytes


def test_a_gguf_takes_the_second_step_alone(tmp_path: Path, steps: list[list[str]]) -> None:
    source = tmp_path / "m-F32.gguf"
    source.write_bytes(gguf_bytes())
    done = asyncio.run(convert(ConvertJob(source, "Q8_0", threads=3), ignore, FakeOverlays(tmp_path)))
    assert done.path.name == "m-Q8_0.gguf"
    assert steps[0][0] == "gguf_quantize"
    assert steps[0][4] == "3"


def test_a_quantised_source_must_be_asked_for(tmp_path: Path, steps: list[list[str]]) -> None:
    source = tmp_path / "m-Q8_0.gguf"
    source.write_bytes(gguf_bytes(gguf_keys(general__file_type=(U32, 7))))
    with pytest.raises(IncompatibleModel, match="--requantize"):
        asyncio.run(convert(ConvertJob(source, "Q4_0"), ignore, FakeOverlays(tmp_path)))
    with pytest.raises(IncompatibleModel, match="larger"):
        asyncio.run(convert(ConvertJob(source, "F16", requantize=True), ignore, FakeOverlays(tmp_path)))
    assert steps == []
    asyncio.run(convert(ConvertJob(source, "Q4_0", requantize=True), ignore, FakeOverlays(tmp_path)))
    assert steps[0][5] == "1"


def test_nothing_is_overwritten_unasked(tmp_path: Path, steps: list[list[str]]) -> None:
    folder = hf_folder(tmp_path / "m")
    (tmp_path / "m-F16.gguf").write_bytes(b"mine")
    with pytest.raises(Conflict, match="exists already"):
        asyncio.run(convert(ConvertJob(folder), ignore, FakeOverlays(tmp_path)))
    assert (tmp_path / "m-F16.gguf").read_bytes() == b"mine"
    assert asyncio.run(convert(ConvertJob(folder, overwrite=True), ignore, FakeOverlays(tmp_path))).size_bytes > 4
    source = tmp_path / "s.gguf"
    source.write_bytes(gguf_bytes())
    with pytest.raises(Conflict, match="replace the source"):
        asyncio.run(convert(ConvertJob(source, "Q8_0", out=source, overwrite=True), ignore, FakeOverlays(tmp_path)))


@pytest.mark.parametrize("name", ["CON.gguf", "x\ny.gguf", ".gguf"])
def test_an_impossible_output_name(tmp_path: Path, steps: list[list[str]], name: str) -> None:
    with pytest.raises(IncompatibleModel, match="output's name"):
        asyncio.run(convert(ConvertJob(hf_folder(tmp_path / "m"), out=tmp_path / name), ignore, FakeOverlays(tmp_path)))


def test_the_disk_is_asked_first(tmp_path: Path, steps: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageFull, match="needs about"):
        asyncio.run(convert(ConvertJob(hf_folder(tmp_path / "m")), ignore, FakeOverlays(tmp_path)))
    assert steps == []


def test_what_is_not_installed_is_named_with_its_fix(
    tmp_path: Path, steps: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf_folder(tmp_path / "m")

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConverterError("The GGUF converter could not be fetched: no network.")

    monkeypatch.setattr(convert_gguf, "install_converter", offline)
    with pytest.raises(BackendUnavailable, match="install llamacpp"):
        asyncio.run(convert(ConvertJob(folder, "Q4_0"), ignore, FakeOverlays(tmp_path / "a", llama_cpp=False)))
    with pytest.raises(BackendUnavailable, match="converter could not be fetched"):
        asyncio.run(convert(ConvertJob(folder), ignore, FakeOverlays(tmp_path / "b", converter=False)))
    with pytest.raises(BackendUnavailable, match="install transformers"):
        asyncio.run(convert(ConvertJob(folder), ignore, Overlays(tmp_path / "none", Path.cwd())))
    assert steps == []


def test_a_bad_source_never_reaches_a_child(tmp_path: Path, steps: list[list[str]]) -> None:
    evil = hf_folder(tmp_path / "evil", {"auto_map": {"AutoModel": "x.Y"}})
    with pytest.raises(UnsafeModel, match="auto_map"):
        asyncio.run(convert(ConvertJob(evil), ignore, FakeOverlays(tmp_path)))
    cut = hf_folder(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptModel, match="incomplete"):
        asyncio.run(convert(ConvertJob(cut), ignore, FakeOverlays(tmp_path / "x")))
    assert steps == []


@pytest.mark.parametrize("fault", ["torn", "small", "raises", "cancelled", "full"])
def test_a_failed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = hf_folder(tmp_path / "models" / "m")
    before = {path.name for path in folder.parent.iterdir()}

    async def run(python: Path, module: str, arguments: list[str], *rest: Any) -> tuple[dict[str, Any], list[str]]:
        Path(arguments[2]).write_bytes(gguf_bytes()[:-700] if fault == "torn" else gguf_bytes())
        if fault == "raises":
            raise LoadError("no")
        if fault == "cancelled":
            raise asyncio.CancelledError
        if fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return {}, []

    monkeypatch.setattr(convert_gguf, "run_child", run)
    with pytest.raises((LoadError, CorruptModel, asyncio.CancelledError, OSError)):
        asyncio.run(convert(ConvertJob(folder), ignore, FakeOverlays(tmp_path)))
    assert {path.name for path in folder.parent.iterdir()} == before


def test_a_killed_conversions_files_are_removed_by_the_next(tmp_path: Path, steps: list[list[str]]) -> None:
    folder = hf_folder(tmp_path / "models" / "m")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for suffix in ("part", "source.part"):
        (folder.parent / f".m-F16.gguf.{dead.pid}.{suffix}").write_bytes(gguf_bytes())
    mine = folder.parent / f".m-F16.gguf.{os.getppid()}.part"
    mine.write_bytes(b"another conversion, still running")
    assert [model.id for model in list_models([folder.parent])] == ["m"]
    asyncio.run(convert(ConvertJob(folder), ignore, FakeOverlays(tmp_path)))
    assert [path.name for path in folder.parent.glob(".*")] == [mine.name]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    config = SimpleNamespace(model_dirs=(tmp_path,))
    hf_folder(tmp_path / "m")
    assert run(parser.parse_args(["convert"]), config) == 2
    assert run(parser.parse_args(["convert", "nothing"]), config) == 1
    assert run(parser.parse_args(["convert", "m", "--type", "Q9"]), config) == 1
    assert run(parser.parse_args(["convert", "m", "--imatrix", "x", "--to", "safetensors"]), config) == 1
    said = capsys.readouterr().err
    for part in ("needs a MODEL", "no model", "no GGUF type 'Q9'", "no pytorch_model.bin"):
        assert part in said


# --- pickles ---------------------------------------------------------------------------------------------------


def torch_like(path: Path, member: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", member)
    return path


def test_a_pickle_is_opened_only_when_its_owner_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsafeModel, match="--allow-pickle"):
        asyncio.run(convert_pickle(torch_like(tmp_path / "m.pth"), ignore, allow_pickle=False, overlays=FakeOverlays(tmp_path)))


def test_a_bomb_is_refused_before_anything_reads_it(tmp_path: Path) -> None:
    bomb = torch_like(tmp_path / "m.pth", bytes(50_000_000))
    with pytest.raises(UnsafeModel, match="would unpack to"):
        asyncio.run(convert_pickle(bomb, ignore, allow_pickle=True, overlays=FakeOverlays(tmp_path)))


def test_what_is_no_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    for source, message in ((folder, "no pytorch_model.bin"), (folder / "model.safetensors", "already")):
        with pytest.raises(IncompatibleModel, match=message):
            asyncio.run(convert_pickle(source, ignore, allow_pickle=True, overlays=FakeOverlays(tmp_path)))
    (folder / "pytorch_model.bin").write_bytes(b"<html>")
    with pytest.raises(CorruptModel, match="web page"):
        asyncio.run(convert_pickle(folder, ignore, allow_pickle=True, overlays=FakeOverlays(tmp_path)))
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "../x.bin"}})
    with pytest.raises(CorruptModel, match="not there"):
        asyncio.run(convert_pickle(folder, ignore, allow_pickle=True, overlays=FakeOverlays(tmp_path)))


# --- importance matrices ---------------------------------------------------------------------------------------


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_both_layouts_of_an_importance_matrix(tmp_path: Path) -> None:
    old = tmp_path / "imatrix.dat"
    old.write_bytes(struct.pack("<i", 1) + struct.pack("<i", 3) + b"q.w" + struct.pack("<ii", 2, 2) + floats(4.0, 8.0))
    assert read_imatrix(old) == {"q.w": array.array("f", [2.0, 4.0])}
    new = tmp_path / "imatrix.gguf"
    data = gguf_bytes({"general.type": (8, "imatrix")}, {"q.w.in_sum2": ((2, 2), 0, 16), "q.w.counts": ((1, 2), 0, 8)})
    new.write_bytes(data[: len(data) - 64] + floats(4.0, 8.0, 1.0, 1.0).ljust(32, b"\0") + floats(2.0, 0.0).ljust(32, b"\0"))
    assert read_imatrix(new) == {"q.w": array.array("f", [2.0, 4.0, 1.0, 1.0])}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        struct.pack("<i", -1),
        struct.pack("<ii", 1, 2**30),
        struct.pack("<i", 1) + struct.pack("<i", 1) + b"a" + struct.pack("<ii", 1, 9),
    ],
)
def test_a_broken_importance_matrix(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "imatrix"
    path.write_bytes(data)
    with pytest.raises(CorruptModel):
        read_imatrix(path)

"""An OPT into FlexGen's arrays: every value, in what number format, resumed, out of disk, half-written."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loaders.flexgen import SPEC
from modules.convert.children.hf_to_flexgen import convert
from modules.convert.flexgen import convert_flexgen
from modules.detect import check, inspect
from modules.detect.opt import opt_shape
from modules.errors import Conflict, CorruptModel, IncompatibleModel, InvalidParameter, StorageFull
from modules.opt_weights import open_weights
from tests.unit.model_files import hf_folder, safetensors_bytes, tokenizer_json, write_json

if TYPE_CHECKING:
    from modules.overlays import Overlays
    from modules.schema import LoadProgress

CONFIG: dict[str, Any] = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "max_position_embeddings": 14,
    "vocab_size": 40,
}


def opt_folder(folder: Path, dtype: str = "F16", **changes: Any) -> Path:
    """An OPT of random numbers in Hugging Face layout."""
    folder.mkdir()
    config = CONFIG | changes
    shapes = {f"model.{n}".replace(".layer_norm.", ".final_layer_norm."): s for n, s in opt_shape(config).tensors().items()}
    empty = safetensors_bytes({name: (dtype, s) for name, s in shapes.items()})
    length = int.from_bytes(empty[:8], "little") + 8
    values = np.random.default_rng(0).normal(size=(len(empty) - length) // (4 if dtype == "F32" else 2))
    data = {"F16": values.astype("<f2"), "F32": values.astype("<f4"), "BF16": values.astype("<f4").view("<u4") >> 16}[dtype]
    data = data.astype("<u2") if dtype == "BF16" else data
    (folder / "model.safetensors").write_bytes(empty[:length] + data.tobytes())
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_json(40))
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def quiet(stage: str, fraction: float | None = None) -> None:
    """No progress wanted."""


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_every_value_is_kept(tmp_path: Path, dtype: str) -> None:
    source = opt_folder(tmp_path / "öpt", dtype)
    out = tmp_path / "out"
    assert convert(source, out, "float32", quiet) == (20, 0)
    given, written = open_weights(source), {path.name: np.load(path) for path in out.iterdir()}
    assert written.keys() == given.shape.tensors().keys()
    for name, values in written.items():
        assert values.dtype == np.float32 and np.array_equal(values, np.asarray(given.array(name), np.float32))
    assert convert(source, tmp_path / "half", "float16", quiet)[0] == 20
    assert all(np.load(path).dtype == np.float16 for path in (tmp_path / "half").iterdir())


def test_what_is_there_is_kept_and_what_is_wrong_is_written_again(tmp_path: Path) -> None:
    source, out = opt_folder(tmp_path / "opt"), tmp_path / "out"
    convert(source, out, "float16", quiet)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    names = sorted(whole)
    (out / names[0]).write_bytes(whole[names[0]][:-3])
    (out / names[1]).unlink()
    changed = bytearray(whole[names[2]])
    changed[-1] ^= 1
    (out / names[2]).write_bytes(changed)
    assert convert(source, out, "float16", quiet) == (20, 17)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_full_disk_leaves_whole_arrays_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = opt_folder(tmp_path / "opt"), tmp_path / "out"
    count = 0

    def fsync(fd: int) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageFull, match="run the same command again"):
            convert(source, out, "float16", quiet)
    assert len(list(out.iterdir())) == 5 and not list(out.glob(".*"))
    assert convert(source, out, "float16", quiet) == (20, 5)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = opt_folder(tmp_path / "opt", "F32")
    path = source / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.array([1e6], "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(IncompatibleModel, match="--type F32"):
        convert(source, tmp_path / "out", "float16", quiet)
    convert(source, tmp_path / "out", "float32", quiet)


# --- the whole conversion ----------------------------------------------------------------------------------------


def run(source: Path, overlays: Overlays, **options: Any) -> Any:
    told: list[LoadProgress] = []
    done = asyncio.run(convert_flexgen(source, told.append, overlays=overlays, **options))
    assert told[-1].fraction == 1.0
    return done


@pytest.fixture
def environment(overlays: Overlays) -> Overlays:
    missing = overlays.unavailable(SPEC)
    if missing:
        pytest.skip(f"FlexGen: {missing}")
    return overlays


def test_from_a_folder_to_a_model(tmp_path: Path, environment: Overlays) -> None:
    source = opt_folder(tmp_path / "öpt 1")
    done = run(source, environment)
    assert done.path == tmp_path / "öpt 1-np" and done.type == "FlexGen F16"
    files = check(done.path)
    assert (files.format, files.vocab_size, files.context_length, files.has_chat_template) == ("flexgen", 40, 14, True)
    with pytest.raises(Conflict, match="exists already"):
        run(source, environment)
    (done.path / "config.json").unlink()  # as if it had been stopped before its end
    assert "conversion was not finished" in str(inspect(done.path).problem)
    assert run(source, environment).notes == ("20 arrays were there already.",)


def test_what_is_refused_before_anything_is_written(
    tmp_path: Path, environment: Overlays, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IncompatibleModel, match="OPT and Galactica"):
        run(hf_folder(tmp_path / "llama"), environment)
    source = opt_folder(tmp_path / "opt")
    with pytest.raises(InvalidParameter, match="F16 or F32"):
        run(source, environment, type="Q4_0")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(StorageFull, match="needs about 4 MB"):
            run(source, environment)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptModel, match="incomplete"):
        run(source, environment)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "opt"]

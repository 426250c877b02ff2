"""Conversion: the real thing, where the environments are there."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.convert import ConvertJob, convert, convert_pickle
from modules.convert.library import has_converter
from modules.detect import check, list_models
from modules.errors import Conflict, CorruptModel, IncompatibleModel, UnsafeModel
from tests.unit.lab import run_in
from tests.unit.model_files import write_json

if TYPE_CHECKING:
    from modules.overlays import Overlays
    from modules.schema import LoadProgress


def ignore(progress: LoadProgress) -> None:
    return None


@pytest.fixture
def real(overlays: Overlays) -> Overlays:
    """The environments, or a skip that says which part is missing."""
    if not overlays.complete("transformers") or not has_converter(overlays.env_dir("transformers")):
        pytest.skip("needs the Transformers environment with llama.cpp's converter")
    if not overlays.has_module("llamacpp", "llama_cpp"):
        pytest.skip("needs llama-cpp-python")
    return overlays


GREEDY_LLAMA = """
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
ids = model.tokenize(sys.argv[2].encode(), special=True, add_bos=sys.argv[3] == "bos")
print(model.create_completion(ids, max_tokens=32, temperature=0)["choices"][0]["text"])
"""
GREEDY_HF = """
import sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = tokenizer(sys.argv[2], return_tensors="pt", add_special_tokens=sys.argv[3] == "bos")["input_ids"]
out = model.generate(ids, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(out[0][ids.shape[1]:], skip_special_tokens=True))
"""


@pytest.fixture
def bundled(root: Path) -> Path:
    """The bundled model's safetensors folder."""
    found = next((model for model in list_models([root / "models"]) if model.bundled and model.format == "hf"), None)
    if found is None:
        pytest.skip("needs the bundled model's safetensors")
    return Path(found.path)


@pytest.mark.slow
def test_the_smallest_types_need_an_importance_matrix(real: Overlays, bundled: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModel, match="importance matrix"):
        asyncio.run(convert(ConvertJob(bundled, "IQ2_XXS", out=tmp_path / "b.gguf"), ignore, real))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "exact"), [("F32", True), ("Q8_0", False), ("Q4_0", False), ("Q4_K_M", False)])
def test_the_bundled_model_says_the_same_as_gguf(real: Overlays, bundled: Path, tmp_path: Path, kind: str, exact: bool) -> None:
    stages: list[LoadProgress] = []
    out = tmp_path / f"wrén {kind}.gguf"
    done = asyncio.run(convert(ConvertJob(bundled, kind, out=out), stages.append, real))
    assert check(done.path).quantization.method == kind  # type: ignore[union-attr]
    assert stages[-1].fraction == 1.0
    prompt = "<|im_start|>user\nHello! Who are you? 1234 äé 🚀<|im_end|>\n<|im_start|>assistant\n"
    said = run_in(real, "llamacpp", "-c", GREEDY_LLAMA, str(out), prompt, "plain")
    if exact:
        assert said == run_in(real, "transformers", "-c", GREEDY_HF, str(bundled), prompt, "plain")
    assert len(said) > 5


@pytest.mark.slow
@pytest.mark.shared
def test_a_sentencepiece_like_model_says_the_same_as_gguf(real: Overlays, shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "stories260K"
    out = tmp_path / "s.gguf"
    asyncio.run(convert(ConvertJob(folder / "hf", "F32", out=out), ignore, real))
    expected = run_in(real, "llamacpp", "-c", GREEDY_LLAMA, str(folder / "stories260K-f32.gguf"), "Once upon a time", "bos")
    assert "Lily" in expected
    assert run_in(real, "llamacpp", "-c", GREEDY_LLAMA, str(out), "Once upon a time", "bos") == expected
    assert run_in(real, "transformers", "-c", GREEDY_HF, str(folder / "hf"), "Once upon a time", "bos") == expected


@pytest.mark.slow
@pytest.mark.shared
def test_what_the_library_refuses_is_explained(real: Overlays, shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260K" / "hf"
    unknown = tmp_path / "unknown"
    shutil.copytree(source, unknown, copy_function=shutil.copyfile)
    unknown.chmod(0o755)
    config = json.loads((unknown / "config.json").read_text(encoding="utf-8"))
    write_json(unknown / "config.json", {**config, "architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"})
    with pytest.raises(IncompatibleModel, match="NoSuchForCausalLM"):
        asyncio.run(convert(ConvertJob(unknown, "F16", out=tmp_path / "a.gguf"), ignore, real))
    assert [path.name for path in tmp_path.iterdir()] == ["unknown"]


@pytest.mark.slow
def test_a_pickle_with_code_stays_refused(real: Overlays, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "m.bin"
    path.write_bytes(pickle.dumps(Canary(canary), protocol=2))
    with pytest.raises((UnsafeModel, CorruptModel)):
        asyncio.run(convert_pickle(path, ignore, allow_pickle=True, overlays=real))
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_pickle_becomes_safetensors(real: Overlays, shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "tiny-rwkv" / "converted-tiny-rwkv-5v2-730K.pth"
    done = asyncio.run(convert_pickle(source, ignore, allow_pickle=True, out=tmp_path / "r.safetensors", overlays=real))
    files = check(done.path)
    assert (files.format, files.architecture, files.vocab_size) == ("rwkv", "rwkv5", 256)
    with pytest.raises(Conflict):
        asyncio.run(convert_pickle(source, ignore, allow_pickle=True, out=done.path, overlays=real))

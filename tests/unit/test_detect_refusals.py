"""Detection by content: why a folder or file can't be loaded (catalogue B3, B4, B7, B10, B11)."""

from __future__ import annotations

import io
import json
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from modules.detect import check, inspect
from modules.errors import AppError, CorruptModel, IncompatibleModel, ModelNotFound, UnknownFormat, UnsafeModel
from tests.unit.model_files import LLAMA, Shapes, hf_folder, llama_tensors, lora_folder, sharded, tokenizer_json, write_json

# --- what it is not --------------------------------------------------------------------------------------------


def torch_zip(names: list[str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(dict.fromkeys(names, 0), protocol=2))
    return out.getvalue()


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl", "model.safetensors", "model.gguf"]
)
def test_a_pickle_is_refused_under_any_name_and_never_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / name
    for data in (pickle.dumps(Canary(canary)), torch_zip(["model.embed_tokens.weight"])):
        path.write_bytes(data)
        with pytest.raises(UnsafeModel, match="pickle") as caught:
            check(path)
        assert "safetensors" in caught.value.hint
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_a_folder_with_pickles_only(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path / "m") if not name.startswith("adapter") else lora_folder(tmp_path / "m")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / name).write_bytes(torch_zip(["a"]))
    with pytest.raises(UnsafeModel, match=f"{name} is a Python pickle"):
        check(folder, adapter=name.startswith("adapter"))


def test_an_rwkv_pickle_is_named_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "RWKV.pth"
    path.write_bytes(torch_zip(["emb.weight", "blocks.0.att.time_decay"]))
    files = inspect(path)
    assert (files.format, files.architecture) == ("rwkv", "rwkv4")
    assert "pickle" in (files.problem or "")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(100_000_000))
    started = time.process_time()
    assert "pickle" in (inspect(path).problem or "")
    assert time.process_time() - started < 0.5


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4000000000\n"
NOT_MODELS: list[tuple[str, bytes, type[AppError], str]] = [
    ("m.gguf", b"", CorruptModel, "empty"),
    ("m.safetensors", b"", CorruptModel, "empty"),
    ("m.gguf", LFS, CorruptModel, r"LFS pointer.*4,000,000,000 bytes"),
    ("m.safetensors", LFS, CorruptModel, "LFS pointer"),
    ("m.gguf", b"<!DOCTYPE html><html>", CorruptModel, "web page"),
    ("m.safetensors", b"\xef\xbb\xbf\n <HTML>", CorruptModel, "web page"),
    ("m.gguf", b'{"error": "Repository is gated"}', CorruptModel, "JSON text"),
    ("m.gguf", b"\x00" * 4096, CorruptModel, "instead of 'GGUF'"),
    ("m.safetensors", b"\x00" * 4096, CorruptModel, "its header is empty"),
    ("m.safetensors", b"abc", CorruptModel, "file incomplete: 3 bytes"),
    ("m", b"hello, world", UnknownFormat, "no format"),
    ("m.7z", b"7z\xbc\xaf\x27\x1c" + bytes(50), UnknownFormat, "archive"),
    ("m.gz", b"\x1f\x8b" + bytes(50), UnknownFormat, "archive"),
]


@pytest.mark.parametrize(("name", "data", "error", "message"), NOT_MODELS)
def test_what_is_no_model_says_what_it_is(tmp_path: Path, name: str, data: bytes, error: type[AppError], message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        check(path)
    assert caught.value.hint
    assert inspect(path).problem == str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_the_same_inside_a_folder(tmp_path: Path) -> None:
    for number, (name, data, error, message) in enumerate(NOT_MODELS):
        if name == "m.safetensors":
            folder = hf_folder(tmp_path / str(number))
            (folder / "model.safetensors").write_bytes(data)
            with pytest.raises(error, match=message.partition(".*")[0]):
                check(folder)


def test_missing_empty_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        check(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownFormat, match="holds no model"):
        check(tmp_path / "empty")
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "gone")
    assert inspect(tmp_path / "dangling.gguf").problem
    with pytest.raises((CorruptModel, ModelNotFound)):  # by Python version
        check(str(tmp_path) + "/nul\0byte")


# --- a folder whose parts disagree -----------------------------------------------------------------------------


def without(name: str) -> Shapes:
    return {key: value for key, value in llama_tensors().items() if key != name}


MISSHAPED: list[tuple[dict[str, Any], Shapes, str]] = [
    ({"hidden_size": 32}, llama_tensors(), r"Tensor model.embed_tokens.weight is 32 x 16, but config.json says 32 x 32"),
    ({"vocab_size": 40}, llama_tensors(), r"model.embed_tokens.weight is 32 x 16, but config.json says 40 x 16"),
    ({"num_key_value_heads": 4}, llama_tensors(), r"layers.0.self_attn.k_proj.weight is 8 x 16, but config.json says 16 x 16"),
    ({"intermediate_size": 48}, llama_tensors(), r"mlp.gate_proj.weight is 24 x 16, but config.json says 48 x 16"),
    ({"num_hidden_layers": 3}, llama_tensors(), r"model.layers.2.self_attn.q_proj.weight is missing"),
    ({"num_hidden_layers": 1}, llama_tensors(), r"hold 2 layers, but config.json says num_hidden_layers is 1"),
    ({"num_attention_heads": 3}, llama_tensors(), r"hidden_size 16 is not a multiple of num_attention_heads 3"),
    ({"hidden_size": -1}, llama_tensors(), r"hidden_size is -1"),
    ({"num_hidden_layers": 10**9}, llama_tensors(), r"num_hidden_layers is 1000000000"),
    ({}, {**llama_tensors(), "model.norm.weight": ("I32", (16,))}, r"model.norm.weight holds I32 numbers"),
    ({}, without("lm_head.weight"), r"lm_head.weight is missing"),
    ({}, without("model.norm.weight"), r"model.norm.weight is missing"),
    ({}, without("model.layers.1.mlp.down_proj.weight"), r"model.layers.1.mlp.down_proj.weight is missing"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), MISSHAPED)
def test_the_first_tensor_that_contradicts_the_configuration_is_named(
    tmp_path: Path, config: dict[str, Any], tensors: Shapes, message: str
) -> None:
    with pytest.raises(CorruptModel, match=message):
        check(hf_folder(tmp_path / "m", config, tensors))


def test_a_tied_head_need_not_be_there(tmp_path: Path) -> None:
    assert check(hf_folder(tmp_path / "m", {"tie_word_embeddings": True})).problem is None


def test_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    assert check(folder).parameters == inspect(hf_folder(tmp_path / "whole")).parameters
    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere.part")
    with pytest.raises(CorruptModel, match=r"1 of 2 weight files are missing, the first is model-00002-of-00002.safetensors"):
        check(folder)


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CorruptModel, match=r"index.json is missing"):
        check(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CorruptModel, match="1 of 2 weight files"):
        check(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", ""])
def test_an_index_that_points_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeModel, match=r"model.norm.weight"):
        check(sharded(tmp_path / "m", {"model.norm.weight": name}))


def test_an_index_that_lies(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match="lists tensor ghost"):
        check(sharded(tmp_path / "m", {"ghost": "model-00001-of-00002.safetensors"}))
    folder = sharded(tmp_path / "n")
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CorruptModel, match="is in two of the weight files"):
        check(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": []})
    with pytest.raises(CorruptModel, match="lists no weights"):
        check(folder)


def test_several_weight_files_are_ambiguous(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(IncompatibleModel, match="several weight files"):
        check(folder)


# --- keys that run code ----------------------------------------------------------------------------------------

EVIL: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
    ("config.json", {"text_config": {"auto_map": {"AutoModel": "x"}}}, "text_config.auto_map"),
    ("config.json", {"a": [{"b": {"trust_remote_code": True}}]}, r"a\[0\].b.trust_remote_code"),
    ("config.json", {"_attn_implementation_internal": "owner/kernel"}, "_attn_implementation_internal"),
    ("config.json", {"_attn_implementation_internal": "eager"}, "_attn_implementation_internal"),
    ("config.json", {"attn_implementation": "owner/kernel"}, "attn_implementation"),
    ("config.json", {"custom_pipelines": {"x": {}}}, "custom_pipelines"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x", None]}}, "auto_map"),
    ("generation_config.json", {"custom_generate": "x"}, "custom_generate"),
    ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "x"}}, "auto_map"),
]


@pytest.mark.parametrize(("name", "keys", "named"), EVIL)
def test_a_key_that_runs_code_is_refused_and_named(tmp_path: Path, name: str, keys: dict[str, Any], named: str) -> None:
    folder = hf_folder(tmp_path / "m")
    write_json(folder / name, {**(LLAMA if name == "config.json" else {}), **keys})
    with pytest.raises(UnsafeModel, match=rf'{name} has the key "{named}"'):
        check(folder)


def test_keys_that_do_nothing_are_fine(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path / "m", {"trust_remote_code": False, "auto_map": {}, "attn_implementation": "sdpa", "use_kernels": False}
    )
    (folder / "modeling_unused.py").write_text("raise SystemExit", encoding="utf-8")
    assert check(folder).problem is None


def test_an_adapter_can_not_run_code_either(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "m")
    write_json(folder / "adapter_config.json", {"auto_map": {"x": "y"}})
    with pytest.raises(UnsafeModel, match=r"adapter_config.json"):
        check(folder, adapter=True)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"x"', "[" * 100_000, '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "\xff", '{"a":1e99999}x']
)
def test_a_configuration_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptModel, match=r"config.json"):
        check(folder)


# --- tokenizer -------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert inspect(folder).problem is None  # a list looks less closely
    with pytest.raises(IncompatibleModel, match="no tokenizer"):
        check(folder)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "added"])
def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, kind: str) -> None:
    folder = hf_folder(tmp_path / "m", tokens=32)
    assert check(folder).problem is None
    tokenizer = tokenizer_json(33)
    if kind == "Unigram":
        tokenizer["model"] = {"type": "Unigram", "vocab": [[f'p"{number}]', -1.5] for number in range(33)]}
    if kind == "added":
        tokenizer = tokenizer_json(32)
        stray = [{"id": 32 + number, "content": f"<extra {number}>", "special": True} for number in range(5)]
        write_json(folder / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], stray[0]]})
        assert check(folder).problem is None  # one padding token too many is common and does no harm
        tokenizer["added_tokens"] += stray
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(IncompatibleModel, match=r"has 3[37] tokens, but the embedding only 32 rows"):
        check(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"model": {"vocab": {"a": 0', "<html>"])
def test_a_torn_tokenizer(tmp_path: Path, text: str) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptModel, match=r"tokenizer\.json"):
        check(folder)


def test_two_added_tokens_of_one_id(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"][1]["id"] = 0
    write_json(folder / "tokenizer.json", tokenizer)
    with pytest.raises(CorruptModel, match="id 0 to two"):
        check(folder)

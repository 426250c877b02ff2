"""Detection by content: what a folder or file is, and why it can't be loaded (catalogue B3, B4, B7, B10, B11, B13)."""

from __future__ import annotations

import io
import json
import math
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.detect import check, find_model, inspect, list_models
from modules.detect.generation_config import generation_defaults
from modules.detect.opt import opt_shape
from modules.errors import AppError, CorruptModel, IncompatibleModel, ModelNotFound, UnknownFormat, UnsafeModel
from tests.unit.model_files import (
    LLAMA,
    Shapes,
    gguf_bytes,
    hf_folder,
    llama_tensors,
    safetensors_bytes,
    tokenizer_json,
    write_json,
)


def linear(name: str, inputs: int, outputs: int, bits: int = 4, group: int = 8, order: bool = True) -> Shapes:
    """One GPTQ layer."""
    groups = 1 if group == -1 else inputs // group
    tensors: Shapes = {
        f"{name}.qweight": ("I32", (inputs * bits // 32, outputs)),
        f"{name}.qzeros": ("I32", (groups, outputs * bits // 32)),
        f"{name}.scales": ("F16", (groups, outputs)),
    }
    return {**tensors, f"{name}.g_idx": ("I32", (inputs,))} if order else tensors


def quantized_llama(**options: Any) -> Shapes:
    """The small Llama with every linear layer packed as GPTQ does it."""
    tensors = {}
    for name, (dtype, shape) in llama_tensors().items():
        if "_proj" in name:
            tensors |= linear(name.removesuffix(".weight"), shape[1], shape[0], **options)
        else:
            tensors[name] = (dtype, shape)
    return tensors


# --- what it is ------------------------------------------------------------------------------------------------


def test_a_plain_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "Möwe 7B")
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- owner/base\n---\n# Hi\n", encoding="utf-8")
    files = check(folder)
    assert (files.format, files.architecture, files.context_length, files.vocab_size) == ("hf", "LlamaForCausalLM", 64, 32)
    assert files.parameters == sum(a * (b[0] if b else 1) for a, *b in (shape for _, shape in llama_tensors().values()))
    assert (files.license, files.base_model, files.has_chat_template) == ("apache-2.0", "owner/base", True)
    assert files.quantization is None
    assert files.size_bytes == sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(
    ("config", "method", "bits", "form"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb", 4, "hf"),
        ({"load_in_8bit": True}, "bnb", 8, "hf"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8", 8, "hf"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", None, "hf"),
    ],
)
def test_methods_transformers_reads_itself(
    tmp_path: Path, config: dict[str, Any], method: str, bits: int | None, form: str
) -> None:
    files = inspect(hf_folder(tmp_path / "m", {"quantization_config": config}))
    assert files.problem is None
    assert files.quantization
    assert (files.format, files.quantization.method, files.quantization.bits) == (form, method, bits)


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json", "nowhere"])
def test_gptq_is_seen_wherever_its_settings_are(tmp_path: Path, where: str) -> None:
    settings = {"bits": 4, "group_size": 8, "desc_act": True, "sym": False}
    inside = {"quantization_config": {**settings, "quant_method": "gptq"}} if where == "config.json" else {}
    folder = hf_folder(tmp_path / "m", inside, quantized_llama())
    if where == "quantize_config.json":
        write_json(folder / where, settings)  # AutoGPTQ's old file names no method
    files = check(folder)
    assert files.format == "gptq"
    assert files.quantization
    assert (files.quantization.bits, files.quantization.group_size) == (4, 8)
    assert files.quantization.desc_act is (None if where == "nowhere" else True)
    assert files.parameters == inspect(hf_folder(tmp_path / "plain")).parameters


@pytest.mark.parametrize(("bits", "group", "order"), [(2, 8, True), (4, -1, True), (8, 8, True), (4, 8, False), (8, -1, False)])
def test_a_single_file_without_any_settings(tmp_path: Path, bits: int, group: int, order: bool) -> None:
    """GPTQ-for-LLaMA's way: everything is inferred from the shapes."""
    path = tmp_path / "some-name.safetensors"
    path.write_bytes(safetensors_bytes(linear("model.layers.0.self_attn.q_proj", 32, 64, bits, group, order)))
    files = check(path)
    assert files.format == "gptq"
    assert files.quantization
    assert (files.quantization.bits, files.quantization.group_size) == (bits, group)


@pytest.mark.parametrize(
    ("tensors", "form"),
    [
        ({"l.qweight": ("I32", (32, 8)), "l.qzeros": ("I32", (4, 8)), "l.scales": ("F16", (4, 64))}, "awq"),
        ({"l.q_weight": ("I32", (4, 64)), "l.q_groups": ("I32", (8,)), "l.q_scale": ("I32", (4, 8))}, "exl2"),
        ({"l.trellis": ("I32", (2, 4, 16)), "l.suh": ("F16", (32,)), "l.svh": ("F16", (64,))}, "exl3"),
    ],
)
def test_other_packings_by_their_tensors(tmp_path: Path, tensors: Shapes, form: str) -> None:
    assert inspect(hf_folder(tmp_path / "m", {"model_type": "other"}, tensors)).format == form


def test_bitsandbytes_by_its_tensors(tmp_path: Path) -> None:
    tensors: Shapes = {
        "l.weight": ("U8", (64, 1)),
        "l.weight.absmax": ("F32", (2,)),
        "l.weight.quant_map": ("F32", (16,)),
        "l.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }
    files = inspect(hf_folder(tmp_path / "m", {"model_type": "other"}, tensors))
    assert files.quantization
    assert (files.format, files.quantization.method, files.quantization.bits, files.parameters) == ("hf", "bnb", 4, 128)


def test_a_gptq_configuration_over_plain_weights_is_a_mix(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(CorruptModel, match="they are plain"):
        check(folder)


def test_packed_tensors_must_fit_each_other(tmp_path: Path) -> None:
    tensors = quantized_llama()
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.scales"] = ("F16", (2, 8))
    with pytest.raises(CorruptModel, match=f"{name}.scales has 8 columns"):
        check(hf_folder(tmp_path / "m", tensors=tensors))
    tensors.pop(f"{name}.scales")
    with pytest.raises(CorruptModel, match=f"{name}.qweight has no scales"):
        check(hf_folder(tmp_path / "n", tensors=tensors))


@pytest.mark.parametrize(
    ("extra", "architecture"),
    [
        ({"time_decay": (16,)}, "rwkv4"),
        ({"gate.weight": (16, 16)}, "rwkv5"),
        ({"time_maa_x": (16,)}, "rwkv6"),
        ({"r_k": (4, 4)}, "rwkv7"),
    ],
)
def test_rwkv_by_its_tensors(tmp_path: Path, extra: dict[str, tuple[int, ...]], architecture: str) -> None:
    tensors: Shapes = {
        "emb.weight": ("F32", (256, 16)),
        "head.weight": ("F32", (256, 16)),
        "blocks.0.att.key.weight": ("F32", (16, 16)),
    }
    tensors |= {f"blocks.0.att.{name}": ("F32", shape) for name, shape in extra.items()}
    path = tmp_path / "anything.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    files = check(path)
    assert (files.format, files.architecture, files.vocab_size) == ("rwkv", architecture, 256)


def npy(shape: tuple[int, ...], descr: str = "<f2", data: int | None = None) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    size = 2
    for side in shape:
        size *= side
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size if data is None else data)


OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 50,
}


def flexgen_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, shape in opt_shape(OPT).tensors().items():
        (folder / name).write_bytes(npy(shape))
    write_json(folder / "config.json", OPT)
    return folder


def test_flexgen_by_its_arrays(tmp_path: Path) -> None:
    folder = flexgen_folder(tmp_path / "opt-np")
    files = check(folder)
    parameters = sum(math.prod(shape) for shape in opt_shape(OPT).tensors().values())
    assert (files.format, files.vocab_size, files.context_length, files.parameters) == ("flexgen", 50, 64, parameters)
    (folder / "decoder.layers.0.fc1.weight").write_bytes(npy((8, 8), data=100))
    with pytest.raises(CorruptModel, match="file incomplete"):
        check(folder)
    (folder / "decoder.layers.0.fc1.weight").write_bytes(npy((8, 8), "|O"))
    with pytest.raises(UnsafeModel, match="Python objects"):
        check(folder)


def test_flexgen_arrays_are_a_model_only_when_all_are_there(tmp_path: Path) -> None:
    folder = flexgen_folder(tmp_path / "opt-np")
    (folder / "decoder.layers.0.fc2.bias").write_bytes(npy((9,)))
    with pytest.raises(CorruptModel, match=r"fc2.bias is \(9,\), but config.json says \(8,\)"):
        check(folder)
    (folder / "decoder.layers.0.fc2.bias").unlink()
    with pytest.raises(CorruptModel, match=r"fc2.bias is missing"):
        check(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CorruptModel, match="conversion was not finished"):
        check(folder)


def lora_folder(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8})
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes({"base.q_proj.lora_A.weight": ("F32", (8, 16))}))
    return folder


def test_a_lora_adapter_is_no_model_by_itself(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "style")
    assert check(folder, adapter=True).base_model == "owner/base"
    with pytest.raises(IncompatibleModel, match="adapter for owner/base"):
        check(folder)
    with pytest.raises(IncompatibleModel, match="not a LoRA"):
        check(hf_folder(tmp_path / "m"), adapter=True)


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


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    hf_folder(folder)
    (folder / "model.safetensors").unlink()
    tensors = list(llama_tensors().items())
    parts = [dict(tensors[:9]), dict(tensors[9:])]
    found = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors_bytes(part))
        found |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {**found, **(weight_map or {})}})
    return folder


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


# --- tokenizer and generation settings -------------------------------------------------------------------------


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


def test_generation_defaults_are_cleaned_with_a_warning(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == ({}, [])
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": NaN, "top_p": 0.9, "top_k": 1.5, "max_length": 0, "eos_token_id": [-1, 2], "bos_token_id": 7,'
        ' "do_sample": true, "repetition_penalty": Infinity, "min_p": true}',
        encoding="utf-8",
    )
    values, warnings = generation_defaults(tmp_path, vocab_size=5)
    assert values == {"top_p": 0.9, "eos_token_id": [2], "do_sample": True}
    assert [name for name in ("temperature", "top_k", "max_length", "eos_token_id", "bos_token_id", "repetition_penalty", "min_p")
            if any(name in warning for warning in warnings)] == [
        "temperature", "top_k", "max_length", "eos_token_id", "bos_token_id", "repetition_penalty", "min_p"]  # fmt: skip
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    values, warnings = generation_defaults(tmp_path)
    assert values == {}
    assert len(warnings) == 1


# --- lists -----------------------------------------------------------------------------------------------------


def model_dir(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    hf_folder(root / "llama" / "hf")
    (root / "llama" / "llama-Q4_0.gguf").write_bytes(gguf_bytes())
    (root / "top.gguf").write_bytes(gguf_bytes())
    (root / "renamed.dat").write_bytes(gguf_bytes())
    (root / "broken.gguf").write_bytes(b"")
    (root / ".hidden.gguf").write_bytes(gguf_bytes())
    (root / "unfinished.gguf.part").write_bytes(gguf_bytes())
    (root / "notes.txt").write_text("GGUF", encoding="utf-8")
    (root / "data.bin").write_bytes(bytes(100))
    (root / "split-00001-of-00002.gguf").write_bytes(gguf_bytes())
    (root / "split-00002-of-00002.gguf").write_bytes(gguf_bytes())
    write_json(root / "bundled.json", {"models": ["llama/h?"]})
    lora_folder(root / "style")
    return root


def test_a_folder_of_models(tmp_path: Path) -> None:
    models = list_models([model_dir(tmp_path)])
    assert [model.id for model in models] == [
        "broken.gguf", "llama/hf", "llama/llama-Q4_0.gguf", "renamed.dat", "split-00001-of-00002.gguf", "style", "top.gguf"
    ]  # fmt: skip
    assert [model.id for model in models if model.bundled] == ["llama/hf"]
    assert [model.id for model in models if model.problem] == ["broken.gguf"]
    assert list_models([tmp_path / "absent"]) == []


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    path = root / "m.gguf"
    path.write_bytes(gguf_bytes()[:-300])
    assert list_models([root])[0].problem
    path.write_bytes(gguf_bytes())
    assert list_models([root])[0].problem is None
    path.unlink()
    assert list_models([root]) == []


def test_two_folders_with_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(gguf_bytes())
    models = list_models([tmp_path / "one", tmp_path / "two"])
    assert [model.id for model in models] == ["m.gguf", "two/m.gguf"]


def test_a_model_by_its_name(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    for name in ("llama/hf", "hf", "HF"):
        assert find_model(name, [root]).id == "llama/hf"
    assert find_model("top", [root]).id == "top.gguf"
    assert find_model("llama-q4_0", [root]).id == "llama/llama-Q4_0.gguf"
    with pytest.raises(ModelNotFound, match=r"Did you mean top.gguf"):
        find_model("topp.gguf", [root])


@pytest.mark.parametrize("name", ["", "../models/top.gguf", "/etc/passwd", "top.gguf/../top.gguf", "x" * 10**6, "a\0b", "a\nb"])
def test_no_name_reaches_outside_or_comes_back(tmp_path: Path, name: str) -> None:
    root = model_dir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        find_model(name, [root])
    assert len(str(caught.value)) < 1000
    assert "passwd" not in str(caught.value)
    assert str(root) not in str(caught.value)


def test_a_path_only_where_it_is_allowed(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(gguf_bytes())
    with pytest.raises(ModelNotFound):
        find_model(str(outside), [root])
    assert find_model(str(outside), [root], allow_paths=True).path == str(outside)
    assert find_model(str(root / "top.gguf"), [root], allow_paths=True).id == "top.gguf"


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    root = model_dir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big.gguf").write_bytes(gguf_bytes())
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    ids = [model.id for model in list_models([root])]
    assert "linked/big.gguf" in ids
    assert "circle/top.gguf" in ids
    assert not any(model_id.count("circle") > 5 for model_id in ids)


def test_weights_that_are_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "models--o--n" / "snapshots" / "main")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert check(folder).problem is None


@pytest.mark.slow
def test_a_thousand_models_are_listed_in_a_second(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for number in range(500):
        hf_folder(root / f"hf-{number}")
        (root / f"m-{number}.gguf").write_bytes(gguf_bytes())
    assert len(list_models([root])) == 1000
    started = time.process_time()
    assert len(list_models([root])) == 1000
    assert time.process_time() - started < 1.0


# --- nothing escapes -------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from(["m.gguf", "m.safetensors", "m.pth", "m"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_any_bytes_have_a_verdict(tmp_path: Path, data: bytes, name: str) -> None:
    for prefix in (b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x93NUMPY\x01\0", b"\x80\x02"):
        path = tmp_path / name
        path.write_bytes(prefix + data)
        files = inspect(path)
        assert files.problem
        assert not any(ord(character) < 32 for character in files.problem)


@given(
    st.sampled_from(
        ["config.json", "tokenizer.json", "model.safetensors.index.json", "quantize_config.json", "adapter_config.json"]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*LLAMA, "weight_map", "quantization_config", "bits", "vocab"]), inner)
        ),
        max_leaves=12,
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
def test_any_json_in_a_sidecar_has_a_verdict(tmp_path: Path, name: str, value: Any) -> None:
    folder = hf_folder(tmp_path / "m")
    for extra in ("model.safetensors.index.json", "quantize_config.json", "adapter_config.json"):
        (folder / extra).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps({**LLAMA, **value} if isinstance(value, dict) else value), encoding="utf-8")
    inspect(folder)
    try:
        check(folder)
    except AppError as error:
        assert error.hint


# --- the real files --------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_the_real_models(shared: Path) -> None:
    folder = shared / "models"
    hf = check(folder / "stories260K" / "hf")
    assert (hf.format, hf.parameters, hf.context_length, hf.vocab_size) == ("hf", 260_032, 512, 512)
    gguf = check(folder / "stories260K" / "stories260K-f32.gguf")
    assert (gguf.format, gguf.architecture, gguf.vocab_size) == ("gguf", "llama", 512)
    for name, architecture in (("4v0-660K", "rwkv4"), ("5v2-730K", "rwkv5")):
        files = inspect(folder / "tiny-rwkv" / f"converted-tiny-rwkv-{name}.pth")
        assert (files.format, files.architecture) == ("rwkv", architecture)
        assert "pickle" in (files.problem or "")


@pytest.mark.shared
def test_the_real_ggufs(shared: Path) -> None:
    problems = {path.name.split(".")[0]: inspect(path).problem or "" for path in (shared / "gguf").glob("*.gguf")}
    assert "version 1" in problems.pop("ggml-vocab-llama")
    assert len(problems) == 3
    assert all("vocabulary without weights" in problem for problem in problems.values())
    with pytest.raises(CorruptModel, match="FUGG"):
        check(next((shared / "gguf" / "corrupt").glob("*.gguf")))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "form", "bits", "group", "desc_act"),
    [
        ("Wizard-Vicuna-30B-Uncensored-GPTQ/config.json", "gptq", 4, 64, True),
        ("Wizard-Vicuna-30B-Uncensored-GPTQ/quantize_config.8bit-g-1.json", "gptq", 8, -1, True),
        ("llama_2_13_B_chat_GPTQ/quantize_config.json", "gptq", 4, 128, False),
        ("Qwen-VL-Chat-Int4/quantize_config.json", "gptq", 4, 128, False),
        ("chatbot_kullm/quantize_config.8bit.json", "gptq", 8, 128, True),
        ("wizard-mega-13B-GPTQ/quantize_config.old-6-keys.json", "gptq", 4, 128, False),
        ("Meta-Llama-3.1-8B-Instruct-w4a16/quantization_config.json", "gptq", 4, 128, True),
        ("Qwen2.5-7B-Instruct-AWQ/quantization_config.json", "awq", 4, 128, None),
        ("magnum-12b-v2.5-kto-exl2/config.quantization.json", "exl2", 4.25, None, None),
        ("Qwen3-8B-FP8/quantization_config.json", "hf", 8, None, None),
    ],
)
def test_the_real_configurations(
    shared: Path, tmp_path: Path, name: str, form: str, bits: float, group: int | None, desc_act: bool | None
) -> None:
    config = json.loads((shared / "quant-configs" / name).read_text(encoding="utf-8"))
    inner = config.get("quantization_config", config)
    folder = tmp_path / "m"
    folder.mkdir()
    write_json(folder / "config.json", {**LLAMA, "quantization_config": inner})
    files = inspect(folder)
    assert files.format == form
    assert files.quantization
    assert (files.quantization.bits, files.quantization.group_size, files.quantization.desc_act) == (bits, group, desc_act)
    assert "no weights" in (files.problem or "")


def test_what_headers_said_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.detect import listing
    from modules.detect.remembered import HeaderCache

    models = tmp_path / "models"
    models.mkdir()
    (models / "a.gguf").write_bytes(b"GGUF broken")
    kept = tmp_path / "data" / "headers.json"
    first = listing.list_models([models], HeaderCache(kept))
    read: list[str] = []
    examine = listing.examine
    monkeypatch.setattr(listing, "examine", lambda path, **options: (read.append(path.name), examine(path, **options))[1])
    assert listing.list_models([models], HeaderCache(kept)) == first and read == []
    (models / "a.gguf").write_bytes(b"GGUF broken otherwise")
    changed = listing.list_models([models], HeaderCache(kept))
    assert read == ["a.gguf"] and changed[0].size_bytes == 21
    (models / "a.gguf").unlink()
    (models / "b.gguf").write_bytes(b"GGUF broken")
    listing.list_models([models], HeaderCache(kept))
    assert list(json.loads(kept.read_text(encoding="utf-8"))["models"]) == [str(models / "b.gguf")]


@pytest.mark.parametrize(
    "text",
    [
        '{"models": {',
        "[]",
        "{}",
        '{"rules": "other", "models": {"x": [1, {}]}}',
        "\x00",
        '{"rules": "R", "models": {"P": ["D", {"no": 1}]}}',
    ],
)
def test_a_file_of_headers_that_is_torn_or_foreign_counts_for_nothing(tmp_path: Path, text: str) -> None:
    from modules.detect import listing, remembered

    (tmp_path / "a.gguf").write_bytes(b"GGUF broken")
    digest = remembered._digest(listing._fingerprint(tmp_path / "a.gguf"))
    kept = tmp_path / "headers.json"
    text = (
        text.replace('"R"', f'"{remembered._rules()}"')
        .replace('"P"', json.dumps(str(tmp_path / "a.gguf")))
        .replace('"D"', f'"{digest}"')
    )
    kept.write_text(text, encoding="utf-8")
    (found,) = listing.list_models([tmp_path], remembered.HeaderCache(kept))
    assert found.problem and "damaged" in found.problem

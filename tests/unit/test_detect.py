"""Detection by content: what a folder or file is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.detect import check, inspect
from modules.detect.opt import opt_shape
from modules.errors import AppError, CorruptModel, IncompatibleModel, UnsafeModel
from tests.unit.model_files import LLAMA, Shapes, hf_folder, llama_tensors, lora_folder, safetensors_bytes, write_json


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


def test_a_lora_adapter_is_no_model_by_itself(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "style")
    assert check(folder, adapter=True).base_model == "owner/base"
    with pytest.raises(IncompatibleModel, match="adapter for owner/base"):
        check(folder)
    with pytest.raises(IncompatibleModel, match="not a LoRA"):
        check(hf_folder(tmp_path / "m"), adapter=True)


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

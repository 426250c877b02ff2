"""Which loader takes which quantised model, here and on a machine with an NVIDIA GPU, and why others do not: one line each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from modules.detect import inspect
from modules.overlays import NO_CUDA
from modules.registry import discover, rank
from tests.unit.model_files import LLAMA, Shapes, hf_folder

if TYPE_CHECKING:
    from pathlib import Path

    from modules.registry import Choice
    from modules.schema import LoaderSpec, ModelFiles

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


class Machine:
    """Every environment is installed; `cuda` says whether there is a GPU."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def unavailable(self, spec: LoaderSpec) -> str | None:
        return NO_CUDA if spec.needs_cuda and not self.cuda else None


def weights(method: str, bits: float, group: int) -> Shapes:
    """A model's tensors, its layers packed the way `method` does it."""
    hidden, ffn = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv = hidden // LLAMA["num_attention_heads"] * LLAMA["num_key_value_heads"]
    tensors: Shapes = {
        "model.embed_tokens.weight": ("F16", (32, hidden)),
        "model.norm.weight": ("F16", (hidden,)),
        "lm_head.weight": ("F16", (32, hidden)),
        "model.layers.0.input_layernorm.weight": ("F16", (hidden,)),
        "model.layers.0.post_attention_layernorm.weight": ("F16", (hidden,)),
    }
    layers = {"q": hidden, "k": kv, "v": kv, "o": hidden}
    shapes = {f"self_attn.{name}_proj": (hidden, out) for name, out in layers.items()}
    shapes |= {"mlp.gate_proj": (hidden, ffn), "mlp.up_proj": (hidden, ffn), "mlp.down_proj": (ffn, hidden)}
    for name, (inputs, outputs) in shapes.items():
        stem = f"model.layers.0.{name}"
        if method == "gptq":
            words, groups = int(bits), 1 if group == -1 else inputs // group
            tensors |= {
                f"{stem}.qweight": ("I32", (inputs * words // 32, outputs)),
                f"{stem}.qzeros": ("I32", (groups, outputs * words // 32)),
                f"{stem}.scales": ("F16", (groups, outputs)),
                f"{stem}.g_idx": ("I32", (inputs,)),
            }
        elif method == "awq":
            tensors |= {
                f"{stem}.qweight": ("I32", (inputs, outputs // 8)),
                f"{stem}.qzeros": ("I32", (inputs // group, outputs // 8)),
                f"{stem}.scales": ("F16", (inputs // group, outputs)),
            }
        elif method == "exl2":
            tensors |= {f"{stem}.q_weight": ("I32", (inputs // 8, outputs)), f"{stem}.q_groups": ("I32", (2,))}
        elif method == "exl3":
            tensors |= {f"{stem}.trellis": ("I32", (inputs // 16, outputs // 16, 24)), f"{stem}.suh": ("F16", (inputs,))}
        else:
            tensors |= {f"{stem}.weight": ("F8_E4M3", (outputs, inputs))}
    return tensors


def choices(files: ModelFiles, cuda: bool) -> dict[str, Choice]:
    """Loader -> choice, best first."""
    assert files.problem is None, files.problem
    asked = [spec for spec in discover().values() if spec.name not in ("echo", "remote", "flexgen")]
    found = rank(files, asked, Machine(cuda))
    for choice in found:
        assert choice.ok or (choice.reason.endswith(".") and "\n" not in choice.reason and len(choice.reason) < 160), choice
    return {choice.spec.name: choice for choice in found}


def taken(found: dict[str, Choice]) -> list[str]:
    return [name for name, choice in found.items() if choice.ok]


CASES: list[tuple[str, str, float, int, list[str], list[str]]] = [
    # the real file, method, bits, group, who takes it without a GPU, who with one
    ("llama_2_13_B_chat_GPTQ/config.json", "gptq", 4, 128, ["gptq_for_llama", "autogptq"], ["exllama"]),
    ("Wizard-Vicuna-30B-Uncensored-GPTQ/config.json", "gptq", 4, 64, ["gptq_for_llama", "autogptq"], ["exllama"]),
    ("Wizard-Vicuna-30B-Uncensored-GPTQ/quantize_config.8bit-g-1.json", "gptq", 8, -1, ["gptq_for_llama", "autogptq"], []),
    ("chatbot_kullm/quantize_config.8bit.json", "gptq", 8, 128, ["gptq_for_llama", "autogptq"], []),
    ("Qwen-VL-Chat-Int4/quantize_config.json", "gptq", 4, 128, ["gptq_for_llama", "autogptq"], ["exllama"]),
    ("wizard-mega-13B-GPTQ/quantize_config.old-6-keys.json", "gptq", 4, 128, ["gptq_for_llama", "autogptq"], ["exllama"]),
    ("Meta-Llama-3.1-8B-Instruct-w4a16/quantization_config.json", "gptq", 4, 128, ["gptq_for_llama", "autogptq"], ["exllama"]),
    ("magnum-12b-v2.5-kto-exl2/config.quantization.json", "exl2", 4.25, 0, [], ["exllama"]),
    ("Qwen2.5-7B-Instruct-AWQ/quantization_config.json", "awq", 4, 128, [], []),
    ("Qwen3-8B-FP8/quantization_config.json", "fp8", 8, 0, ["transformers"], []),
]


def made(tmp_path: Path, method: str, bits: float, group: int, settings: dict[str, Any]) -> ModelFiles:
    inner = settings.get("quantization_config", settings)
    config = {**SIZES, "quantization_config": inner}
    return inspect(hf_folder(tmp_path / "m", config, weights(method, bits, group)))


@pytest.mark.shared
@pytest.mark.parametrize(("name", "method", "bits", "group", "here", "with_gpu"), CASES, ids=[case[0] for case in CASES])
def test_real_configurations_go_to_the_right_loader(
    shared: Path, tmp_path: Path, name: str, method: str, bits: float, group: int, here: list[str], with_gpu: list[str]
) -> None:
    settings = json.loads((shared / "quant-configs" / name).read_text(encoding="utf-8"))
    files = made(tmp_path, method, bits, group, settings)
    assert files.quantization and (files.quantization.method, files.quantization.bits) == (method, bits)
    without, beside = choices(files, cuda=False), choices(files, cuda=True)
    assert taken(without) == here
    assert sorted(taken(beside)) == sorted([*here, *with_gpu])
    assert taken(beside)[:1] == (here or with_gpu)[:1], "this product's own runtime comes first where it can run the model"
    if method in ("gptq", "exl2") and with_gpu:
        assert without["exllama"].reason == NO_CUDA


@pytest.mark.parametrize(
    ("method", "bits", "loader", "reason"),
    [
        ("gptq", 8, "exllama", "takes GPTQ of 4 bits; this has 8. GPTQ-for-LLaMA takes 2, 3, 4 and 8."),
        ("gptq", 4, "llamacpp", "needs a GGUF file; this is a GPTQ checkpoint."),
        ("exl2", 4.25, "gptq_for_llama", "needs a GPTQ checkpoint; this is an EXL2 checkpoint."),
        ("exl3", 3, "autogptq", "needs a GPTQ checkpoint; this is an EXL3 checkpoint."),
        ("awq", 4, "exllama", "this is an AWQ checkpoint."),
        ("fp8", 8, "autogptq", "needs a GPTQ checkpoint; this is a safetensors folder."),
    ],
)
def test_the_reason_for_a_refusal(tmp_path: Path, method: str, bits: float, loader: str, reason: str) -> None:
    named = {"gptq": "gptq", "exl2": "exl2", "exl3": "exl3", "awq": "awq", "fp8": "fp8"}[method]
    found = choices(made(tmp_path, method, bits, 64, {"quant_method": named, "bits": bits}), cuda=True)
    assert not found[loader].ok and found[loader].reason.endswith(reason)


def test_exl3_is_exllamas(tmp_path: Path) -> None:
    files = made(tmp_path, "exl3", 3, 0, {"quant_method": "exl3", "bits": 3.0})
    assert taken(choices(files, cuda=True)) == ["exllama"] and taken(choices(files, cuda=False)) == []

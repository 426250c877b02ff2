"""`plan` on the headers of models of a hundred gigabytes and more: sparse files with true headers and true sizes.

Three models: a Llama of 70B in bfloat16 (30 shards), a mixture of experts with 90,000 tensors in FP8 (160 shards), a GGUF of
100 GB with a vocabulary of 128,000. Timed are the function on an open process, and the whole command with its start.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Overlays, report

from modules.detect import inspect
from modules.plan import plan
from modules.plan.machine import this_machine
from modules.registry import discover

ROUNDS = 5
WIDTHS = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def llama_70b() -> tuple[dict[str, Any], Tensors]:
    hidden, ffn, kv, vocab, layers = 8192, 28672, 1024, 128256, 80
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocab,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for number in range(layers):
        layer = f"model.layers.{number}"
        sides = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
        tensors |= {f"{layer}.self_attn.{name}.weight": ("BF16", shape) for name, shape in sides.items()}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": ("BF16", (ffn, hidden)) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = ("BF16", (hidden, ffn))
        tensors |= {f"{layer}.{name}_layernorm.weight": ("BF16", (hidden,)) for name in ("input", "post_attention")}
    return config, tensors | {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocab, hidden))}


def mixture() -> tuple[dict[str, Any], Tensors]:
    hidden, ffn, vocab, layers, experts = 7168, 2048, 129280, 58, 256
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": hidden, "vocab_size": vocab,
        "intermediate_size": 18432, "num_hidden_layers": layers, "num_attention_heads": 128, "num_key_value_heads": 128,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": experts,
        "num_experts_per_tok": 8, "max_position_embeddings": 163840, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden)), "lm_head.weight": ("BF16", (vocab, hidden))}
    for number in range(layers):
        for expert in range(experts):
            for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                part = f"model.layers.{number}.mlp.experts.{expert}.{name}_proj.weight"
                tensors[part] = ("F8_E4M3", shape)
                tensors[f"{part}_scale_inv"] = ("F32", (shape[0] // 128, shape[1] // 128))
    return config, tensors


def folder(path: Path, config: dict[str, Any], tensors: Tensors, shards: int) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        at = 0
        for name in mine:
            kind, shape = tensors[name]
            end = at + WIDTHS[kind]
            for side in shape:
                end = at + (end - at) * side
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
            at = end
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (path / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + at)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return path


def gguf(path: Path) -> Path:
    """A Llama of 180 layers in Q4_0, 100 GB."""
    hidden, ffn, kv, vocab, layers = 8192, 28672, 1024, 128256, 200

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    numbers = {"block_count": layers, "embedding_length": hidden, "context_length": 131072, "feed_forward_length": ffn}
    numbers |= {"attention.head_count": 64, "attention.head_count_kv": 8}
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    keys += [text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    words = b"".join(text(f"token{number}") for number in range(vocab))
    keys.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, vocab) + words)
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (hidden, vocab), "output.weight": (hidden, vocab)}
    for number in range(layers):
        sides = {"attn_q": (hidden, hidden), "attn_k": (hidden, kv), "attn_v": (hidden, kv), "attn_output": (hidden, hidden)}
        sides |= {"ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn), "ffn_down": (ffn, hidden)}
        tensors |= {f"blk.{number}.{name}.weight": shape for name, shape in sides.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    at = 0
    for name, shape in tensors.items():
        head += text(name) + struct.pack("<IQQIQ", 2, *shape, 2, at)
        at += shape[0] * shape[1] // 32 * 18
    with path.open("wb") as out:
        out.write(head)
        out.truncate(-(-len(head) // 32) * 32 + at)
    return path


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="switchyard-headers-") as name, report("plan_headers") as figures:
        base = Path(name)
        models = {
            "llama-70b": folder(base / "llama-70b", *llama_70b(), 30),
            "mixture": folder(base / "mixture", *mixture(), 160),
            "gguf": gguf(base / "large.gguf"),
        }
        machine, specs, overlays = this_machine(base, base), discover(), Overlays.find(ROOT)
        for label, path in models.items():
            inspected, planned, command = [], [], []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                model = inspect(path)
                middle = time.perf_counter()
                assert not model.problem, model.problem
                fits = plan(model, machine, specs.values(), overlays)
                inspected.append(middle - begun)
                planned.append(time.perf_counter() - middle)
            words = [sys.executable, "server.py", "plan", str(path), "--json", "--user-data-dir", name]
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                subprocess.run(words, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
                command.append(time.perf_counter() - begun)
            figures[label] = {
                "gigabytes": round(model.size_bytes / 1e9),
                "fits_listed": len(fits),
                "inspect_s": round(statistics.median(inspected), 3),
                "plan_s": round(statistics.median(planned), 3),
                "command_s": round(statistics.median(command), 3),
            }


if __name__ == "__main__":
    main()

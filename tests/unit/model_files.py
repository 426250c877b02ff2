"""Small model files made on the spot, whole and broken, for the detection, conversion and download tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

Shapes = dict[str, tuple[str, Sequence[int]]]


def safetensors_bytes(tensors: Shapes, metadata: dict[str, str] | None = None) -> bytes:
    """A whole safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPE_BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return with_header(json.dumps(header).encode(), at)


def with_header(header: bytes, data_bytes: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


def llama_tensors(config: dict[str, Any] | None = None, dtype: str = "F16") -> Shapes:
    """The tensors a Llama of this config has."""
    c = {**LLAMA, **(config or {})}
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    tensors: Shapes = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    for number in range(c["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": (dtype, (hidden, hidden)),
            f"{layer}self_attn.k_proj.weight": (dtype, (kv, hidden)),
            f"{layer}self_attn.v_proj.weight": (dtype, (kv, hidden)),
            f"{layer}self_attn.o_proj.weight": (dtype, (hidden, hidden)),
            f"{layer}mlp.gate_proj.weight": (dtype, (ffn, hidden)),
            f"{layer}mlp.up_proj.weight": (dtype, (ffn, hidden)),
            f"{layer}mlp.down_proj.weight": (dtype, (hidden, ffn)),
            f"{layer}input_layernorm.weight": (dtype, (hidden,)),
            f"{layer}post_attention_layernorm.weight": (dtype, (hidden,)),
        }
    tensors["model.norm.weight"] = (dtype, (hidden,))
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (dtype, (vocab, hidden))
    return tensors


def tokenizer_json(size: int = 32) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "]}", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {f'"t{number}\\': number for number in range(size)}, "merges": []},
    }


def hf_folder(folder: Path, config: dict[str, Any] | None = None, tensors: Shapes | None = None, tokens: int = 32) -> Path:
    """A complete small Llama folder (weights of zeros)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**LLAMA, **(config or {})})
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors or llama_tensors(config)))
    write_json(folder / "tokenizer.json", tokenizer_json(tokens))
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# --- GGUF ------------------------------------------------------------------------------------------------------

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
Value = tuple[int, Any]


def text(value: str | bytes) -> bytes:
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(gguf_value(inner, item) for item in items)
    return struct.pack({U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}[kind], value)


def gguf_keys(**changes: Value | None) -> dict[str, Value]:
    """The metadata of a small Llama; a change to None removes the key ("__" stands for the dots)."""
    keys: dict[str, Value] = {
        "general.architecture": (STRING, "llama"),
        "general.file_type": (U32, 0),
        "llama.context_length": (U32, 64),
        "llama.embedding_length": (U32, 32),
        "llama.block_count": (U32, 1),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, ["<s>", "a", "é", "🚀"])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 1),
        "tokenizer.chat_template": (STRING, "{{ messages }}"),
    }
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            keys.pop(key, None)
        else:
            keys[key] = value
    return keys


GgufTensors = dict[str, tuple[Sequence[int], int, int]]  # name -> (shape, type id, bytes)


def gguf_tensors() -> GgufTensors:
    return {
        "token_embd.weight": ((32, 4), 0, 512),
        "blk.0.attn_q.weight": ((32, 32), 0, 4096),
        "output_norm.weight": ((32,), 0, 128),
    }


def gguf_bytes(
    keys: dict[str, Value] | None = None,
    tensors: GgufTensors | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file; the defaults make a whole one."""
    keys = gguf_keys() if keys is None else keys
    tensors = gguf_tensors() if tensors is None else tensors
    out = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, (kind, value) in keys.items():
        out += text(key) + struct.pack("<I", kind) + gguf_value(kind, value)
    at = 0
    for name, (shape, kind, size) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, at)
        at += -(-size // alignment) * alignment
    return out + bytes(-len(out) % alignment) + bytes(at)


def lora_folder(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8})
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes({"base.q_proj.lora_A.weight": ("F32", (8, 16))}))
    return folder


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


def projector_bytes(width: int = 32, kind: int = 1, **changes: Value | None) -> bytes:
    """A projector (mmproj) for a model of this `width`; `kind` is its file type. A change to None removes the key."""
    keys: dict[str, Value] = {
        "general.architecture": (STRING, "clip"),
        "general.type": (STRING, "mmproj"),
        "general.file_type": (U32, kind),
        "clip.has_vision_encoder": (BOOL, True),
        "clip.vision.image_size": (U32, 32),
        "clip.vision.patch_size": (U32, 8),
        "clip.vision.embedding_length": (U32, 32),
        "clip.vision.feed_forward_length": (U32, 64),
        "clip.vision.attention.head_count": (U32, 2),
        "clip.vision.projection_dim": (U32, width),
    }
    for name, value in changes.items():
        keys[name.replace("__", ".")] = value  # type: ignore[assignment]
    return gguf_bytes({name: value for name, value in keys.items() if value is not None}, {"mm.0.weight": ((32, 32), 0, 4096)})

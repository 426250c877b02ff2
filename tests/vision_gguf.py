"""Tiny vision models of Transformers as llama.cpp takes them: the language model as a GGUF, what sees as an mmproj GGUF.

A LLaVA with SigLIP (llama.cpp puts CLIP's class token behind the patches, so that it sees a little else), and a Qwen2-VL, whose
images take fewer positions than tokens (M-RoPE). The names and keys are those of llama.cpp's converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.contract.gguf_file import Value, write_gguf

Tensors = dict[str, tuple[tuple[int, ...], list[float]]]
_LLAMA = {
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_BIASES = ("attn_q", "attn_k", "attn_v")
_QWEN = {"attn_out": "attn.proj", "ln1": "norm1", "ln2": "norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_SIGLIP = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip


def write_llava(folder: Path, name: str, model: Any, words: Any, template: str) -> None:
    """FOLDER/NAME-F32.gguf and FOLDER/mmproj-NAME-F32.gguf of a LlavaForConditionalGeneration and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = _text_keys("llama", model, words, template)
    write_gguf(folder / f"{name}-F32.gguf", keys, _language_model(model, turned=True))
    write_gguf(folder / f"mmproj-{name}-F32.gguf", _siglip_keys(model), _siglip(model))


def write_gemma(folder: Path, name: str, model: Any, words: Any, template: str) -> None:
    """The LLaVA again with its images read as Gemma 3 reads them: four patches to a token, each of which sees the whole image."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = _siglip_keys(model) | {"clip.projector_type": "gemma3", "clip.vision.projector.scale_factor": 2}
    del keys["clip.vision.feature_layer"]
    tensors = {key: tensor for key, tensor in _siglip(model).items() if not key.startswith("mm.")}
    tensors |= _both("v.post_ln", model.model.vision_tower.post_layernorm)
    tensors["mm.input_projection.weight"] = _tensor(model.model.multi_modal_projector.linear_1.weight)
    tensors["mm.soft_emb_norm.weight"] = ((32,), [1.0] * 32)
    write_gguf(folder / f"{name}-F32.gguf", _text_keys("llama", model, words, template), _language_model(model, turned=True))
    write_gguf(folder / f"mmproj-{name}-F32.gguf", keys, tensors)


def write_qwen(folder: Path, name: str, model: Any, words: Any, template: str) -> None:
    """The same of a Qwen2VLForConditionalGeneration."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [*model.config.text_config.rope_parameters["mrope_section"], 0]
    keys = _text_keys("qwen2vl", model, words, template) | {"qwen2vl.rope.dimension_sections": sections}
    write_gguf(folder / f"{name}-F32.gguf", keys, _language_model(model, turned=False))
    write_gguf(folder / f"mmproj-{name}-F32.gguf", _qwen_keys(model), _qwen(model))


def _text_keys(kind: str, model: Any, words: Any, template: str) -> dict[str, Value]:
    config = model.config.text_config
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    special = set(words.all_special_ids)
    return {
        "general.architecture": kind,
        "general.file_type": 0,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        f"{kind}.rope.freq_base": 10000.0,
        f"{kind}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if number in special else 1 for _, number in vocabulary],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }


def _language_model(model: Any, *, turned: bool) -> Tensors:
    """`turned`: llama.cpp turns neighbours of a head against each other, where Transformers turns its two halves."""
    config, inner = model.config.text_config, model.model.language_model
    made = {
        "token_embd.weight": _tensor(inner.embed_tokens.weight),
        "output_norm.weight": _tensor(inner.norm.weight),
        "output.weight": _tensor(model.lm_head.weight),
    }
    for number, layer in enumerate(inner.layers):
        block = f"blk.{number}"
        for short, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = layer.get_submodule(f"self_attn.{short}_proj").weight
            mixed = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            made[f"{block}.attn_{short}.weight"] = _tensor(mixed if turned else weight)
        for name, own in _LLAMA.items():
            made[f"{block}.{name}.weight"] = _tensor(layer.get_submodule(own).weight)
        for name in _BIASES:
            bias = layer.get_submodule(f"self_attn.{name[-1]}_proj").bias
            if bias is not None:
                made[f"{block}.{name}.bias"] = _tensor(bias)
    return made


def _vision_keys(model: Any, kind: str, width: int, inner: int, epsilon: float) -> dict[str, Value]:
    config = model.config.vision_config
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 0,
        "clip.has_vision_encoder": True,
        "clip.projector_type": kind,
        "clip.vision.image_size": getattr(config, "image_size", 32),
        "clip.vision.patch_size": config.patch_size,
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": inner,
        "clip.vision.block_count": config.num_hidden_layers,
        "clip.vision.projection_dim": model.config.text_config.hidden_size,
        "clip.vision.attention.head_count": config.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": epsilon,
        "clip.vision.image_mean": [0.48145466, 0.4578275, 0.40821073],
        "clip.vision.image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _siglip_keys(model: Any) -> dict[str, Value]:
    config = model.config.vision_config
    keys = _vision_keys(model, "mlp", config.hidden_size, config.intermediate_size, config.layer_norm_eps)
    # The last layer; llama.cpp's default is the one before it.
    return keys | {"clip.vision.feature_layer": [config.num_hidden_layers], "clip.use_gelu": True}


def _qwen_keys(model: Any) -> dict[str, Value]:
    config = model.config.vision_config
    return _vision_keys(model, "qwen2vl_merger", config.embed_dim, config.embed_dim * config.mlp_ratio, 1e-6)


def _qwen(model: Any) -> Tensors:
    tower = model.model.visual
    patches = tower.patch_embed.proj.weight  # [channels out, in, 2 frames, rows, columns]
    made = {
        "v.patch_embd.weight": _tensor(patches[:, :, 0]),
        "v.patch_embd.weight.1": _tensor(patches[:, :, 1]),
        **_both("v.post_ln", tower.merger.ln_q),
        **_both("mm.0", tower.merger.mlp[0]),
        **_both("mm.2", tower.merger.mlp[2]),
    }
    for number, layer in enumerate(tower.blocks):
        for short, weight, bias in zip(_BIASES, layer.attn.qkv.weight.chunk(3), layer.attn.qkv.bias.chunk(3), strict=True):
            made[f"v.blk.{number}.{short}.weight"] = _tensor(weight)
            made[f"v.blk.{number}.{short}.bias"] = _tensor(bias)
        for name, own in _QWEN.items():
            made |= _both(f"v.blk.{number}.{name}", layer.get_submodule(own))
    return made


def _siglip(model: Any) -> Tensors:
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    tower = getattr(tower, "vision_model", tower)
    made = {
        **_both("v.patch_embd", tower.embeddings.patch_embedding),
        "v.position_embd.weight": _tensor(tower.embeddings.position_embedding.weight),
        **_both("mm.0", projector.linear_1),
        **_both("mm.2", projector.linear_2),
    }
    for number, layer in enumerate(tower.encoder.layers):
        for name, own in _SIGLIP.items():
            made |= _both(f"v.blk.{number}.{name}", layer.get_submodule(own))
    return made


def _both(name: str, module: Any) -> Tensors:
    return {f"{name}.weight": _tensor(module.weight), f"{name}.bias": _tensor(module.bias)}


def _tensor(weight: Any) -> tuple[tuple[int, ...], list[float]]:
    return tuple(reversed(weight.shape)), weight.detach().float().reshape(-1).tolist()

"""A model's Shape from its headers: a folder's config.json and table of tensors, a GGUF's keys and tensors, RWKV's tensors.

Headers only, and no work that grows with a number a header claims: a lying one costs arithmetic on large integers, nothing else.
What the headers leave open is said in `Shape.gap`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.detect import quantized
from modules.detect.draft import folder_files, integer, read_json
from modules.detect.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from modules.detect.gguf_model import shard_paths
from modules.detect.rwkv import rwkv_shape
from modules.detect.safetensors_header import Tensor, shown
from modules.detect.weights import find_weights, read_safetensors, read_weights
from modules.errors import CorruptModel
from modules.plan.types import Shape
from modules.quantize.layout import read_layouts

if TYPE_CHECKING:
    from modules.schema import ModelFiles

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "emb.weight")
_OUTPUTS = ("lm_head.weight", "head.weight", "embed_out.weight")
_MOST_LAYERS = 10_000
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
# Layers that keep a state of one size in place of keys and values.
_RECURRENT = ("linear_attention", "mamba", "mamba2", "recurrent", "conv")
# GGUF architectures with windowed layers: one of so many remembers everything. Source: llama.cpp's model definitions.
_FULL_EVERY = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4, "llama4": 4, "smallthinker": 4
}  # fmt: skip
_QUANT_FILES = ("quantize_config.json", "quant_config.json")


def read_shape(model: ModelFiles) -> Shape:
    """The shape of a model that detection has found. Raises CorruptModel or another LoadError for wrong headers, OSError."""
    path = Path(model.path)
    if model.format == "gguf":
        return _gguf(model, path)
    if model.format == "rwkv":
        return _rwkv(model, path)
    if model.format in ("hf", "gptq", "awq", "exl2", "exl3"):
        return _safetensors(model, path)
    if model.format == "flexgen":
        config = _json(path / "config.json")
        return _sized(model, config, model.parameters or 0, embedding=0, output=0, stored={"F16": model.size_bytes})
    return Shape(
        model.format,
        model.architecture,
        model.size_bytes,
        model.parameters or 0,
        context=model.context_length or 0,
        path=model.path,
        gap="" if model.format in ("echo", "remote") else "its format says nothing about its size in memory",
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# --- safetensors -------------------------------------------------------------------------------------------------


def _safetensors(model: ModelFiles, path: Path) -> Shape:
    folder = path if path.is_dir() else path.parent
    names = find_weights(folder, folder_files(folder)) if path.is_dir() else [path.name]
    tensors, _ = read_weights(folder, names)
    config = _json(folder / "config.json")
    stored: dict[str, int] = {}
    embedding = output = embedding_bytes = output_bytes = largest = experts = 0
    for name, tensor in tensors.items():
        size, elements = tensor.end - tensor.begin, tensor.elements
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + size
        if name.endswith(_EMBEDDINGS):
            embedding, embedding_bytes = max(embedding, elements), max(embedding_bytes, size)
        elif name.endswith(_OUTPUTS):
            output, output_bytes = elements, size
        else:
            largest = max(largest, elements)
            experts += elements if ".experts." in name else 0
    text = _text(config)
    if output and text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is True:
        output = output_bytes = 0
    parameters = quantized.count_parameters(tensors, model.quantization)
    packing = _packing(model, folder, config, tensors) if model.format == "gptq" else {}
    return _sized(
        model,
        config,
        parameters,
        embedding=embedding,
        output=output,
        stored=stored,
        embedding_bytes=embedding_bytes,
        output_bytes=output_bytes,
        active=_active(text, experts, parameters),
        **{"largest": largest, **packing},
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _packing(model: ModelFiles, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements, bytes and group size of the packed matrices of a GPTQ checkpoint."""
    inner = config.get("quantization_config")
    settings = dict(inner) if isinstance(inner, dict) else {}
    for name in _QUANT_FILES:
        settings = _json(folder / name) | settings
    layouts = read_layouts(tensors, settings, lambda name: None).values()
    if not layouts:
        return {}
    return {
        "packed": sum(one.in_features * one.out_features for one in layouts),
        "packed_bytes": sum(one.in_features * one.out_features * one.bits // 8 for one in layouts),
        "largest": max(one.in_features * one.out_features for one in layouts),
        "group_size": max(one.group_size for one in layouts),
    }


def _active(text: Mapping[str, Any], experts: int, parameters: int) -> float:
    count = next((n for key in ("num_local_experts", "n_routed_experts", "num_experts") if (n := integer(text.get(key)))), 0)
    used = integer(text.get("num_experts_per_tok")) or integer(text.get("num_experts_per_token")) or 0
    return _share(experts, parameters, used, count)


def _share(experts: int, parameters: int, used: int, count: int) -> float:
    if not experts or not count or not 0 < used < count or not parameters:
        return 1.0
    return 1 - experts / parameters * (1 - used / count)


def _sized(
    model: ModelFiles,
    config: Mapping[str, Any],
    parameters: int,
    *,
    embedding: int,
    output: int,
    stored: Mapping[str, int],
    **known: Any,
) -> Shape:
    """The shape with the sizes that config.json gives."""
    text = _text(config)

    def size(*keys: str, most: int = 2**31) -> int:
        return next((found for key in keys if (found := integer(text.get(key), maximum=most))), 0)

    layers = size("num_hidden_layers", "n_layer", "num_layers", most=_MOST_LAYERS)
    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head")
    head_dim = size("head_dim") or (hidden // heads if heads else 0)
    kv_heads = size("num_key_value_heads", "num_kv_heads") or heads
    key, value = kv_heads * head_dim, kv_heads * (size("v_head_dim") or head_dim)
    if size("kv_lora_rank"):  # latent attention, which transformers caches expanded
        key = heads * (size("qk_nope_head_dim") + size("qk_rope_head_dim"))
        value = heads * (size("v_head_dim") or head_dim)
    full, windowed, recurrent = _kinds(text, layers, size("sliding_window"))
    gap = "" if layers and heads and head_dim else _gap(text)
    return Shape(
        model.format,
        model.architecture,
        model.size_bytes,
        parameters,
        model.quantization,
        stored=dict(stored),
        layers=layers,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        ffn=size("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocab=model.vocab_size or 0,
        context=size(*_CONTEXT_KEYS),
        tied=output == 0,
        embedding=embedding,
        output=output,
        keys=full * key,
        values=full * value,
        windowed=windowed * (key + value),
        window=size("sliding_window") if windowed else 0,
        state=recurrent * hidden * (head_dim + 4) * 4,
        path=model.path,
        config=config,
        gap=gap,
        **known,
    )


def _gap(text: Mapping[str, Any]) -> str:
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = text.get(key)
        if value is None:
            return f"config.json has no {key}"
        if integer(value, maximum=_MOST_LAYERS if key == "num_hidden_layers" else 2**31) is None:
            return f"config.json says {key} is {shown(str(value)[:60])}"
    return "config.json does not give the sizes of its attention"


def _kinds(text: Mapping[str, Any], layers: int, window: int) -> tuple[int, int, int]:
    """How many layers remember everything, a window, and only a state."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds and len(kinds) >= layers:
        recurrent = sum(kind in _RECURRENT for kind in kinds[:layers])
        windowed = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds[:layers]) if window else 0
        return layers - windowed - recurrent, windowed, recurrent
    if not window or text.get("use_sliding_window") is False:
        return layers, 0, 0
    every = integer(text.get("sliding_window_pattern"), minimum=2, maximum=1000)
    if every is None and text.get("model_type") == "gemma2":
        every = 2
    full = layers // every if every else 0
    return full, layers - full, 0


# --- RWKV --------------------------------------------------------------------------------------------------------


def _rwkv(model: ModelFiles, path: Path) -> Shape:
    folder = path if path.is_dir() else path.parent
    names = find_weights(folder, folder_files(folder)) if path.is_dir() else [path.name]
    tensors = {name: tensor for part in names for name, tensor in read_safetensors(folder / part).tensors.items()}
    found = rwkv_shape({name: tensor.shape for name, tensor in tensors.items()})
    stored: dict[str, int] = {}
    for tensor in tensors.values():
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.end - tensor.begin
    config = _json(folder / "config.json") if path.is_dir() else {}
    trained = next((size for key in _CONTEXT_KEYS if (size := integer(config.get(key), maximum=2**31))), 0)
    heads = found.heads
    head_dim = found.hidden // heads if heads else 0
    per_layer = 2 * found.hidden + heads * head_dim * head_dim if heads else 5 * found.hidden
    ends = found.vocab * found.hidden
    return Shape(
        "rwkv",
        model.architecture,
        model.size_bytes,
        sum(tensor.elements for tensor in tensors.values()),
        stored=stored,
        layers=found.layers,
        hidden=found.hidden,
        heads=heads,
        head_dim=head_dim,
        vocab=found.vocab,
        context=trained,
        embedding=ends,
        output=ends,
        largest=max(tensor.elements for tensor in tensors.values()),
        state=found.layers * per_layer * 4,
        version=found.version,
        path=model.path,
        config=config,
    )


# --- GGUF --------------------------------------------------------------------------------------------------------


def _gguf(model: ModelFiles, path: Path) -> Shape:
    if path.is_dir():
        raise CorruptModel("A GGUF is a file, not a folder.", hint="Choose the .gguf file.")
    first = read_gguf_header(path)
    tensors = dict(first.tensors)
    for part in shard_paths(path, first)[1:]:
        tensors |= read_gguf_header(part).tensors
    architecture = first.text("general.architecture") or ""
    stored: dict[str, int] = {}
    experts = 0
    for name, tensor in tensors.items():
        stored[tensor.type] = stored.get(tensor.type, 0) + tensor.size_bytes
        experts += tensor.elements if "_exps." in name else 0
    embedding, output = tensors.get("token_embd.weight"), tensors.get("output.weight")
    parameters = sum(tensor.elements for tensor in tensors.values())
    key = _reader(first, architecture)
    heads, hidden = key("attention.head_count"), key("embedding_length")
    layers = min(key("block_count"), _MOST_LAYERS)
    keys, values, gap = _gguf_cache(tensors, key, heads, hidden, layers)
    full = _FULL_EVERY.get(architecture, 1) if key("attention.sliding_window") else 1
    windowed = (keys + values) * (full - 1) // full
    ends = sum(tensor.elements for tensor in (embedding, output) if tensor)
    sight, sight_buffers = _sight(path.with_name(model.projector)) if model.projector and model.vision else (0, 0)
    return Shape(
        "gguf",
        architecture,
        model.size_bytes,
        parameters,
        model.quantization,
        stored=stored,
        layers=layers,
        hidden=hidden,
        heads=heads,
        head_dim=key("attention.key_length") or (hidden // heads if heads else 0),
        ffn=key("feed_forward_length"),
        vocab=model.vocab_size or 0,
        context=key("context_length"),
        tied=output is None,
        embedding=embedding.elements if embedding else 0,
        output=output.elements if output else 0,
        embedding_bytes=embedding.size_bytes if embedding else 0,
        output_bytes=output.size_bytes if output else 0,
        largest=max((tensor.elements for tensor in tensors.values()), default=0),
        keys=keys // full,
        values=values // full,
        windowed=windowed,
        window=key("attention.sliding_window") if windowed else 0,
        state=layers * hidden * 68 * 4 if key("ssm.state_size") or key("wkv.head_size") else 0,
        active=_share(experts, parameters - ends, key("expert_used_count"), key("expert_count")),
        sight=sight,
        sight_buffers=sight_buffers,
        path=model.path,
        gap=gap,
    )


def _sight(path: Path) -> tuple[int, int]:
    """Bytes of a projector's weights, and of what one image of its own size is computed in: the widest step of its transformer,
    and the attention of all patches to all."""
    header = read_gguf_header(path)
    key = _reader(header, "clip.vision")
    patches = (key("image_size") // max(key("patch_size"), 1)) ** 2
    wide = 2 * key("feed_forward_length") + 4 * key("embedding_length")
    buffers = 4 * patches * (wide + patches * key("attention.head_count"))
    return sum(tensor.size_bytes for tensor in header.tensors.values()), buffers


def _reader(header: GgufHeader, architecture: str) -> Any:
    def key(name: str) -> int:
        value = header.integer(f"{architecture}.{name}")
        return value if value is not None and 0 < value <= 2**31 else 0

    return key


_BLOCK_TENSOR = re.compile(r"blk\.\d{1,6}\.(attn_k|attn_v|attn_qkv|attn_kv_a_mqa)\.weight")


def _gguf_cache(tensors: Mapping[str, GgufTensor], key: Any, heads: int, hidden: int, layers: int) -> tuple[int, int, str]:
    """Elements of keys and of values per token over all layers, by the tensors, which can't lie here; and what is not known."""
    sums = {"attn_k": 0, "attn_v": 0, "attn_qkv": 0, "attn_kv_a_mqa": 0}
    for name, tensor in tensors.items():
        match = _BLOCK_TENSOR.fullmatch(name)
        if match:
            sums[match[1]] += 1 if match[1] == "attn_qkv" else tensor.shape[-1]
    if sums["attn_kv_a_mqa"]:  # latent attention: the compressed keys, whose first part is the values
        return sums["attn_kv_a_mqa"], key("attention.kv_lora_rank") * layers, ""
    if sums["attn_k"]:
        return sums["attn_k"], sums["attn_v"] or sums["attn_k"], ""
    head_dim = key("attention.key_length") or (hidden // heads if heads else 0)
    if sums["attn_qkv"] and head_dim:
        each = (key("attention.head_count_kv") or heads) * head_dim * sums["attn_qkv"]
        return each, each, ""
    if key("ssm.state_size") or key("wkv.head_size"):
        return 0, 0, ""
    return 0, 0, "the file does not show the size of its attention cache"

"""Do the tensors fit config.json? For the Llama family, whose layout this product also writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from modules.detect.draft import integer
from modules.detect.safetensors_header import Tensor, shown
from modules.errors import CorruptModel

LLAMA_FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_FLOATS = frozenset("F64 F32 F16 BF16 F8_E4M3 F8_E5M2".split())
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_HINT = "The folder mixes files of two models or a file is damaged: fetch the model again."


def check_llama_shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise CorruptModel at the first tensor that is missing or whose shape config.json contradicts.

    Quantized layers are checked by `quantized.check_gptq`; here their plain weight may be absent.
    """
    sizes = _Sizes.read(config)
    if sizes is None:
        return
    base = "model." if "model.embed_tokens.weight" in tensors else ""
    for name, expected in sizes.expected(base):
        tensor = tensors.get(name)
        if tensor is None:
            if name == "lm_head.weight" and (sizes.tied or not base):
                continue  # a tied head is the embedding; a bare LlamaModel has none, and its loader says so
            if _is_packed(name, tensors):
                continue
            raise CorruptModel(f"Tensor {name} is missing from the weights.", hint=_HINT)
        if tensor.shape != expected and not _is_packed(name, tensors):
            raise CorruptModel(
                f"Tensor {name} is {_by(tensor.shape)}, but config.json says {_by(expected)}.",
                hint=_HINT,
            )
        if "quantization_config" not in config and tensor.dtype not in _FLOATS and not _is_packed(name, tensors):
            raise CorruptModel(f"Tensor {name} holds {tensor.dtype} numbers, not floating-point weights.", hint=_HINT)
    extra = max((int(match[1]) for name in tensors if (match := _LAYER.match(name)) and len(match[1]) < 8), default=-1)
    if extra >= sizes.layers:
        raise CorruptModel(
            f"The weights hold {extra + 1} layers, but config.json says num_hidden_layers is {sizes.layers}.", hint=_HINT
        )


class _Sizes:
    def __init__(self, values: dict[str, int], tied: bool, norms: bool) -> None:
        self.vocab = values["vocab_size"]
        self.hidden = values["hidden_size"]
        self.ffn = values["intermediate_size"]
        self.layers = values["num_hidden_layers"]
        self.heads = values["num_attention_heads"]
        self.kv_heads = values["num_key_value_heads"]
        self.head_dim = values["head_dim"]
        self.tied = tied
        self.norms = norms

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Sizes | None:
        """None when a size is missing: then another architecture's rules apply and its library will judge."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        values: dict[str, int] = {}
        for name in names:
            value = config.get(name)
            if value is None:
                return None
            checked = integer(value, maximum=10_000 if name == "num_hidden_layers" else 2**31)
            if checked is None:
                raise CorruptModel(f"config.json: {name} is {shown(str(value))}.", hint="Fetch config.json again.")
            values[name] = checked
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        values["num_key_value_heads"] = integer(config.get("num_key_value_heads")) or heads
        head_dim = integer(config.get("head_dim"))
        if head_dim is None and hidden % heads:
            raise CorruptModel(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.",
                hint="Fetch config.json again.",
            )
        values["head_dim"] = head_dim or hidden // heads
        # transformers writes only what differs from the class's default, and these classes don't tie by default.
        return cls(values, config.get("tie_word_embeddings") is True, config.get("model_type") == "qwen3")

    def expected(self, base: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, query, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield f"{base}embed_tokens.weight", (self.vocab, hidden)
        for number in range(self.layers):
            layer = f"{base}layers.{number}."
            yield f"{layer}self_attn.q_proj.weight", (query, hidden)
            yield f"{layer}self_attn.k_proj.weight", (kv, hidden)
            yield f"{layer}self_attn.v_proj.weight", (kv, hidden)
            yield f"{layer}self_attn.o_proj.weight", (hidden, query)
            yield f"{layer}mlp.gate_proj.weight", (self.ffn, hidden)
            yield f"{layer}mlp.up_proj.weight", (self.ffn, hidden)
            yield f"{layer}mlp.down_proj.weight", (hidden, self.ffn)
            yield f"{layer}input_layernorm.weight", (hidden,)
            yield f"{layer}post_attention_layernorm.weight", (hidden,)
            if self.norms:
                yield f"{layer}self_attn.q_norm.weight", (self.head_dim,)
                yield f"{layer}self_attn.k_norm.weight", (self.head_dim,)
        yield f"{base}norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)


def _is_packed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    stem = name.removesuffix(".weight")
    return any(f"{stem}.{kind}" in tensors for kind in ("qweight", "q_weight", "trellis", "weight.absmax", "SCB"))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape) or "a single number"

"""OPT and Galactica as FlexGen stores them: the shape from config.json, and every tensor's name, shape and source.

FlexGen (Sheng et al. 2023, arXiv:2303.06865) keeps a model as one NumPy array per tensor, in a file named after the tensor. The
names are those of Hugging Face's OPTForCausalLM without "model.", and the decoder's last norm is called "decoder.layer_norm".
Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from modules.detect.draft import integer
from modules.errors import CorruptModel, IncompatibleModel

OFFSET = 2  # OPT's table of positions has two rows before the first position
_ACTIVATIONS = ("relu", "gelu")
_OTHERS = "Load it with Transformers, or its GGUF form with llama.cpp."


@dataclass(frozen=True, slots=True)
class OptShape:
    """Sizes of an OPT. `bias` and `affine`: whether it has linear biases and norm weights (Galactica may lack them)."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    positions: int
    vocab: int
    activation: str = "relu"
    bias: bool = True
    affine: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """FlexGen's name -> shape, in the order the model uses them."""
        h, f = self.hidden, self.ffn
        found: dict[str, tuple[int, ...]] = {
            "decoder.embed_tokens.weight": (self.vocab, h),
            "decoder.embed_positions.weight": (self.positions + OFFSET, h),
        }
        for number in range(self.layers):
            layer = f"decoder.layers.{number}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= {f"{layer}.self_attn.{name}.weight": (h, h), f"{layer}.self_attn.{name}.bias": (h,)}
            found |= {f"{layer}.self_attn_layer_norm.weight": (h,), f"{layer}.self_attn_layer_norm.bias": (h,)}
            found |= {f"{layer}.fc1.weight": (f, h), f"{layer}.fc1.bias": (f,)}
            found |= {f"{layer}.fc2.weight": (h, f), f"{layer}.fc2.bias": (h,)}
            found |= {f"{layer}.final_layer_norm.weight": (h,), f"{layer}.final_layer_norm.bias": (h,)}
        return found | {"decoder.layer_norm.weight": (h,), "decoder.layer_norm.bias": (h,)}

    def default(self, name: str) -> float | None:
        """What fills a tensor that this model has none of: 0 for a bias, 1 for a norm's weight; None for one it must have."""
        norm = "layer_norm." in name
        if norm and not self.affine:
            return 1.0 if name.endswith(".weight") else 0.0
        if name.endswith(".bias") and not norm and not self.bias:
            return 0.0
        return None


def opt_shape(config: dict[str, Any]) -> OptShape:
    """The shape that a checked config.json describes. Raises IncompatibleModel for what FlexGen can't compute, CorruptModel."""
    kind = config.get("model_type")
    if kind != "opt":
        found = kind or "of an unknown architecture"
        raise IncompatibleModel(f"FlexGen runs OPT and Galactica models; this is {found}.", hint=_OTHERS)
    sizes: dict[str, int] = {}
    keys = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "ffn_dim",
        "positions": "max_position_embeddings",
        "vocab": "vocab_size",
    }
    for name, key in keys.items():
        value = integer(config.get(key), maximum=2**31)
        if value is None:
            raise CorruptModel(f"config.json has no usable {key}.", hint="Fetch config.json again.")
        sizes[name] = value
    if sizes["hidden"] % sizes["heads"]:
        raise CorruptModel("config.json: hidden_size is no multiple of num_attention_heads.", hint="Fetch config.json again.")
    if config.get("word_embed_proj_dim", sizes["hidden"]) != sizes["hidden"] or config.get("do_layer_norm_before") is False:
        raise IncompatibleModel("This OPT (such as opt-350m) has a layout that FlexGen can't compute.", hint=_OTHERS)
    if config.get("_remove_final_layer_norm") or config.get("tie_word_embeddings") is False:
        raise IncompatibleModel("FlexGen computes with OPT's last norm and tied embeddings; this model lacks one.", hint=_OTHERS)
    activation = str(config.get("activation_function", "relu"))
    if activation not in _ACTIVATIONS:
        raise IncompatibleModel(f"FlexGen can't compute the activation {activation!r}.", hint=_OTHERS)
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    return OptShape(**sizes, activation=activation, bias=bool(bias), affine=bool(affine))


def source_name(name: str, available: Collection[str]) -> str | None:
    """The Hugging Face name that holds FlexGen's tensor `name`, in any of the spellings OPT checkpoints use; None: not there."""
    plain = name.replace("decoder.layer_norm.", "decoder.final_layer_norm.")
    for candidate in (f"model.{plain}", plain, f"model.{name}", name, plain.removeprefix("decoder.")):
        if candidate in available:
            return candidate
    return None

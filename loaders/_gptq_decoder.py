"""Runs Llama-like models on packed layers as a whole, in C (_gptq_decoder.c): one call for a step instead of some hundred.

`match` says whether a Transformers model is of that kind, from its module tree; `disagreement` compares one short run with the
model's own forward before the decoder is trusted. Everything else about the model (embeddings through `get_decoder`, beam search)
goes on through Transformers, on the same packed layers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loaders._gptq_build import kernel
from loaders._gptq_cpu import PackedLinear
from loaders._hf_generate import HfRunner

if TYPE_CHECKING:
    from loaders._hf_load import Loaded

_BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_ROPES = ("default", "linear", "llama3", "yarn")  # frequencies that don't change with the length
_MOST_DIM = 256
# Rounded activations let last bits grow; a wrong rotation or order of heads is off by about 1.
_AGREES = 0.05
_STEP = 16
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in (*_PROJECTIONS, "norm1", "norm2", "keys", "values"))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "ffn", "capacity", "exact")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("layer", "norm", "head", "cosines", "sines")),
    )


def match(model: Any) -> str | None:
    """Why the decoder can't run this model, or None."""
    body = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or any(type(layer).__name__ not in _BLOCKS for layer in layers):
        return "its blocks are not Llama's"
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if str(getattr(config, "hidden_act", "")) != "silu":
        return f"its activation is {config.hidden_act}"
    if getattr(body.rotary_emb, "rope_type", "default") not in _ROPES:
        return "its rotary positions change with the length"
    for layer in layers:
        if not all(isinstance(part, PackedLinear) for part in _parts(layer)):
            return "not all of its layers are packed"
    dim = _parts(layers[0])[0].out_features // config.num_attention_heads
    if dim % 16 or dim > _MOST_DIM or config.hidden_size % 8 or config.intermediate_size % 8:
        return "its sizes do not fill vectors"
    return None


def _parts(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class Decoder:
    """The model's layers as the C code sees them, with the keys and values of one sequence."""

    def __init__(self, model: Any, context: int) -> None:
        built = kernel()
        assert built.library is not None, built.problem
        self._library = built.library
        self._model = model
        self._context = context
        body, config = model.model, model.config
        self.count, self.heads, self.kv_heads = len(body.layers), config.num_attention_heads, config.num_key_value_heads
        first = _parts(body.layers[0])
        self.dim = first[0].out_features // self.heads
        self._layers = (_Layer * self.count)()
        self._kept: list[Any] = []  # what the structures point to
        for item, layer in zip(self._layers, body.layers, strict=True):
            for name, part in zip(_PROJECTIONS, _parts(layer), strict=True):
                setattr(item, name, ctypes.addressof(part.weights))
            item.norm1 = self._floats(layer.input_layernorm.weight)
            item.norm2 = self._floats(layer.post_attention_layernorm.weight)
        self._head = model.lm_head if isinstance(model.lm_head, PackedLinear) else None
        self._c = _Model(self.count, config.hidden_size, self.heads, self.kv_heads, self.dim, config.intermediate_size)
        self._c.exact = int(first[0].exact)
        self._c.eps, self._c.scale = config.rms_norm_eps, body.layers[0].self_attn.scaling
        self._c.layer = ctypes.addressof(self._layers)
        self._c.norm = self._floats(body.norm.weight)
        self._c.head = ctypes.addressof(self._head.weights) if self._head is not None else None
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def _floats(self, tensor: Tensor) -> int:
        held = tensor.detach().float().contiguous()
        self._kept.append(held)
        return int(held.data_ptr())

    def step(self, ids: list[int], keep: int) -> Tensor:
        """Logits float32 [keep, vocabulary] of the last `keep` of `ids`, which follow what was computed before."""
        self._reserve(self.length + len(ids))
        embedded = self._model.get_input_embeddings()(torch.tensor(ids)).float().contiguous()
        width = self._model.lm_head.out_features if self._head is not None else self._c.hidden
        out = torch.empty((keep, width))
        if self._library.gptq_step(ctypes.byref(self._c), embedded.data_ptr(), len(ids), self.length, keep, out.data_ptr()):
            raise MemoryError("not enough memory for a step of the model")
        self.length += len(ids)
        return out if self._head is not None else self._model.lm_head(out)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def _reserve(self, length: int) -> None:
        """Room for `length` tokens; grows by half, one layer after another."""
        if length <= self._c.capacity:
            return
        wanted = min(max(length, self._c.capacity * 3 // 2, 256), max(self._context, length))
        capacity = ((wanted + _STEP - 1) // _STEP | 1) * _STEP
        for number, item in enumerate(self._layers):
            keys = torch.zeros((self.kv_heads, self.dim, capacity))
            values = torch.zeros((self.kv_heads, capacity, self.dim))
            if number in self._cache:
                old_keys, old_values = self._cache[number]
                keys[:, :, : self.length] = old_keys[:, :, : self.length]
                values[:, : self.length] = old_values[:, : self.length]
            self._cache[number] = keys, values
            item.keys, item.values = keys.data_ptr(), values.data_ptr()
        rotary = self._model.model.rotary_emb
        cosines, sines = rotary(torch.zeros(1), torch.arange(capacity)[None])
        self._positions = cosines[0].float().contiguous(), sines[0].float().contiguous()
        self._c.cosines, self._c.sines = (part.data_ptr() for part in self._positions)
        self._c.capacity = capacity


class _Prefix:
    """What `HfRunner` asks of a prefix cache, on a decoder's keys and values."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut down to what is shared with `prompt`; the number of tokens that need not be computed again."""
        shared = 0
        limit = min(len(self.ids), len(prompt) - 1)
        while shared < limit and self.ids[shared] == prompt[shared]:
            shared += 1
        self.cut(shared)
        return shared

    def reset(self) -> None:
        self.cut(0)

    def can_cut(self) -> bool:
        return True

    def cut(self, length: int) -> bool:
        """Forget what is behind the first `length` tokens."""
        del self.ids[length:]
        self.decoder.crop(length)
        return True


class DecoderRunner(HfRunner):
    """`HfRunner` with its steps taken by a `Decoder`."""

    def _new_prefix(self) -> _Prefix:
        return _Prefix(Decoder(self.model, self.info.context_length))

    def forward(self, prefix: Any, ids: list[int], keep: int, images: Any = None) -> Any:
        with torch.inference_mode():
            logits = prefix.decoder.step(ids, keep)
            prefix.ids.extend(ids)
            return logits[-1] if keep == 1 else logits


def make_runner(loaded: Loaded, prefill_chunk: int) -> HfRunner:
    """The decoder where it can run the model and agrees with it, else Transformers' forward; `info.engine` says which."""
    model, info = loaded.model, loaded.info
    problem = match(model)
    if problem is None:
        off = disagreement(model, info.context_length)
        if not off < _AGREES:  # NaN, too
            problem = f"the decoder's logits are off by {off:.3g}"
            print(f"gptq: {problem}", file=sys.stderr)
    if problem is None:
        info = replace(info, engine=f"{info.engine}; blocks run in C")
        return DecoderRunner(replace(loaded, info=info), prefill_chunk)
    if any(isinstance(part, PackedLinear) for part in model.modules()):
        info = replace(info, engine=f"{info.engine}; blocks run by Transformers ({problem})")
    return HfRunner(replace(loaded, info=info), prefill_chunk)


def disagreement(model: Any, context: int) -> float:
    """The largest difference between the decoder's logits and the model's own on a short run, over the largest logit."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = [(7 + 31 * i) % vocabulary for i in range(9)]
    decoder = Decoder(model, context)
    with torch.inference_mode():
        ours = torch.cat([decoder.step(ids[:8], 8), decoder.step(ids[8:], 1)])
        theirs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))

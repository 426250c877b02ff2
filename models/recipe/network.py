"""A small Llama in plain PyTorch: what the trainer trains, and how it is written as a Hugging Face folder.

The parameter names are those of ``transformers.LlamaForCausalLM``, so exporting is only a change of dtype.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of the network; every matrix dimension is a multiple of 128 and ``hidden``/``ffn`` of 256."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 768
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def rotary_tables(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each [context, head_dim], in the half-split layout of the Hugging Face Llama."""
    inverse = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x [batch, heads, tokens, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, hidden = x.shape
        dim, groups = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        q = self.q_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, hidden))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and final norm (``model.`` in the checkpoint)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)


class Network(nn.Module):
    """What the trainer asks of every architecture."""

    plain = re.compile("embed")  # names of matrices that AdamW trains, not Muon

    def forward(self, ids: Tensor, document: Tensor | None = None, where: Tensor | None = None,
                streams: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        """Logits [batch, tokens, vocab] of token ids [batch, tokens]; of the tokens ``where`` (a mask) alone: [n, vocab].

        ``document`` [batch, tokens] numbers the documents packed into a row; tokens see only their own document.
        The residual stream [batch, tokens, hidden] after each layer is appended to ``streams``.
        """
        raise NotImplementedError

    def start_from(self, teacher: Llama) -> None:
        """Take over the parts of a trained Llama that have a counterpart here; sizes must agree."""
        self.load_state_dict(teacher.state_dict())

    def config(self) -> dict[str, object]:
        """The content of config.json, without the special tokens."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model file."""
        return {name: p.detach().to(torch.float16).contiguous() for name, p in self.named_parameters()}

    def save(self, folder: Path, eos: list[int], bos: int, pad: int) -> None:
        """Write config.json, generation_config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
        special = {"bos_token_id": bos, "eos_token_id": eos[0], "pad_token_id": pad}
        generation = {
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "max_new_tokens": 400,
        }
        for name, content in (("config.json", self.config() | special), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class Llama(Network):
    """Llama with an output matrix tied to the embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Output matrices start smaller, so that the residual stream does not grow with depth (GPT-2).
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def forward(self, ids: Tensor, document: Tensor | None = None, where: Tensor | None = None,
                streams: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        tokens = ids.shape[1]
        # Rotary embeddings depend on distances alone, so positions need not start again with each document.
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        mask = None
        if document is not None:
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
            mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
            if streams is not None:
                streams.append(x)
        x = x if where is None else x[where]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def config(self) -> dict[str, object]:
        shape = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.context,
            "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        }


def load_folder(folder: Path) -> Llama:
    """The network of a folder written by :meth:`Llama.save`, computing in float32."""
    c = json.loads((folder / "config.json").read_text())
    shape = LlamaShape(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                       c["num_key_value_heads"], c["intermediate_size"], c["max_position_embeddings"],
                       c["rope_theta"], c["rms_norm_eps"])  # fmt: skip
    network = Llama(shape)
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network

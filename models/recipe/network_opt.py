"""A small OPT (Zhang et al. 2022) in plain PyTorch: pre-norm, learned positions, ReLU, biases everywhere, tied head.

The parameter names are those of ``transformers.OPTForCausalLM``. It takes what it can from a trained :class:`Llama` of
the same width: embedding, attention matrices, norms and the directions that the feed-forward part looks at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from network import Llama, Network
from safetensors.torch import load_file
from torch import Tensor, nn

OFFSET = 2  # OPT's position table has two rows before the first position


@dataclass(frozen=True)
class OPTShape:
    """Sizes of the network; all are multiples of 256 but the table of positions (context + 2)."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    ffn: int = 1024
    context: int = 1024

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Attention(nn.Module):
    """Causal self-attention with biases."""

    def __init__(self, shape: OPTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(shape.hidden, shape.hidden) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = (m(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, hidden))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: OPTShape) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.final_layer_norm = nn.LayerNorm(shape.hidden)
        self.fc1, self.fc2 = nn.Linear(shape.hidden, shape.ffn), nn.Linear(shape.ffn, shape.hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class Decoder(nn.Module):
    """Embeddings, layers and final norm (``model.decoder.`` in the checkpoint)."""

    def __init__(self, shape: OPTShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.embed_positions = nn.Embedding(shape.context + OFFSET, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_layer_norm = nn.LayerNorm(shape.hidden)


class OPT(Network):
    """OPT with an output matrix tied to the embedding."""

    def __init__(self, shape: OPTShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.decoder = Decoder(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # Sine waves (Vaswani et al. 2017), small beside the tokens: neighbours are alike from the first step on.
        rates = 10000.0 ** -(torch.arange(0, shape.hidden, 2) / shape.hidden)
        angles = torch.outer(torch.arange(shape.context + OFFSET), rates)
        with torch.no_grad():
            self.model.decoder.embed_positions.weight.copy_(0.03 * torch.cat([angles.sin(), angles.cos()], dim=1))

    def forward(self, ids: Tensor, document: Tensor | None = None, where: Tensor | None = None,
                streams: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        # Positions start again with each document. What ``streams`` gets is without the position embedding: a network
        # with rotary positions has no counterpart of it.
        decoder, tokens = self.model.decoder, ids.shape[1]
        if document is None:
            mask, place = None, torch.arange(tokens).expand_as(ids)
        else:
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
            mask, place = ((document[:, :, None] == document[:, None, :]) & causal)[:, None], places(document)
        position = decoder.embed_positions(place + OFFSET)
        x = decoder.embed_tokens(ids) + position
        for layer in decoder.layers:
            x = layer(x, mask)
            if streams is not None:
                streams.append(x - position)
        x = x if where is None else x[where]
        return F.linear(decoder.final_layer_norm(x), decoder.embed_tokens.weight)

    @torch.no_grad()
    def start_from(self, teacher: Llama) -> None:
        decoder, groups = self.model.decoder, teacher.shape.heads // teacher.shape.kv_heads
        decoder.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight)
        decoder.final_layer_norm.weight.copy_(teacher.model.norm.weight)
        for layer, source in zip(decoder.layers, teacher.model.layers, strict=True):
            layer.self_attn_layer_norm.weight.copy_(source.input_layernorm.weight)
            layer.final_layer_norm.weight.copy_(source.post_attention_layernorm.weight)
            layer.self_attn.q_proj.weight.copy_(source.self_attn.q_proj.weight)
            layer.self_attn.out_proj.weight.copy_(source.self_attn.o_proj.weight)
            for mine, theirs in (
                (layer.self_attn.k_proj, source.self_attn.k_proj),
                (layer.self_attn.v_proj, source.self_attn.v_proj),
            ):
                heads = theirs.weight.view(teacher.shape.kv_heads, -1, self.shape.hidden).repeat_interleave(groups, dim=0)
                mine.weight.copy_(heads.reshape_as(mine.weight))
            rows = source.mlp.gate_proj.weight[: self.shape.ffn]
            layer.fc1.weight[: len(rows)].copy_(rows)

    def config(self) -> dict[str, object]:
        shape = self.shape
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "word_embed_proj_dim": shape.hidden,
            "ffn_dim": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.context,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            "init_std": 0.02,
            "_remove_final_layer_norm": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        }


def places(document: Tensor) -> Tensor:
    """Position of each token in its document: int64 [batch, tokens], from 0."""
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def load_folder(folder: Path) -> OPT:
    """The network of a folder written by :meth:`OPT.save`, computing in float32."""
    c = json.loads((folder / "config.json").read_text())
    network = OPT(OPTShape(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["ffn_dim"],
                           c["max_position_embeddings"]))  # fmt: skip
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network

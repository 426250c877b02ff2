"""A small RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456) for training on a CPU.

The parameter names and shapes are those of the model files that the ``rwkv`` package reads, and the forward pass gives
what the package's gives. The recurrence itself runs in ``wkv7.c``, which is compiled with the system's C compiler.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from network import Llama, Network
from safetensors.torch import load_file
from torch import Tensor, nn

HEAD = 64  # channels of a head, fixed by wkv7.c
CHUNK = 16  # as in wkv7.c
DECAY = 0.606531  # exp(-1/2) as the package writes it: the fastest decay of a token is exp(-DECAY)


@dataclass(frozen=True)
class RWKVShape:
    """Sizes of the network. The ``*_rank`` are those of the low-rank parts of decay, rate, value mix and gate."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    ffn: int = 896
    context: int = 1024
    decay_rank: int = 32
    rate_rank: int = 32
    value_rank: int = 16
    gate_rank: int = 64


@cache
def kernel() -> ctypes.CDLL:
    """The compiled ``wkv7.c``; calls release the interpreter lock."""
    source = Path(__file__).with_name("wkv7.c")
    library = Path(tempfile.mkdtemp(prefix="wkv7-")) / "wkv7.so"
    command = [
        os.environ.get("CC", "cc"),
        "-O3",
        "-march=native",
        "-ffast-math",
        "-shared",
        "-fPIC",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


class WKV7(torch.autograd.Function):
    """The recurrence over rows of packed documents: r, w, k, v, a, b float32 [batch, tokens, heads, 64] to y, likewise.

    ``begins`` uint8 [batch, tokens] is 1 where a document begins; the state is zero there.
    """

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, begins):  # type: ignore[no-untyped-def]
        batch, tokens, heads, _ = r.shape
        inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
        y = torch.empty_like(inputs[0])
        kept = torch.empty(batch, heads, -(-tokens // CHUNK), HEAD, HEAD)
        kernel().wkv7_forward(batch, tokens, heads, *pointers(*inputs, begins, y, kept))
        ctx.save_for_backward(*inputs, begins, kept)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        *inputs, begins, kept = ctx.saved_tensors
        batch, tokens, heads, _ = dy.shape
        dy = dy.contiguous()
        gradients = [torch.empty_like(dy) for _ in inputs]
        if kernel().wkv7_backward(batch, tokens, heads, *pointers(*inputs, begins, kept, dy, *gradients)):
            raise MemoryError("no memory for the backward pass of wkv7")
        return (*gradients, None)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, begins: Tensor) -> Tensor:
    """The recurrence in plain PyTorch, token by token: what :class:`WKV7` is checked against."""
    state = torch.zeros(r.shape[0], r.shape[2], HEAD, HEAD, dtype=r.dtype)
    outputs = []
    for t in range(r.shape[1]):
        state = state * (1 - begins[:, t, None, None, None].to(r.dtype))
        seen = state @ a[:, t, :, :, None]
        state = state * w[:, t, :, None, :] + seen @ b[:, t, :, None, :] + v[:, t, :, :, None] @ k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1)


def shifted(x: Tensor, begins: Tensor) -> Tensor:
    """The token before each one, minus the token; nothing comes before the first of a document."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1] * (1 - begins[..., None].to(x.dtype)) - x


def ramp(shape: RWKVShape, power: float) -> Tensor:
    """How much of the token before goes into each channel at first: from all to none, over [1, 1, hidden]."""
    return (1 - (torch.arange(shape.hidden) / shape.hidden) ** power).view(1, 1, -1)


class TimeMix(nn.Module):
    """``att`` of a block."""

    def __init__(self, shape: RWKVShape, layer: int) -> None:
        super().__init__()
        self.layer, hidden = layer, shape.hidden
        depth, rest = layer / max(1, shape.layers - 1), 1 - layer / shape.layers
        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            self.register_parameter(f"x_{name}", nn.Parameter(ramp(shape, power * rest)))
        place = torch.arange(hidden) / (hidden - 1)
        base = {"w": -5.5 + 6 * place ** (1 + depth**0.3), "a": torch.zeros(hidden), "v": torch.full((hidden,), 0.5), "g": None}
        ranks = {"w": shape.decay_rank, "a": shape.rate_rank, "v": shape.value_rank, "g": shape.gate_rank}
        for name, rank in ranks.items():
            if name == "v" and not layer:
                continue  # the first layer's values are what the later ones mix in
            if base[name] is not None:
                self.register_parameter(f"{name}0", nn.Parameter(base[name].view(1, 1, -1).clone()))
            down, up = torch.zeros(hidden, rank), torch.empty(rank, hidden)
            nn.init.orthogonal_(up, gain=0.1 * (hidden / rank) ** 0.5)
            if name == "g":
                nn.init.normal_(down, std=0.05)  # without a bias a gate of zero would let nothing through
            self.register_parameter(f"{name}1", nn.Parameter(down))
            self.register_parameter(f"{name}2", nn.Parameter(up))
        self.k_k = nn.Parameter(torch.full((1, 1, hidden), 0.85))
        self.k_a = nn.Parameter(torch.ones(1, 1, hidden))
        self.r_k = nn.Parameter(torch.zeros(hidden // HEAD, HEAD))
        self.receptance, self.key, self.value, self.output = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(hidden // HEAD, hidden, eps=64e-5)

    def forward(self, x: Tensor, begins: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output, and the values of the first layer."""
        batch, tokens, hidden = x.shape
        before = shifted(x, begins)

        def mixed(name: str) -> Tensor:
            return torch.addcmul(x, before, getattr(self, f"x_{name}"))

        xv, xa = mixed("v"), mixed("a")
        r, k, v = self.receptance(mixed("r")), self.key(mixed("k")), self.value(xv)
        w = torch.exp(-DECAY * torch.sigmoid(self.w0 + torch.tanh(mixed("w") @ self.w1) @ self.w2))
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(mixed("g") @ self.g1) @ self.g2
        heads = (batch, tokens, hidden // HEAD, HEAD)
        kk = F.normalize((k * self.k_k).view(heads), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        r, k, v = r.view(heads), k.view(heads), v.view(heads)
        y = WKV7.apply(r, w.view(heads), k, v, -kk, kk * a.view(heads), begins)
        y = self.ln_x(y.reshape(batch * tokens, hidden)).view(heads)
        y = y + (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        return self.output(y.view(batch, tokens, hidden) * g), first


class ChannelMix(nn.Module):
    """``ffn`` of a block: squared ReLU (So et al. 2021) after a token shift."""

    def __init__(self, shape: RWKVShape, layer: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(ramp(shape, (1 - layer / shape.layers) ** 4))
        self.key = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.value = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:
        return self.value(F.relu(self.key(torch.addcmul(x, shifted(x, begins), self.x_k))).square())


class Block(nn.Module):
    """One pre-norm layer; the first one also has the norm of the embedding."""

    def __init__(self, shape: RWKVShape, layer: int) -> None:
        super().__init__()
        if not layer:
            self.ln0 = nn.LayerNorm(shape.hidden)
        self.ln1, self.ln2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.att, self.ffn = TimeMix(shape, layer), ChannelMix(shape, layer)


class RWKV(Network):
    """RWKV-7 with a separate output matrix."""

    plain = re.compile(r"emb|head|att\.[wavg][12]$|r_k")

    def __init__(self, shape: RWKVShape) -> None:
        super().__init__()
        self.shape = shape
        self.emb = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.ln_out = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("receptance.weight", "key.weight", "value.weight", "output.weight", "emb.weight", "head.weight")):
                last = name.endswith(("output.weight", "ffn.value.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    def forward(self, ids: Tensor, document: Tensor | None = None, where: Tensor | None = None,
                streams: list[Tensor] | None = None) -> Tensor:  # fmt: skip
        begins = torch.zeros(ids.shape, dtype=torch.uint8)
        begins[:, 0] = 1
        if document is not None:
            begins[:, 1:] = document[:, 1:] != document[:, :-1]
        x, first = self.blocks[0].ln0(self.emb(ids)), None
        for block in self.blocks:
            change, first = block.att(block.ln1(x), begins, first)
            x = x + change
            x = x + block.ffn(block.ln2(x), begins)
            if streams is not None:
                streams.append(x)
        x = x if where is None else x[where]
        return self.head(self.ln_out(x))

    @torch.no_grad()
    def start_from(self, teacher: Llama) -> None:
        embedding, groups = teacher.model.embed_tokens.weight, teacher.shape.heads // teacher.shape.kv_heads
        self.emb.weight.copy_(embedding)
        self.blocks[0].ln0.weight.fill_(float(embedding.square().mean().sqrt()))  # the scale of the teacher's stream
        self.head.weight.copy_(embedding)
        self.ln_out.weight.copy_(teacher.model.norm.weight)
        for block, source in zip(self.blocks, teacher.model.layers, strict=True):
            block.ln1.weight.copy_(source.input_layernorm.weight)
            block.ln2.weight.copy_(source.post_attention_layernorm.weight)
            block.att.receptance.weight.copy_(source.self_attn.q_proj.weight)
            block.att.output.weight.copy_(source.self_attn.o_proj.weight)
            for mine, theirs in ((block.att.key, source.self_attn.k_proj), (block.att.value, source.self_attn.v_proj)):
                heads = theirs.weight.view(teacher.shape.kv_heads, -1, self.shape.hidden).repeat_interleave(groups, dim=0)
                mine.weight.copy_(heads.reshape_as(mine.weight))
            block.att.ln_x.weight.fill_(0.3)  # attention gives a mean of values, smaller than one value
            rows = source.mlp.gate_proj.weight[: self.shape.ffn]
            block.ffn.key.weight[: len(rows)].copy_(rows)

    def config(self) -> dict[str, object]:
        shape = self.shape
        return {
            "architectures": ["RwkvForCausalLM"],
            "model_type": "rwkv7",
            "rwkv_version": "7",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "head_dim": HEAD,
            "decay_low_rank_dim": shape.decay_rank,
            "a_low_rank_dim": shape.rate_rank,
            "v_low_rank_dim": shape.value_rank,
            "gate_low_rank_dim": shape.gate_rank,
            "max_position_embeddings": shape.context,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }


def load_folder(folder: Path) -> RWKV:
    """The network of a folder written by :meth:`RWKV.save`, computing in float32."""
    c = json.loads((folder / "config.json").read_text())
    network = RWKV(RWKVShape(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"],
                             c["max_position_embeddings"], c["decay_low_rank_dim"], c["a_low_rank_dim"],
                             c["v_low_rank_dim"], c["gate_low_rank_dim"]))  # fmt: skip
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network

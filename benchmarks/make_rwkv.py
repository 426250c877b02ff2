"""Make a random RWKV-7 with the bundled tokenizer, to measure with: `make_rwkv.py FOLDER [LAYERS HIDDEN]`; 129 M parameters.

Runs in the RWKV environment. Every matrix is random, so what it says is noise; its shapes are those of a real model.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

LAYERS, HIDDEN = (int(word) for word in (sys.argv[2:4] or (12, 896)))
VOCAB, SIDE = 4096, 64
RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}
BUNDLED = Path(__file__).resolve().parent.parent / "models" / "wren-rwkv-7m"


def main() -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape) * shape[-1] ** -0.5

    tensors = {"emb.weight": random(VOCAB, HIDDEN), "head.weight": random(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        part = {f"att.{name}.weight": random(HIDDEN, HIDDEN) for name in ("receptance", "key", "value", "output")}
        part |= {"ffn.key.weight": random(4 * HIDDEN, HIDDEN), "ffn.value.weight": random(HIDDEN, 4 * HIDDEN)}
        part |= {f"att.x_{name}": torch.rand(1, 1, HIDDEN) for name in "rwkvag"} | {"ffn.x_k": torch.rand(1, 1, HIDDEN)}
        for name, rank in RANKS.items():
            part |= {f"att.{name}1": random(HIDDEN, rank), f"att.{name}2": random(rank, HIDDEN)}
            if name != "g":
                part[f"att.{name}0"] = torch.zeros(1, 1, HIDDEN)
        part |= {name: torch.ones(1, 1, HIDDEN) for name in ("att.k_k", "att.k_a")} | {"att.r_k": random(HIDDEN // SIDE, SIDE)}
        norms = ["ln1", "ln2", "att.ln_x"] + ([] if layer else ["ln0"])
        part |= {f"{n}.weight": torch.ones(HIDDEN) for n in norms} | {f"{n}.bias": torch.zeros(HIDDEN) for n in norms}
        tensors |= {f"blocks.{layer}.{name}": value for name, value in part.items()}
    tensors |= {"ln_out.weight": torch.ones(HIDDEN), "ln_out.bias": torch.zeros(HIDDEN)}
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(torch.float16) for name, value in tensors.items()}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder / name)


if __name__ == "__main__":
    main()

"""Checks of the recipe's networks that need torch: `python recipe_lab.py opt|rwkv`, in the transformers or the rwkv environment.

Prints one JSON object of differences. Small networks of random weights; the bundled weights are not needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models" / "recipe"))


def packed(torch: Any) -> tuple[Any, Any]:
    """Token ids [2, 40] and the numbers of two documents in each row, the second from token 17 and 25 on."""
    document = torch.zeros(2, 40, dtype=torch.long)
    document[0, 17:] = document[1, 25:] = 1
    return torch.randint(0, 64, (2, 40)), document


def opt() -> dict[str, float]:
    import torch
    from network import Llama, LlamaShape
    from network_opt import OPT, OPTShape
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = OPT(OPTShape(vocab=64, hidden=32, layers=2, heads=2, ffn=64, context=64))
    network.start_from(Llama(LlamaShape(vocab=64, hidden=32, layers=2, heads=2, kv_heads=1, ffn=48, context=64)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids, document = packed(torch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network.half().float().save(Path(folder), [2, 0], 0, 3)
        library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        alone = network(ids[:1, 17:])
        return {
            "library": float((library(ids).logits - network(ids)).abs().max()),
            "packed": float((network(ids, document)[:1, 17:] - alone).abs().max()),
        }


def rwkv() -> dict[str, float]:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "PYTORCH_JIT": "0"}
    import torch
    from network import Llama, LlamaShape
    from network_rwkv import HEAD, RWKV, WKV7, RWKVShape, wkv7

    torch.manual_seed(0)
    # Two heads, with documents that begin at, just after and inside the kernel's chunks of 16 tokens.
    inputs = [torch.randn(2, 50, 2, HEAD) * 0.3 for _ in range(6)]
    inputs[1] = torch.rand(2, 50, 2, HEAD) * 0.4 + 0.6
    inputs[4] = -torch.nn.functional.normalize(inputs[4], dim=-1)
    inputs[5] = -inputs[4] * torch.rand(2, 50, 2, HEAD)
    begins = torch.zeros(2, 50, dtype=torch.uint8)
    for row, at in ((0, 0), (1, 0), (0, 17), (0, 40), (1, 32)):
        begins[row, at] = 1
    plain, fast = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected, found = wkv7(*plain, begins), WKV7.apply(*fast, begins)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    found.backward(gradient)
    result = {
        "forward": float((expected - found).abs().max()),
        "backward": max(float((a.grad - b.grad).abs().max()) for a, b in zip(plain, fast, strict=True)),
    }
    network = RWKV(RWKVShape(vocab=64, hidden=128, layers=3, ffn=96, decay_rank=8, rate_rank=8, value_rank=8, gate_rank=16))
    network.start_from(Llama(LlamaShape(vocab=64, hidden=128, layers=3, heads=2, kv_heads=1, ffn=64)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "ln" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ids, document = packed(torch)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network.half().float()
        torch.save({name: p.half() for name, p in network.named_parameters()}, Path(folder) / "model.pth")
        from rwkv.model import RWKV as Package

        package = Package(model=str(Path(folder) / "model"), strategy="cpu fp32")
        logits, _ = package.forward(ids[0].tolist(), None, True)
        result["package"] = float((logits - network(ids[:1])[0]).abs().max())
        result["packed"] = float((network(ids, document)[:1, 17:] - network(ids[:1, 17:])).abs().max())
    return result


if __name__ == "__main__":
    print(json.dumps({"opt": opt, "rwkv": rwkv}[sys.argv[1]]()))

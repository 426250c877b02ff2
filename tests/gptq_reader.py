"""Logits of GPTQ checkpoints by another library, for tests/unit/test_quantize_interop.py; run in that library's environment:

python tests/gptq_reader.py transformers|gptqmodel|autogptq IDS.json OUT_FOLDER CHECKPOINT...

Writes OUT_FOLDER/NAME.npy (float32 [tokens, vocabulary]) for each checkpoint and prints {name: the packed layers' class}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel refuses to start with fewer workers than it wants
os.environ["HF_HUB_OFFLINE"] = "1"


def by_transformers(path: str) -> Any:
    """transformers' own integration, which needs optimum and GPTQModel beside it."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")


def by_gptqmodel(path: str) -> Any:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(path, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def by_autogptq(path: str) -> Any:
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    loaded = AutoGPTQForCausalLM.from_quantized(
        path, device="cpu", use_triton=False, disable_exllama=True, disable_exllamav2=True, torch_dtype=torch.float16,
        use_safetensors=True, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    return loaded.model


READERS = {"transformers": by_transformers, "gptqmodel": by_gptqmodel, "autogptq": by_autogptq}


def main(library: str, ids: str, out: str, *paths: str) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    tokens = torch.tensor([json.loads(Path(ids).read_text(encoding="utf-8"))])
    classes = {}
    for path in paths:
        with contextlib.redirect_stdout(sys.stderr):
            model = READERS[library](path).eval()
            with torch.inference_mode():
                logits = model(tokens).logits[0].float().numpy()
        np.save(Path(out) / f"{Path(path).name}.npy", logits)
        found = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
        classes[Path(path).name] = dict(found)
    print(json.dumps(classes))


if __name__ == "__main__":
    main(*sys.argv[1:])

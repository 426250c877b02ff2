"""Checkpoints and our logits for tests/unit/test_quantize_interop.py, in the Transformers environment:

python tests/interop_lab.py FOLDER CASES.json-text     writes FOLDER/NAME (checkpoint), FOLDER/NAME.npy, FOLDER/ids.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models_lab as lab  # noqa: E402


def main(folder: str, cases: str) -> None:
    from transformers import LlamaConfig

    root = Path(folder)
    # wide enough for the kernels of all libraries
    config = LlamaConfig(**lab.configs()["llama"].to_dict() | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    lab.make_model(root / "base", config)
    ids = [number * 7 % 250 for number in range(40)]
    (root / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    for name, settings in json.loads(cases).items():
        lab.quantize(root / "base", root / name, **settings)
        with torch.inference_mode():
            logits = lab.run_checkpoint(root / name, "dense").model(torch.tensor([ids])).logits[0]
        np.save(root / f"{name}.npy", logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

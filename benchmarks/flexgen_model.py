"""A random OPT for benchmarks/flexgen.py, in the FlexGen environment: `python benchmarks/flexgen_model.py OUT HIDDEN LAYERS`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    out, hidden, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    source = ROOT / "models" / "wren-6m"
    vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
    )
    OPTForCausalLM(config).half().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, out / name)


if __name__ == "__main__":
    main()

"""A Llama of random weights in any shape, with a tokenizer that decodes every id: for speed measurements, not for talk.

Runs in the transformers environment: `<set>/transformers/bin/python benchmarks/make_model.py OUT --shape 1.1b`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    # hidden, layers, ffn, heads, KV heads, vocabulary, context
    "1.1b": (2048, 22, 5632, 32, 4, 32_000, 2048),
    "29m": (512, 8, 1536, 8, 4, 4096, 2048),
    "260k": (64, 5, 256, 8, 4, 4_096, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    arguments = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, ffn, heads, kv_heads, vocabulary, context = SHAPES[arguments.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=arguments.shape == "260k",
        dtype="bfloat16",
    )
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.out)

    source = ROOT / "models" / "wren-6m"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, arguments.out / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    used = {*vocab.values(), *(t["id"] for t in tokenizer["added_tokens"])}
    for token_id in range(vocabulary):
        if token_id not in used:
            vocab[f"\u0120w{token_id}"] = token_id  # "Ġ" is the space of byte-level BPE
    (arguments.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()

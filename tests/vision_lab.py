"""A tiny model that sees, with random weights, and what Transformers itself makes of two pictures. Runs in its environment.

    python tests/vision_lab.py FOLDER

FOLDER/red.png and FOLDER/blue.png are there; FOLDER/tiny-llava and FOLDER/expected.json are written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast as Fast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

COUNT = 12
TEMPLATE = """{%- for message in messages -%}
{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{% endif %}
{% endfor -%}
{%- if add_generation_prompt -%}assistant:{%- endif -%}"""
QUESTION = "What is it?"
# The messages of each case; "red" and "blue" are the pictures.
CASES: dict[str, list[str]] = {
    "red": ["red", QUESTION],
    "blue": ["blue", QUESTION],
    "both": [QUESTION, "blue", "red"],
    "none": [QUESTION],
}


def tokenizer() -> Any:
    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"image_token": "<image>"}
    return Fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=special)


def text_settings(words: Any) -> dict[str, Any]:
    """What the language models of the tiny vision models are made of, whatever their family."""
    return {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def asked(processor: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, the processor's tensors) of each case; its pictures are in `folder`."""
    for name, parts in CASES.items():
        pictures = [Image.open(folder / f"{part}.png") for part in parts if part != QUESTION]
        content = [{"type": "text", "text": part} if part == QUESTION else {"type": "image"} for part in parts]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        yield name, inputs


def make(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    words = tokenizer()
    text = LlamaConfig(**text_settings(words))
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)  # far from uniform: another picture, another text
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return model, processor


def main(folder: Path) -> None:
    model, processor = make(folder / "tiny-llava")
    expected = {}
    for name, inputs in asked(processor, folder):
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        expected[name] = {"ids": ids, "text": text, "prompt_tokens": int(inputs["input_ids"].shape[1])}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tiny vision models with random weights as llama.cpp takes them, and what Transformers makes of some pictures with the same
weights. Runs in the environment of Transformers.

    python tests/vision_gguf_lab.py FOLDER

FOLDER/red.png, blue.png (32 × 32) and wide.png (64 × 32) are there. FOLDER/models/seer gets a LLaVA, FOLDER/models/turner
a Qwen2-VL, whose wide image of 8 tokens takes 4 positions; FOLDER/expected.json holds the answers of both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    SiglipVisionConfig,
)
from transformers import Qwen2VLForConditionalGeneration as Qwen
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.vision_gguf import write_gemma, write_llava, write_qwen
from tests.vision_lab import QUESTION, TEMPLATE, asked, text_settings, tokenizer

COUNT, MARGIN = 6, 0.08
MARKS = {"start": "<|vision_start|>", "pad": "<|image_pad|>", "end": "<|vision_end|>", "video": "<|video_pad|>"}
WIDE: dict[str, list[str | None]] = {"first": [None, QUESTION], "later": ["Look: ", None, " and ", None, QUESTION]}


def llava(folder: Path) -> dict[str, Any]:
    words = tokenizer()
    torch.manual_seed(4)
    text = LlamaConfig(**text_settings(words))
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu_pytorch_tanh",  # llama.cpp's
        image_seq_length=16,
    )
    model = _random(LlavaForConditionalGeneration(config), 0.4)
    write_llava(folder / "models" / "seer", "tiny-llava", model, words, TEMPLATE)
    write_gemma(folder / "models" / "whole", "tiny-whole", model, words, TEMPLATE)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return {name: _answer(model, words, **inputs) for name, inputs in asked(processor, folder)}


def qwen(folder: Path) -> dict[str, Any]:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": list(MARKS.values())})
    ids = {name: words.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    model = _model(words, ids)
    template = TEMPLATE.replace("<image>", MARKS["start"] + MARKS["pad"] + MARKS["end"])
    write_qwen(folder / "models" / "turner", "tiny-qwen", model, words, template)
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 2048, "longest_edge": 65536})
    seen = processor(images=[Image.open(folder / "wide.png").convert("RGB")], return_tensors="pt")
    pads = int(seen["image_grid_thw"][0].prod()) // 4
    image = MARKS["start"] + MARKS["pad"] * pads + MARKS["end"]
    expected = {}
    for name, parts in WIDE.items():
        content, count = "".join(image if part is None else part for part in parts), parts.count(None)
        prompt = words(f"user: {content}assistant:", add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected[name] = _answer(
            model,
            words,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=(prompt == ids["pad"]).int(),
            pixel_values=seen["pixel_values"].repeat(count, 1),
            image_grid_thw=seen["image_grid_thw"].repeat(count, 1),
        )
    return expected


def _model(words: Any, ids: dict[str, int]) -> Any:
    torch.manual_seed(34)
    text = Qwen2VLTextConfig(
        **text_settings(words),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )
    vision = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=8)
    config = Qwen2VLConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=ids["pad"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        tie_word_embeddings=False,
    )
    return _random(Qwen(config), 0.4)


def _random(model: Any, spread: float) -> Any:
    """Weights far from uniform: another picture, another text."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=spread)
    return model.eval()


def _answer(model: Any, words: Any, **inputs: Any) -> dict[str, Any]:
    """Greedy text, the log-probabilities of its tokens, and the prompt's length."""
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False, output_logits=True, return_dict_in_generate=True)
    length = int(inputs["input_ids"].shape[1])
    told = made.sequences[0, length:].tolist()
    rows = [row[0].log_softmax(-1) for row in made.logits]
    logprobs = [float(row[token]) for row, token in zip(rows, told, strict=True)]
    best = torch.stack([row.topk(2).values for row in rows])
    margin = float((best[:, 0] - best[:, 1]).min())
    assert margin > MARGIN, f"the choice between two tokens is too close ({margin}): take another seed"
    if told[-1] == words.eos_token_id:  # an end that is no text
        logprobs.pop()
    return {"text": words.decode(told, skip_special_tokens=True), "logprobs": logprobs, "prompt_tokens": length}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    answers = {"llava": llava(root), "qwen": qwen(root)}
    (root / "expected.json").write_text(json.dumps(answers), encoding="utf-8")

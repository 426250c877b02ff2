"""What the library's converter does not know about tokenizers, decided from tokenizer.json alone (standard library only)."""

from __future__ import annotations

from typing import Any


def plain_byte_level(tokenizer: dict[str, Any]) -> str | None:
    """None when this is GPT-2's byte-level BPE exactly, which llama.cpp calls "gpt-2"; else what is different.

    The converter knows pre-tokenizers by a hash of one text's token ids, so it can't know a vocabulary of one's own. The
    pre-tokenizer itself is written out in tokenizer.json: GPT-2's is ByteLevel with its own pattern and nothing before it.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if model.get("byte_fallback") or model.get("ignore_merges"):
        return "its BPE has byte_fallback or ignore_merges"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its BPE has a {key}"
    if tokenizer.get("normalizer") is not None:
        return f"it normalizes text first ({tokenizer['normalizer'].get('type')})"
    steps = tokenizer.get("pre_tokenizer") or {}
    if steps.get("type") == "Sequence" and len(steps.get("pretokenizers") or ()) == 1:
        steps = steps["pretokenizers"][0]
    if steps.get("type") == "Sequence":
        return "it splits text by " + ", ".join(str(step.get("type")) for step in steps.get("pretokenizers") or ())
    if steps.get("type") != "ByteLevel":
        return f"it splits text by {steps.get('type')}"
    if steps.get("use_regex") is False:
        return "its ByteLevel step uses no pattern"
    if steps.get("add_prefix_space"):
        return "it adds a space before the text"
    return None


def merge_scores(tokenizer: dict[str, Any]) -> dict[str, float]:
    """Token -> score for llama.cpp's SentencePiece-style BPE, which merges the pair with the highest score first.

    The converter gives all tokens one score when there is only a tokenizer.json, so that llama.cpp merges from left to right and
    reads text as other tokens than the model was trained on. The order of the merges is the score SentencePiece would give.
    """
    scores: dict[str, float] = {}
    for rank, merge in enumerate((tokenizer.get("model") or {}).get("merges") or ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    return scores

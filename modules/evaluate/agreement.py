"""How far two greedy answers agree, and where they part."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

_WORDS = re.compile(r"\s+|[^\W_]+|[\W_]", re.UNICODE)


def agreement(reference: Sequence[int], other: Sequence[int]) -> dict[str, Any]:
    """Of two token lists: how many are equal before they part (None: they don't), and the share that is common in order."""
    same = 0
    for left, right in zip(reference, other, strict=False):
        if left != right:
            break
        same += 1
    longest = max(len(reference), len(other))
    matcher = difflib.SequenceMatcher(None, list(reference), list(other), autojunk=False)
    return {
        "parts_at": None if len(reference) == len(other) == same else same,
        "prefix": same / longest if longest else 1.0,
        "common": round(matcher.ratio(), 4),
    }


def words(text: str) -> list[str]:
    """Words, spaces and signs, which together are the text."""
    return _WORDS.findall(text)


def segments(reference: str, other: str) -> list[list[Any]]:
    """The other text as [piece, is it also in the reference at this place] runs, for highlighting."""
    left, right = words(reference), words(other)
    found: list[list[Any]] = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if end > start:
            found.append(["".join(right[start:end]), kind == "equal"])
    return found


def compare(reference: dict[str, Any], other: dict[str, Any], same_tokens: bool) -> dict[str, Any]:
    """Two answers to one question. Models with other tokens are compared by words: `unit` says which."""
    if same_tokens:
        return {"unit": "tokens"} | agreement(reference["ids"], other["ids"])
    table = {word: number for number, word in enumerate(dict.fromkeys(words(reference["text"]) + words(other["text"])))}
    left, right = ([table[word] for word in words(answer["text"]) if not word.isspace()] for answer in (reference, other))
    return {"unit": "words"} | agreement(left, right)

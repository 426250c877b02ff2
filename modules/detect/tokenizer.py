"""Is there a tokenizer, and do its ids fit the embedding? Read as bytes: a large vocabulary as Python objects takes 200 MB."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from modules.errors import CorruptModel, IncompatibleModel

TOKENIZER_FILES = frozenset(
    "tokenizer.json tokenizer.model tekken.json spiece.model sentencepiece.bpe.model vocab.json vocab.txt tiktoken.model "
    "rwkv_vocab_v20230424.txt".split()
)
MAX_BYTES = 100_000_000
# Many published models add a padding token that the embedding has no row for; text never holds it.
MAX_STRAY_TOKENS = 4
_OBJECT = re.compile(rb'"vocab"\s*:\s*\{\s*')
_LIST = re.compile(rb'"vocab"\s*:\s*\[\s*')
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_PAIR = re.compile(_STRING + rb"\s*:\s*(\d{1,12})\s*(?:,\s*|(?=\}))")
_PIECE = re.compile(rb"\[\s*" + _STRING + rb"\s*,\s*[-+0-9.eE]+\s*\]\s*(?:,\s*|(?=\]))")
_ADDED = re.compile(rb'"added_tokens"\s*:\s*\[')
_ADDED_ID = re.compile(rb'\{[^{}"]*"id"\s*:\s*(\d{1,12})\s*,\s*"content"\s*:\s*"((?:[^"\\]|\\.)*)"')


def check_tokenizer(folder: Path, names: set[str] | frozenset[str], rows: int | None) -> None:
    """Raise when the folder has no tokenizer, or one whose ids don't fit an embedding of `rows` rows."""
    if not names & TOKENIZER_FILES:
        raise IncompatibleModel(
            "The folder has no tokenizer (tokenizer.json or tokenizer.model).",
            hint="Fetch the tokenizer's files of the same model into the folder.",
        )
    if "tokenizer.json" not in names:
        return
    path = folder / "tokenizer.json"
    if path.stat().st_size > MAX_BYTES:
        raise CorruptModel(f"tokenizer.json is larger than {MAX_BYTES // 10**6} MB.", hint="Fetch the tokenizer again.")
    raw = path.read_bytes()
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or not raw.rstrip().endswith(b"}"):
        raise CorruptModel("tokenizer.json is no JSON object or is cut.", hint="Fetch the tokenizer again.")
    added = _added_ids(raw)
    size = _vocabulary_size(raw)
    beyond = [number for number in added if rows is not None and number >= rows]
    if len(beyond) > MAX_STRAY_TOKENS:
        size = max(size, max(added) + 1)
    if rows is not None and size > rows:
        raise IncompatibleModel(
            f"The tokenizer has {size:,} tokens, but the embedding only {rows:,} rows.",
            hint="The tokenizer belongs to another model: fetch the one published with these weights.",
        )


def _vocabulary_size(raw: bytes) -> int:
    """The highest id in model.vocab plus one; 0 when there is none in a layout we know."""
    start = _OBJECT.search(raw)
    if start:
        return 1 + max((int(match[1]) for match in _run(_PAIR, raw, start.end())), default=-1)
    start = _LIST.search(raw)
    return sum(1 for _ in _run(_PIECE, raw, start.end())) if start else 0


def _run(pattern: re.Pattern[bytes], raw: bytes, at: int) -> Iterator[re.Match[bytes]]:
    """Matches one right after the other. A scanner keeps the loop over a quarter of a million tokens in C."""
    return iter(pattern.scanner(raw, at).match, None)  # type: ignore[attr-defined]


def _added_ids(raw: bytes) -> dict[int, bytes]:
    start = _ADDED.search(raw)
    if not start:
        return {}
    found: dict[int, bytes] = {}
    end = raw.find(b"]", start.end())
    # A token's text may hold "]": the section ends where "normalizer" begins.
    section = raw[start.end() : max(end, raw.find(b'"normalizer"', start.end()))]
    for match in _ADDED_ID.finditer(section):
        number = int(match[1])
        if found.setdefault(number, match[2]) != match[2]:
            raise CorruptModel(f"tokenizer.json gives the id {number} to two added tokens.", hint="Fetch the tokenizer again.")
    return found

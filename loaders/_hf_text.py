"""Text to ids and back for `loaders.transformers`, safe to call from another thread while the model computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from modules.grammar import Vocabulary


class TextCodec:
    """A tokenizer of transformers, used through its Rust core where it has one.

    The core is only read, so threads don't meet: transformers' own `encode` sets padding and truncation on it each time, and
    fails with "Already borrowed" when two threads do. A tokenizer written in Python is kept behind a lock.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._core = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if self._core is not None:
            self._core.no_padding()
            self._core.no_truncation()
        self._lock = threading.Lock()
        self._texts: dict[int, str] = {}

    @property
    def bos_id(self) -> int | None:
        found = self._tokenizer.bos_token_id
        return None if found is None else int(found)

    def encode(self, text: str, add_special: bool) -> list[int]:
        if self._core is not None:
            return list(self._core.encode(text, add_special_tokens=add_special).ids)
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special))

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        if self._core is not None:
            return str(self._core.decode(list(token_ids), skip_special_tokens=skip_special))
        with self._lock:
            return str(
                self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
            )

    def decoder(self, skip_special: bool) -> Callable[[Sequence[int]], str]:
        """`decode` with the choice made, for a detokenizer's inner loop."""
        return lambda token_ids: self.decode(token_ids, skip_special)

    def vocabulary(self, size: int, eos_ids: frozenset[int]) -> Vocabulary:
        """For grammars: the Rust core's own description, or the text of each token of a tokenizer written in Python."""
        if self._core is not None:
            return Vocabulary(size, eos_ids, tokenizer_json=str(self._core.to_str()))
        special = frozenset(int(i) for i in self._tokenizer.all_special_ids)
        tokens = [b"" if i in special else self.token_text(i).encode() for i in range(size)]
        return Vocabulary(size, eos_ids, tokens=tokens, special_ids=special)

    def token_text(self, token_id: int) -> str:
        """One token's text as it stands inside a text: many tokenizers drop a leading space from the first token."""
        found = self._texts.get(token_id)
        if found is None:
            anchor, length = self._anchor
            found = self.decode([*anchor, token_id], skip_special=False)[length:]
            self._texts[token_id] = found
        return found

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        ids = self.encode("a", add_special=False)
        return ids, len(self.decode(ids, skip_special=False))

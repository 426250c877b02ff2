"""Token ids -> text, incrementally, never splitting a code point.

Two forms, by what a backend gives: ByteDetokenizer for pieces of bytes (llama.cpp), WindowDetokenizer for a tokenizer that
only decodes whole lists (transformers), where the text of a token depends on its neighbours.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a code point is unfinished."""

    def flush(self) -> str:
        """The rest, with U+FFFD for a code point that never finished."""


class ByteDetokenizer:
    """`piece(token_id)` gives the token's bytes."""

    __slots__ = ("_decoder", "_piece")

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._piece(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`decode(ids)` gives the text of a list of ids.

    Decodes a window from the last point where text was final, so that a tokenizer which joins or spaces tokens by context
    gives the same text as decoding everything at once. `prompt_ids` gives that context for the first token.
    """

    __slots__ = ("_decode", "_ids", "_shown", "_start")

    CONTEXT = 6

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-self.CONTEXT :])
        self._start = 0
        self._shown = self._decode(self._ids) if self._ids else ""
        if self._shown.endswith(REPLACEMENT):  # the prompt was cut inside a code point: no context then
            self._ids, self._shown = [], ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        delta = text[len(self._shown) :]
        # Keep a few tokens as context and forget the rest: the cost per token stays flat.
        if len(self._ids) > 2 * self.CONTEXT:
            self._ids = self._ids[-self.CONTEXT :]
            self._shown = self._decode(self._ids)
        else:
            self._shown = text
        return delta

    def flush(self) -> str:
        return self._decode(self._ids)[len(self._shown) :] if self._ids else ""

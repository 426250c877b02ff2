"""Tokenizers of RWKV models: bytes, the World vocabulary, and a tokenizer.json. Safe to call beside a running model."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.errors import CorruptModel
from modules.grammar import Vocabulary

WORLD_SIZE, PILE_SIZE, BYTE_SIZE = 65_536, 50_277, 256
END_OF_TEXT = "<|endoftext|>"


class ByteCodec:
    """A vocabulary of byte strings; text is cut into the longest pieces from the left.

    `pieces` maps id -> bytes. `end_id` ends a text and has no bytes of its own; it shows as `<|endoftext|>`.
    """

    def __init__(self, pieces: dict[int, bytes], end_id: int | None) -> None:
        self._pieces = pieces
        self.bos_id = end_id
        self._ids = {piece: token for token, piece in pieces.items()}
        # Lengths to try, longest first, by the first two bytes: most have one or two.
        lengths: dict[bytes, set[int]] = {}
        for piece in self._ids:
            lengths.setdefault(piece[:2], set()).add(len(piece))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of `text`. These vocabularies have no BOS, so `add_special` changes nothing."""
        raw = text.encode("utf-8", "replace")
        ids: list[int] = []
        at = 0
        while at < len(raw):
            for length in self._lengths.get(raw[at : at + 2], ()):
                token = self._ids.get(raw[at : at + length])
                if token is not None:
                    break
            else:
                token, length = self._ids[raw[at : at + 1]], 1  # all 256 single bytes are there
            ids.append(token)
            at += length
        return ids

    def piece(self, token_id: int, skip_special: bool = True) -> bytes:
        if token_id == self.bos_id:
            return b"" if skip_special else END_OF_TEXT.encode()
        return self._pieces.get(token_id, b"")  # a row of the model's padding has no text

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self.piece(i, skip_special) for i in token_ids).decode("utf-8", "replace")

    def decoder(self, skip_special: bool) -> Callable[[Sequence[int]], str]:
        return lambda token_ids: self.decode(token_ids, skip_special)

    def vocabulary(self, size: int, eos_ids: frozenset[int]) -> Vocabulary:
        """For grammars."""
        special = frozenset() if self.bos_id is None else frozenset({self.bos_id})
        tokens = [self._pieces.get(i, b"") for i in range(size)]
        return Vocabulary(size, eos_ids, tokens=tokens, special_ids=special)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special=False)


def byte_codec() -> ByteCodec:
    """One id per byte."""
    return ByteCodec({i: bytes([i]) for i in range(BYTE_SIZE)}, None)


def world_codec(vocabulary: Path) -> ByteCodec:
    """The World vocabulary, from the file that the rwkv package ships: lines of id, Python literal and length in bytes.

    Id 0 ends a text. Raises CorruptModel when the file is not what it should be.
    """
    pieces: dict[int, bytes] = {}
    try:
        for line in vocabulary.read_text(encoding="utf-8").splitlines():
            token, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            piece = value.encode("utf-8") if isinstance(value, str) else bytes(value)
            if len(piece) != int(length):
                raise ValueError(f"token {token} has another length")
            pieces[int(token)] = piece
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise CorruptModel(
            f"The World vocabulary of the rwkv package can't be read: {error}.", hint="Install the RWKV environment again."
        ) from error
    if not {bytes([i]) for i in range(256)} <= set(pieces.values()):
        raise CorruptModel("The World vocabulary lacks single bytes.", hint="Install the RWKV environment again.")
    return ByteCodec(pieces, 0)

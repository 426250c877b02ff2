"""Documents as tokens: a cache on disk, and rows of several documents that fill a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from chatml import END, START, render
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Document = str | list[dict[str, str]]
# Weights in the loss: what the assistant says counts 1 or more, system prompts and headers 0.
USER_WEIGHT = 0.2
# Which answer to give is decided in its first words; the rest follows from them. Without this emphasis the loss is
# soon very small although the model has only learned the answers and not yet when to give which.
FIRST_WEIGHTS = (6.0, 4.0, 3.0, 2.0, 1.5)
# A token of the question that comes up in the answer for the first time (the dragon of a story, the name of a user)
# had to be copied; that is rare among all tokens, so it counts more, too.
COPY_WEIGHT = 5.0
NAME_WEIGHT = 2.5  # of words with a capital, above all the names of a story: who did what is easily mixed up


@dataclass
class TokenSet:
    """Documents one after the other. ``ids`` uint16 [tokens], ``weights`` float16 [tokens], ``ends`` int64 [documents]."""

    ids: np.ndarray
    weights: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, i: int) -> slice:
        """Where document ``i`` lies in ``ids``."""
        return slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, weights=self.weights, ends=self.ends)

    @classmethod
    def load(cls, path: Path) -> TokenSet:
        with np.load(path) as arrays:
            return cls(arrays["ids"], arrays["weights"], arrays["ends"])


@cache
def capitalised(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that begin a word with a capital, after a space."""
    return frozenset(i for token, i in tokenizer.get_vocab().items() if token[:1] == "Ġ" and token[1:2].isupper())


def token_weights(ids: list[int], tokenizer: Tokenizer, chat: bool) -> list[float]:
    """How much each token counts as a target. In a chat, only what a turn says, with its end mark, is predicted."""
    if not chat:
        return [1.0] * len(ids)
    start, end, newline = (tokenizer.token_to_id(token) for token in (START, END, "Ċ"))
    assistant, user = (tokenizer.encode(role).ids[0] for role in ("assistant", "user"))
    names = capitalised(tokenizer)
    weights, asked, role, begin = [0.0] * len(ids), set[int](), -1, 0  # begin: of the current turn's content; 0: none
    for i, token in enumerate(ids):
        if token == start:
            role, begin = ids[i + 1], 0
        elif not begin:  # in the header of a turn, or between turns
            if token == newline and role >= 0:
                begin = i + 1
                asked = set() if role == user else asked
        elif role == assistant:
            place = i - begin
            weights[i] = FIRST_WEIGHTS[place] if place < len(FIRST_WEIGHTS) else 1.0
            if token in names:
                weights[i] = max(weights[i], NAME_WEIGHT)
            if token in asked:
                weights[i] = max(weights[i], COPY_WEIGHT)
                asked.remove(token)
        elif role == user:
            weights[i] = USER_WEIGHT
            asked |= {token} - {end}
        if token == end:
            role, begin = -1, 0
    return weights


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, longest: int) -> TokenSet:
    """Encode documents; those of more than ``longest`` tokens are left out."""
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for document in documents:
        tokens = tokenizer.encode(render(document)).ids
        if len(tokens) <= longest:
            ids.append(np.asarray(tokens, dtype=np.uint16))
            weights.append(np.asarray(token_weights(tokens, tokenizer, not isinstance(document, str)), dtype=np.float16))
    ends = np.cumsum([len(x) for x in ids])
    return TokenSet(np.concatenate(ids), np.concatenate(weights), ends)


@dataclass
class Batch:
    """Tensors [rows, length]: input ids, target ids, weight of each target, number of the document (-1: padding)."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    document: Tensor

    def split(self, parts: int) -> list[Batch]:
        """The same rows in ``parts`` batches."""
        fields = (self.ids, self.targets, self.weights, self.document)
        return [Batch(*chunks) for chunks in zip(*(x.chunk(parts) for x in fields), strict=True)]


def fill_rows(lengths: np.ndarray, order: np.ndarray, size: int) -> list[list[int]]:
    """First-fit decreasing: groups of documents (of those in ``order``) whose lengths sum to at most ``size``."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(order.tolist(), key=lambda i: -lengths[i]):
        need = int(lengths[i])
        row = next((r for r in range(len(rows)) if room[r] >= need), -1)
        if row < 0:
            rows.append([i])
            room.append(size - need)
        else:
            rows[row].append(i)
            room[row] -= need
    return rows


def make_batch(data: TokenSet, rows: list[list[int]], size: int) -> Batch:
    """Tensors of the given groups of documents, each row padded to ``size`` tokens."""
    ids = np.zeros((len(rows), size), dtype=np.int64)
    targets, document = np.zeros_like(ids), np.full_like(ids, -1)
    weights = np.zeros(ids.shape, dtype=np.float32)
    for r, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row):
            span = data.span(i)
            tokens = data.ids[span]
            n = len(tokens)
            ids[r, at : at + n] = tokens
            document[r, at : at + n] = number
            targets[r, at : at + n - 1] = tokens[1:]
            weights[r, at : at + n - 1] = data.weights[span][1:]
            at += n
    return Batch(*(torch.from_numpy(x) for x in (ids, targets, weights, document)))


def batches(data: TokenSet, sizes: tuple[int, ...], tokens: int, rng: np.random.Generator, pool: int = 3000) -> Iterator[Batch]:
    """Batches without end, each of ``tokens`` tokens in rows of one of the lengths ``sizes`` (ascending).

    A document goes into rows of the smallest length that holds it, so that few shapes occur (each is compiled once)
    and short documents do not pay for long attention.
    """
    lengths = data.lengths
    bins = np.searchsorted(np.asarray(sizes), lengths)
    waiting: dict[int, list[list[int]]] = {size: [] for size in sizes}
    while True:
        order = rng.permutation(len(data))
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            ready: list[tuple[int, list[list[int]]]] = []
            for b, size in enumerate(sizes):
                rows = waiting[size] + fill_rows(lengths, part[bins[part] == b], size)
                rng.shuffle(rows)
                count = tokens // size
                while len(rows) >= count:
                    ready.append((size, rows[:count]))
                    rows = rows[count:]
                waiting[size] = rows
            rng.shuffle(ready)  # type: ignore[arg-type]
            for size, rows in ready:
                yield make_batch(data, rows, size)

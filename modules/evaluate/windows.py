"""How a text is cut into windows for perplexity, and what is counted in each. Pure arithmetic on positions.

`papers`: windows of the context length that do not overlap; the first token of each has nothing before it and is not
counted; an incomplete last window is left out (GPTQ, LLM.int8 and most tables of quantised models). With a stride shorter
than the context the windows overlap, each token but the very first is counted once, with at least context − stride before it.

`rolling`: as lm-evaluation-harness does for its perplexity tasks. A BOS (or EOS) is put in front; every token is counted
once; windows overlap by one token, and the last one reaches back to be full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from modules.errors import InvalidParameter

Protocol = Literal["papers", "rolling"]
PROTOCOLS: tuple[Protocol, ...] = ("papers", "rolling")


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start..end go through the model; those from `counted_from` on are counted (start < counted_from < end)."""

    start: int
    end: int
    counted_from: int

    @property
    def count(self) -> int:
        return self.end - self.counted_from


def cut(length: int, context: int, stride: int = 0, protocol: Protocol = "papers") -> list[Window]:
    """The windows over a text of `length` tokens (for `rolling`: with the BOS in front).

    Raises InvalidParameter for a text or a context that is too short, and for a stride beyond the context.
    """
    if context < 2:
        raise InvalidParameter("A window needs at least 2 tokens.", param="context")
    if stride < 0 or stride > context:
        raise InvalidParameter(f"The stride must be between 1 and the context of {context}.", param="stride")
    if protocol == "rolling":
        if stride not in (0, context):
            raise InvalidParameter("Rolling windows have no stride.", hint="Leave it out.", param="stride")
        return _rolling(length, context)
    if stride in (0, context):
        if length < context:
            raise too_short(length, context)
        return [Window(at, at + context, at + 1) for at in range(0, length - context + 1, context)]
    if length < 2:
        raise too_short(length, 2)
    windows, counted = [], 1
    for start in range(0, length, stride):
        end = min(start + context, length)
        windows.append(Window(start, end, counted))
        counted = end
        if end == length:
            break
    return windows


def _rolling(length: int, context: int) -> list[Window]:
    if length < 2:
        raise too_short(length, 2)
    windows = [Window(0, min(length, context), 1)]
    while (counted := windows[-1].end) < length:
        end = min(counted + context - 1, length)
        windows.append(Window(max(0, end - context), end, counted))
    return windows


def too_short(length: int, needed: int) -> InvalidParameter:
    return InvalidParameter(
        f"The text has {length} tokens; one window needs {needed}.",
        hint="Give a longer text, a shorter --context, or --windows rolling, which counts every token.",
        param="context",
    )


@dataclass(slots=True)
class Tally:
    """Negative log-likelihoods as they come in, one sum per window (nats)."""

    sums: list[float]
    counts: list[int]

    def add(self, values: Iterable[float]) -> None:
        """The log-probabilities of one window's counted tokens. Raises ValueError when one is no number."""
        nll = [-value for value in values]
        if not all(math.isfinite(value) for value in nll):
            raise ValueError("a log-probability is not finite")
        self.sums.append(math.fsum(nll))
        self.counts.append(len(nll))

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def nll(self) -> float:
        return math.fsum(self.sums)

    def perplexity(self) -> float:
        """exp of the mean NLL per token."""
        return safe_exp(self.nll / self.tokens)

    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity over the windows (delta method); None with fewer than two windows."""
        if len(self.sums) < 2:
            return None
        mean = self.nll / self.tokens
        rests = [s - mean * n for s, n in zip(self.sums, self.counts, strict=True)]
        windows = len(self.sums)
        variance = math.fsum(r * r for r in rests) / (windows - 1) * windows
        return safe_exp(mean) * math.sqrt(variance) / self.tokens


def safe_exp(value: float) -> float:
    """A model that is sure of the wrong token has a perplexity beyond any float: infinity, which JSON gets as null."""
    return math.exp(value) if value < 700 else math.inf


def counted(values: Sequence[float], window: Window) -> Sequence[float]:
    """Of a score over `window` (one value per token after the first), those that are counted."""
    return values[window.counted_from - window.start - 1 :]

"""Prompt-lookup decoding: the same tokens as without it, whatever is drafted, and a cache that holds what was picked."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from loaders._hf_modes import PromptLookup
from loaders._hf_prefix import PrefixCache


class Prefix:
    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)
        self.cache = object()

    def cut(self, length: int) -> bool:
        del self.ids[length:]
        return True


class Runner:
    """A model whose next token depends on the last two: some texts repeat themselves, some don't."""

    def __init__(self, ids: list[int], period: int) -> None:
        self.prefix = Prefix(ids)
        self.period = period
        self.passes = 0

    def after(self, ids: list[int]) -> int:
        return (ids[-1] * 3 + ids[-2] + len(ids) // self.period) % 7

    def forward(self, prefix: Prefix, ids: list[int], keep: int) -> Any:
        self.passes += 1
        rows = []
        for token in ids:
            prefix.ids.append(token)
            rows.append(self.after(prefix.ids))
        return rows[-1] if keep == 1 else rows[-keep:]


@pytest.mark.parametrize("period", [1, 5, 50, 1000])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_the_text_is_the_same_and_the_cache_is_right(period: int, length: int) -> None:
    prompt = [random.Random(period).randrange(7) for _ in range(20)]
    plain, drafted = Runner(prompt, period), Runner(prompt, period)
    expected: list[int] = []
    token = plain.after(prompt)
    while len(expected) < 60:
        expected.append(token)
        token = plain.forward(plain.prefix, [token], 1)
    lookup = PromptLookup(drafted, prompt, length, room=100)  # type: ignore[arg-type]
    found: list[int] = []
    token = drafted.after(prompt)
    while len(found) < 60:
        found.append(token)
        token = lookup.next(token)
    lookup.close()
    assert found == expected
    assert drafted.prefix.ids == prompt + expected
    if period == 1000:
        assert drafted.passes < plain.passes  # a text that repeats itself needs fewer passes
        assert lookup.accepted > 0


def test_no_draft_beyond_the_room() -> None:
    prompt = [1, 2, 3, 1, 2]
    runner = Runner(prompt, 1000)
    lookup = PromptLookup(runner, prompt, 10, room=3)  # type: ignore[arg-type]
    lookup.next(3)
    assert len(runner.prefix.ids) <= len(prompt) + 3


def test_a_cache_that_can_not_be_cut_takes_no_draft() -> None:
    prefix = PrefixCache(model=None)
    assert not prefix.can_cut()
    prefix.cache = SimpleNamespace(croppable=False)
    assert not prefix.can_cut()
    prefix.cache.croppable = True
    assert prefix.can_cut()

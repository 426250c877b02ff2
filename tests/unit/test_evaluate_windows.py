"""How texts are cut into windows, and what perplexity is made of."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import InvalidParameter
from modules.evaluate.windows import Tally, Window, counted, cut, safe_exp


def test_papers_windows_do_not_overlap_and_leave_the_rest_out() -> None:
    assert cut(11, 4) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert sum(window.count for window in cut(11, 4)) == 6  # the first token of each window has nothing before it
    assert cut(11, 4, stride=4) == cut(11, 4)


def test_a_stride_counts_every_token_but_the_first_once() -> None:
    windows = cut(10, 4, stride=2)
    assert windows == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 10, 8)]


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_strided_windows_cover_the_text(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1)) if context > 1 else 1
    windows = cut(length, context, stride)
    seen = [position for window in windows for position in range(window.counted_from, window.end)]
    assert seen == list(range(1, length))
    assert all(window.end - window.start <= context and window.counted_from > window.start for window in windows)
    assert all(w.counted_from - w.start >= context - stride for w in windows[1:] if w.end - w.start == context)


@given(st.integers(2, 300), st.integers(2, 64))
def test_rolling_windows_count_every_token_behind_the_first_one(length: int, context: int) -> None:
    windows = cut(length, context, protocol="rolling")
    seen = [position for window in windows for position in range(window.counted_from, window.end)]
    assert seen == list(range(1, length))
    assert all(window.end - window.start <= context for window in windows)
    if length >= context:  # the last window reaches back to be full
        assert all(window.end - window.start == context for window in windows)


def test_what_can_not_be_cut_says_why() -> None:
    with pytest.raises(InvalidParameter, match="The text has 3 tokens; one window needs 8"):
        cut(3, 8)
    with pytest.raises(InvalidParameter, match="stride"):
        cut(100, 8, stride=9)
    with pytest.raises(InvalidParameter, match="no stride"):
        cut(100, 8, stride=4, protocol="rolling")
    with pytest.raises(InvalidParameter):
        cut(1, 8, protocol="rolling")
    with pytest.raises(InvalidParameter, match="at least 2"):
        cut(100, 1)


def test_perplexity_of_known_probabilities() -> None:
    tally = Tally([], [])
    tally.add([math.log(0.5), math.log(0.25)])
    tally.add([math.log(0.5), math.log(0.25)])
    assert tally.tokens == 4
    assert tally.perplexity() == pytest.approx(math.sqrt(8))
    assert tally.perplexity_error() == pytest.approx(0.0, abs=1e-12)  # both windows are alike
    uneven = Tally([1.0, 3.0], [2, 2])
    assert uneven.perplexity() == pytest.approx(math.e)
    assert uneven.perplexity_error() == pytest.approx(math.e * 0.5)  # means 0.5 and 1.5: a standard error of 0.5 around 1
    assert Tally([1.0], [3]).perplexity_error() is None


def test_numbers_that_are_none_are_refused_and_certainty_of_nonsense_is_infinite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Tally([], []).add([-1.0, math.nan])
    assert safe_exp(1e6) == math.inf


def test_only_the_new_tokens_of_a_window_count() -> None:
    assert counted([-1.0, -2.0, -3.0], Window(4, 8, 6)) == [-2.0, -3.0]
    assert counted([-1.0, -2.0, -3.0], Window(0, 4, 1)) == [-1.0, -2.0, -3.0]

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modules.stopping import StopMatcher


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.match is not None:
            return shown, matcher.match
    return shown + matcher.flush(), None


def test_match_across_pieces() -> None:
    assert run(["Hello\n", "Us", "er", ":", " more"], ["\nUser:"]) == ("Hello", "\nUser:")


def test_false_start_is_released() -> None:
    assert run(["a<", "b"], ["<end>"]) == ("a<b", None)


def test_held_back_until_decided() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("a<en") == "a"
    assert matcher.feed("x") == "<enx"


def test_earliest_then_longest() -> None:
    assert run(["abcd"], ["cd", "bc", "bcd"]) == ("a", "bcd")


def test_nothing_after_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.feed("ax") == "a"
    assert matcher.feed("more") == ""


TEXT = st.text(alphabet="ab\n<>", max_size=40)


@given(TEXT, st.lists(st.text(alphabet="ab\n<>", min_size=1, max_size=4), max_size=3), st.data())
def test_cutting_makes_no_difference(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is cut, what is shown is the text before the first stop, as `str.find` sees it."""
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    first = min((text.find(s) for s in stops if s in text), default=-1)
    shown, match = run(pieces, stops)
    # Streaming can't wait for a longer stop that ends later than a shorter one, so only the text is compared.
    if first < 0:
        assert (shown, match) == (text, None)
    else:
        assert match in stops
        assert text.startswith(shown + match)
        assert not any(s in shown for s in stops)

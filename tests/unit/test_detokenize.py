from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from modules.assemble import TokenAssembler
from modules.detokenize import ByteDetokenizer, WindowDetokenizer
from modules.schema import GenerationRequest, StopParams


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=60), st.text(max_size=20))
def test_window_equals_whole(text: str, prompt: str) -> None:
    detokenizer = WindowDetokenizer(decode, list(prompt.encode()))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(max_size=60))
def test_bytes_equal_whole(text: str) -> None:
    detokenizer = ByteDetokenizer(lambda token: bytes([token]))
    assert "".join(detokenizer.push(b) for b in text.encode()) + detokenizer.flush() == text


def test_unfinished_code_point_is_replaced_at_the_end() -> None:
    for detokenizer in (ByteDetokenizer(lambda t: bytes([t])), WindowDetokenizer(decode)):
        assert "".join(detokenizer.push(b) for b in "é".encode()[:1]) == ""
        assert detokenizer.flush() == "\ufffd"


def test_window_keeps_the_space_that_context_decides() -> None:
    """A sentencepiece-like tokenizer drops the space of the first token of a list."""
    words = ["Once", "upon", "a", "time"]

    def spaced(ids: Sequence[int]) -> str:
        return " ".join(words[i] for i in ids)

    detokenizer = WindowDetokenizer(spaced, [0])
    assert "".join(detokenizer.push(i) for i in (1, 2, 3)) == " upon a time"


def assembler(**stop: object) -> TokenAssembler:
    request = GenerationRequest("r", prompt="", stop=StopParams(**stop))  # type: ignore[arg-type]
    return TokenAssembler(request, ByteDetokenizer(lambda t: bytes([t])), frozenset({0}), room=100)


def feed(target: TokenAssembler, data: bytes) -> str:
    text = ""
    for byte in data:
        event = target.push(byte)
        text += event.text if event else ""
        if target.finish_reason:
            break
    return text


def test_assembler_ends_at_eos_and_drops_it() -> None:
    target = assembler()
    assert feed(target, b"ab\x00c") == "ab"
    assert target.finish_reason == "stop" and target.count == 3


def test_assembler_ignores_eos_when_asked() -> None:
    target = assembler(ignore_eos=True, max_tokens=3)
    assert feed(target, b"a\x00b") == "a\x00b"
    assert target.finish_reason == "length"


def test_assembler_min_tokens() -> None:
    target = assembler(min_tokens=2)
    assert not target.may_end
    feed(target, b"a\x00")
    assert target.finish_reason is None and target.may_end


def test_assembler_releases_held_text_at_the_limit() -> None:
    target = assembler(stop=("xyz",), max_tokens=3)
    assert feed(target, b"axy") == "axy"
    assert target.finish_reason == "length"


def test_assembler_releases_held_text_on_cancel() -> None:
    target = assembler(stop=("xyz",))
    assert feed(target, b"axy") == "a"
    event = target.cancel()
    assert event is not None and event.text == "xy" and target.finish_reason == "cancelled"


def test_assembler_with_no_room_is_over_at_once() -> None:
    assert assembler(max_tokens=0).finish_reason == "length"

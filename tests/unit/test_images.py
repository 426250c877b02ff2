"""What the server says of an image before any decoder sees it, and how messages with images become a template's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules import images
from modules.chat.vision import check_sees, images_of, sees, shape
from modules.errors import InvalidImage, UnsupportedParameter
from modules.image_urls import image_source
from modules.schema import ModelFiles, ModelInfo
from tests.pictures import bomb, data_url, encoded, gif, jpeg, png, png_chunk, webp


@pytest.mark.parametrize(
    ("data", "kind", "sides"),
    [(png(), "png", (40, 40)), (gif(), "gif", (2, 2)), (webp(), "webp", (30, 20)), (jpeg(), "jpeg", (30, 20))],
)
def test_what_an_image_is(data: bytes, kind: str, sides: tuple[int, int]) -> None:
    head = images.check(data)
    assert (head.kind, (head.width, head.height), head.animated, head.whole) == (kind, sides, False, True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "type"),
        (b"hello", "type"),
        (b"%PDF-1.7", "type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "type"),
        (b"BM" + bytes(60), "type"),
        (png()[:-20], "broken"),
        (png()[:20], "broken"),
        (gif()[:-3], "broken"),
        (jpeg(end=False), "broken"),
        (jpeg()[:12], "broken"),
        (webp()[:-4], "broken"),
        (png(width=0), "broken"),
        (gif(2), "animated"),
        (webp(flags=2), "animated"),
        (png(extra=png_chunk(b"acTL", bytes(8))), "animated"),
        (bomb(), "pixels"),
        (webp(width=16_000, height=16_000), "pixels"),
        (jpeg(60_000, 10), "pixels"),
        (png() + bytes(images.MAX_BYTES), "bytes"),
    ],
)
def test_what_is_refused_and_why(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        images.check(data, "messages.0")
    assert caught.value.detail["reason"] == reason and caught.value.param == "messages.0" and caught.value.hint


@given(st.sampled_from([png(), gif(), webp(), jpeg()]), st.integers(0, 60), st.integers(0, 255), st.integers(0, 80))
def test_damaged_heads_are_typed(data: bytes, place: int, value: int, length: int) -> None:
    damaged = bytearray(data)
    damaged[place % len(damaged)] = value
    for sample in (bytes(damaged), bytes(damaged)[:length]):
        try:
            images.check(sample)
        except InvalidImage as error:
            assert error.detail["reason"]


def test_urls() -> None:
    assert image_source(data_url(png()), "p") == encoded(png())
    assert image_source("DATA:image/png;base64," + encoded(png()), "p") == encoded(png())
    assert image_source("https://example.org/a.png", "p") == "https://example.org/a.png"
    bad = ["data:image/png,raw", "file:///etc/passwd", "ftp://a/b", "https://a b/", "/etc/passwd", "data:image/png;base64,%%"]
    for url in ("", "data:", *bad, "data:image/png;base64,AAAA"):
        with pytest.raises(InvalidImage) as caught:
            image_source(url, "p")
        assert url not in bad or url not in str(caught.value)


def message(*parts: str) -> dict[str, Any]:
    made = [{"type": "image", "image": "AA"} if part == "!" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": "".join(part for part in parts if part != "!"), "parts": made}


BY_TYPE = "{% for p in m.content %}{% if p['type'] == 'image' %}<i>{% endif %}{% endfor %}"


def test_parts_for_templates_that_know_them_and_marks_for_the_others() -> None:
    talk = [{"role": "system", "content": "Be brief."}, message("a", "!", "b")]
    as_parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert shape(talk, None, "<i>")[1] == {"role": "user", "content": "a<i>\nb"}
    assert shape(talk, "{{ m.content }}", "<i>")[1]["content"] == "a<i>\nb"
    only_parts = shape(talk, BY_TYPE, "<i>")
    assert only_parts[1]["content"] == as_parts
    assert only_parts[0]["content"] == [{"type": "text", "text": "Be brief."}]
    both = shape(talk, BY_TYPE + "{% if m.content is string %}", "<i>")
    assert both[0]["content"] == "Be brief." and both[1]["content"] == as_parts
    assert shape(talk[:1], BY_TYPE, None) == talk[:1]


def test_images_of_a_conversation() -> None:
    assert images_of([message("!"), {"role": "assistant", "content": "x"}, message("y", "!")]) == ("AA", "AA")
    with pytest.raises(InvalidImage, match="17"):
        images_of([message(*"!" * 17)])


def test_who_sees() -> None:
    info = ModelInfo("m", "/m", "transformers", "hf")
    for blind in (None, info):
        with pytest.raises(UnsupportedParameter, match="no images"):
            check_sees(blind)
    check_sees(ModelInfo("m", "/m", "transformers", "hf", image_token="<image>"))
    assert sees(ModelFiles("m", "/m", "hf", vision=True), None) and not sees(ModelFiles("m", "/m", "hf"), None)

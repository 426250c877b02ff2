"""What the server says of an image before any decoder sees it, and how messages with images become a template's."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules import images
from modules.chat.vision import check_sees, images_of, sees, shape
from modules.config import Config
from modules.errors import InvalidImage, UnsupportedParameter
from modules.image_urls import fetched, image_source
from modules.reach import LOOPBACK, PUBLIC
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
    info = ModelInfo("m", "/m", "transformers", "hf", image_token="<i>")
    assert shape(talk, None, info)[1] == {"role": "user", "content": "a<i>\nb"}
    assert shape(talk, "{{ m.content }}", info)[1]["content"] == "a<i>\nb"
    only_parts = shape(talk, BY_TYPE, info)
    assert only_parts[1]["content"] == as_parts
    assert only_parts[0]["content"] == [{"type": "text", "text": "Be brief."}]
    both = shape(talk, BY_TYPE + "{% if m.content is string %}", info)
    assert both[0]["content"] == "Be brief." and both[1]["content"] == as_parts
    assert shape(talk[:1], BY_TYPE, None) == talk[:1] == shape(talk[:1], BY_TYPE, replace(info, image_token=None))


def test_an_engine_that_puts_in_what_belongs_around_an_image_gets_its_mark_in_the_words() -> None:
    talk = [{"role": "system", "content": "Be brief."}, message("a", "!", "b")]
    info = ModelInfo("m", "/m", "llamacpp", "gguf", image_token="<__m__>", image_inline=True)
    assert shape(talk, "{{ m.content }}", info)[1] == {"role": "user", "content": "a<__m__>\nb"}
    only_parts = shape(talk, BY_TYPE, info)
    assert [m["content"] for m in only_parts] == [
        [{"type": "text", "text": "Be brief."}],
        [{"type": "text", "text": "a<__m__>b"}],
    ]
    both = shape(talk, BY_TYPE + "{% if m.content is string %}", info)
    assert [m["content"] for m in both] == ["Be brief.", "a<__m__>b"]


def test_images_of_a_conversation() -> None:
    assert images_of([message("!"), {"role": "assistant", "content": "x"}, message("y", "!")]) == ("AA", "AA")
    with pytest.raises(InvalidImage, match="17"):
        images_of([message(*"!" * 17)])


def test_who_sees() -> None:
    info = ModelInfo("m", "/m", "transformers", "hf")
    for blind in (None, info):
        with pytest.raises(UnsupportedParameter, match="no images"):
            check_sees(blind)
    with pytest.raises(UnsupportedParameter) as caught:
        check_sees(ModelInfo("m", "/m", "llamacpp", "gguf", no_images="Put its projector beside it."))
    assert caught.value.hint == "Put its projector beside it."
    check_sees(ModelInfo("m", "/m", "transformers", "hf", image_token="<image>"))
    assert sees(ModelFiles("m", "/m", "hf", vision=True), None) and not sees(ModelFiles("m", "/m", "hf"), None)


# --- fetching ------------------------------------------------------------------------------------------------------


class Host:
    """A web server on loopback that keeps a list of what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        host = next((line[6:] for line in head.split("\r\n") if line.lower().startswith("host: ")), None)
        self.asked.append((path, host))
        body = {"/a.png": png(), "/text": b"hello"}.get(path, b"")
        status = "302 Found\r\nLocation: /a.png" if path == "/moved" else "200 OK" if body else "404 Not Found"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def fetch(self, url: str, reach: int = LOOPBACK, **more: Any) -> str:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            return await fetched(url.replace("PORT", str(self.port)), True, reach=reach, **more)


def test_an_image_is_fetched_from_the_address_that_was_looked_up() -> None:
    host = Host()
    here = [ipaddress.ip_address("127.0.0.1")]
    made = asyncio.run(host.fetch("http://pictures.example:PORT/a.png", resolve=lambda *_: here))
    assert made == encoded(png()) and host.asked == [("/a.png", f"pictures.example:{host.port}")]


@pytest.mark.parametrize(
    ("path", "reason", "words"), [("moved", "url", "302"), ("gone", "url", "404"), ("text", "type", "no image")]
)
def test_what_is_fetched_must_be_an_image(path: str, reason: str, words: str) -> None:
    host = Host()
    with pytest.raises(InvalidImage, match=words) as caught:
        asyncio.run(host.fetch(f"http://127.0.0.1:PORT/{path}"))
    assert caught.value.detail["reason"] == reason and len(host.asked) == 1  # no redirect is followed


@pytest.mark.parametrize(
    "place",
    ["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "localhost", "2130706433", "169.254.169.254", "10.0.0.1"],
)
def test_nothing_inside_is_ever_asked(place: str) -> None:
    host = Host()
    with pytest.raises(InvalidImage):
        asyncio.run(host.fetch(f"http://{place}:PORT/a.png", reach=PUBLIC))
    assert host.asked == []


def test_one_inner_address_among_public_ones_is_enough() -> None:
    both = [ipaddress.ip_address("93.184.216.34"), ipaddress.ip_address("127.0.0.1")]
    with pytest.raises(InvalidImage, match="not a public one"):
        asyncio.run(fetched("http://pictures.example/a.png", True, resolve=lambda *_: both))


def test_fetching_is_off_by_default() -> None:
    assert Config().fetch_images is False
    with pytest.raises(InvalidImage, match="fetches no images"):
        asyncio.run(fetched("http://127.0.0.1:9/a.png", False))
    assert asyncio.run(fetched(encoded(png()), False)) == encoded(png())

"""Images that come with a message: what they are, by their first bytes, before anything decodes them.

The server never decodes an image: a worker does, with limits of its own. What is read here (kind, sides, whether it moves,
whether it is cut short) is enough to refuse what no model should get, a decompression bomb above all.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from dataclasses import dataclass

from modules.errors import InvalidImage

MAX_BYTES = 20 << 20
MAX_PIXELS = 40_000_000
MAX_SIDE = 16_384
MAX_IMAGES = 16
KINDS = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp", "image/gif": "gif"}
MEDIA_TYPES = {kind: media for media, kind in KINDS.items()}
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*)(;base64)?,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImageHead:
    """What an image's own bytes say. `kind` is png, jpeg, webp or gif; `whole` is False where its end is missing."""

    kind: str
    width: int
    height: int
    animated: bool = False
    whole: bool = True


def from_data_url(url: str, param: str) -> str:
    """The base64 of a data: URL's image, checked. Raises InvalidImage."""
    match = _DATA_URL.match(url[:256])
    if match is None or not match[3]:
        raise _refused("broken", "An image must be a data: URL in base64, such as data:image/png;base64,….", param)
    return from_base64(url[match.end() :], param)


def to_data_url(encoded: str) -> str:
    """A checked image in base64 as a data: URL of its own kind."""
    head = read_head(base64.b64decode(encoded))
    return f"data:{MEDIA_TYPES[head.kind] if head is not None else 'image/png'};base64,{encoded}"


def from_base64(text: str, param: str) -> str:
    """The same base64 in its plain form, after a look at the image. Raises InvalidImage."""
    if len(text) > MAX_BYTES * 4 // 3 + 1024:
        raise _too_large(param)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _refused("broken", "The image is no valid base64.", param) from None
    check(data, param)
    return base64.b64encode(data).decode("ascii")


def check(data: bytes, param: str | None = None) -> ImageHead:
    """Raises InvalidImage for what is no still image of a known kind and a fair size; `detail` holds the reason as a word."""
    if len(data) > MAX_BYTES:
        raise _too_large(param)
    try:
        head = read_head(data)
    except (struct.error, IndexError):
        raise _refused("broken", "The image is cut short or damaged.", param) from None
    if head is None:
        raise _refused("type", "This is no image that can be read: PNG, JPEG, WebP and GIF can.", param)
    if head.width > MAX_SIDE or head.height > MAX_SIDE or head.width * head.height > MAX_PIXELS:
        raise _refused(
            "pixels",
            f"The image has {head.width} × {head.height} pixels; at most {MAX_PIXELS // 10**6} million are read, "
            f"{MAX_SIDE} to a side.",
            param,
            "Make it smaller.",
        )
    if not head.width or not head.height or not head.whole:
        raise _refused("broken", "The image is cut short or damaged.", param)
    if head.animated:
        raise _refused("animated", "The image moves; only still images are read.", param, "Send one of its frames.")
    return head


def _too_large(param: str | None) -> InvalidImage:
    return _refused("bytes", f"The image is larger than {MAX_BYTES >> 20} MB.", param, "Make it smaller.")


def _refused(reason: str, message: str, param: str | None, hint: str = "Send another image.") -> InvalidImage:
    return InvalidImage(message, hint=hint, param=param, detail={"reason": reason})


# --- heads ---------------------------------------------------------------------------------------------------------


def read_head(data: bytes) -> ImageHead | None:
    """None for what is none of the four kinds. Raises struct.error or IndexError where the head is cut short."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _png(data: bytes) -> ImageHead:
    width, height = struct.unpack_from(">II", data, 16)
    position, animated, ended = 8, False, False
    while position + 8 <= len(data) and not ended:
        length, name = struct.unpack_from(">I4s", data, position)
        animated = animated or name == b"acTL"
        position += 12 + length
        ended = name == b"IEND"
    return ImageHead("png", width, height, animated, ended and position <= len(data))


def _jpeg(data: bytes) -> ImageHead:
    position = 2
    while True:
        while data[position] == 0xFF and data[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker, kind = data[position], data[position + 1]
        if marker != 0xFF:
            return ImageHead("jpeg", 0, 0, whole=False)
        (length,) = struct.unpack_from(">H", data, position + 2)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = struct.unpack_from(">HH", data, position + 5)
            return ImageHead("jpeg", width, height, whole=b"\xff\xd9" in data[position:])
        position += 2 + length


def _gif(data: bytes) -> ImageHead:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    frames = 0
    while data[position] != 0x3B:
        if data[position] == 0x2C:
            frames += 1
            local = data[position + 9]
            position += 11 + (3 << ((local & 7) + 1) if local & 0x80 else 0)
        elif data[position] == 0x21:
            position += 2
        else:
            return ImageHead("gif", width, height, whole=False)
        while data[position]:  # sub-blocks
            position += 1 + data[position]
        position += 1
    return ImageHead("gif", width, height, frames > 1, frames > 0)


def _webp(data: bytes) -> ImageHead:
    (size,) = struct.unpack_from("<I", data, 4)
    whole = len(data) >= size + 8
    form = data[12:16]
    if form == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return ImageHead("webp", width, height, bool(data[20] & 2), whole)
    if form == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHead("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, whole=whole)
    width, height = struct.unpack_from("<HH", data, 26)
    return ImageHead("webp", width & 0x3FFF, height & 0x3FFF, whole=whole)

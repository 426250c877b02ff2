"""Image files made byte by byte, whole and bad ones."""

from __future__ import annotations

import base64
import struct
import zlib

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(color: tuple[int, int, int] = RED, width: int = 40, height: int = 40, *, stripes: int = 0, extra: bytes = b"") -> bytes:
    """A picture of one colour, with `stripes` black lines; `extra` chunks stand before the pixels."""
    rows = b"".join(b"\0" + bytes((0, 0, 0) if line < stripes else color) * width for line in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = png_chunk(b"IHDR", head) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def bomb(side: int = 50_000) -> bytes:
    """A few kilobytes that say they are `side` × `side` pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def gif(frames: int = 1) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02" + b"\x03\x44\x01\x05" + b"\x00"
    colours = bytes((255, 0, 0, 0, 0, 255))
    return b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + colours + frame * frames + b"\x3b"


def webp(flags: int = 0, width: int = 30, height: int = 20) -> bytes:
    """An extended WebP's head with nothing in it."""
    body = bytes((flags, 0, 0, 0)) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def jpeg(width: int = 30, height: int = 20, *, end: bool = True) -> bytes:
    """A JPEG's head without any pixels."""
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    comment = b"\xff\xfe\x00\x04ab"
    return b"\xff\xd8\xff\xe0\x00\x04JF" + comment + frame + (b"\xff\xd9" if end else b"")


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def data_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{encoded(data)}"

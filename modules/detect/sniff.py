"""What kind of file this is, from its first bytes. A file's name is never asked."""

from __future__ import annotations

import shlex
import struct
from pathlib import Path
from typing import Literal

from modules.errors import CorruptModel, LoadError, UnknownFormat, UnsafeModel

FileKind = Literal[
    "empty", "lfs", "html", "gguf", "ggml", "safetensors", "pickle", "torch", "zip", "7z", "gzip", "npy", "json", "other"
]

_HEAD_BYTES = 512
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"ggml", b"ggmf", b"ggjt", b"algg", b"ggla")
_HTML = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<script")
_PICKLES = frozenset({"pickle", "torch", "zip"})


def sniff(path: Path) -> FileKind:
    """The kind of the file at `path`. Raises OSError when it can't be read."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return kind_of(head)


def kind_of(head: bytes) -> FileKind:
    """The kind of a file that begins with `head` (up to 512 bytes are looked at)."""
    if not head:
        return "empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    if text.startswith(_HTML):
        return "html"
    if head[:4] in (b"GGUF", b"FUGG"):
        return "gguf"
    if head[:4] in _OLD_GGML:
        return "ggml"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK\x03\x04"):
        # torch.save writes <name>/data.pkl as the first member of a zip.
        return "torch" if b"data.pkl" in head[:300] else "zip"
    if head.startswith(b"7z\xbc\xaf\x27\x1c"):
        return "7z"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head[0] == 0x80 and len(head) > 1 and head[1] in range(2, 6):
        return "pickle"
    if len(head) >= 9 and head[8:9] == b"{":
        return "safetensors"
    if text[:1] in (b"{", b"["):
        return "json"
    return "other"


def no_model(kind: FileKind, name: str) -> LoadError:
    """The error for a file that holds no weights we read; `name` is the file's name, without its folder."""
    if kind == "empty":
        return CorruptModel(f"{name} is empty (0 bytes).", hint="The download or copy never finished: fetch the file again.")
    if kind == "lfs":
        return CorruptModel(
            f"{name} is a Git LFS pointer, not the weights themselves.",
            hint="Run `git lfs pull` in the folder it was cloned to, or fetch it with `server.py download OWNER/NAME`.",
        )
    if kind == "html":
        return CorruptModel(
            f"{name} is a web page, not a model.",
            hint="The download was answered by a login or error page: fetch it again with `server.py download OWNER/NAME`.",
        )
    if kind == "json":
        return CorruptModel(
            f"{name} is JSON text, not weights.",
            hint="If it holds an error message, the download was refused: fetch it again, with a token if the model is gated.",
        )
    if kind in _PICKLES:
        return UnsafeModel(
            f"{name} is a Python pickle, which can run any code when it is opened, so it is refused.",
            hint="Use the model's .safetensors or .gguf version (`server.py download` picks it). If you trust this file: "
            f"`server.py convert {shlex.quote(name)} --to safetensors --allow-pickle`.",
        )
    if kind == "7z" or kind == "gzip":
        return UnknownFormat(f"{name} is a compressed archive.", hint="Unpack it and load the .safetensors or .gguf file inside.")
    if kind == "ggml":
        return UnknownFormat(
            f"{name} is in the GGML format that came before GGUF; llama.cpp no longer reads it.",
            hint="Get a GGUF of the model, or convert the original with `server.py convert MODEL --to gguf`.",
        )
    return UnknownFormat(
        f"{name} is in no format this product knows.",
        hint="Models are GGUF files, or folders with config.json and .safetensors files; see docs/models.md.",
    )


def lfs_size(head: bytes) -> int | None:
    """The size in bytes that a Git LFS pointer promises."""
    for line in head.split(b"\n"):
        if line.startswith(b"size ") and line[5:].strip().isdigit():
            return int(line[5:])
    return None


def numpy_header(head: bytes) -> tuple[str, int]:
    """An .npy file's header as text (a dictionary literal), and where its data begins. Raises ValueError when it is torn."""
    if len(head) < 12:
        raise ValueError("no header")
    if head[6] == 1:
        (length,) = struct.unpack_from("<H", head, 8)
        start = 10
    else:
        (length,) = struct.unpack_from("<I", head, 8)
        start = 12
    if len(head) < start + length:
        raise ValueError("header cut")
    return head[start : start + length].decode("latin-1"), start + length

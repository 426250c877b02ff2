"""RWKV weights, by their tensors' names. Its `.pth` files are pickles: their names are read without running them."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path

# A pickle of a few thousand tensors takes about 100 bytes for each.
_MAX_PICKLE = 8_000_000


def looks_like_rwkv(names: Iterable[str]) -> str | None:
    """The architecture ("rwkv4" to "rwkv7") when these are the tensors of an RWKV model, else None."""
    held = set(names)
    if "emb.weight" not in held or not any(name.startswith("blocks.0.att.") for name in held):
        return None
    parts = {name.removeprefix("blocks.0.att.") for name in held if name.startswith("blocks.0.att.")}
    if "r_k" in parts or "w0" in parts:
        return "rwkv7"
    if "time_maa_x" in parts or "time_maa_w1" in parts:
        return "rwkv6"
    if "gate.weight" in parts or "ln_x.weight" in parts:
        return "rwkv5"
    return "rwkv4"


def names_in_pickle(path: Path) -> list[str]:
    """The strings in a torch.save file, read from its opcodes. Nothing is unpickled, no class is imported.

    An empty list when the file is no such archive, is larger than any model's table, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((item for item in archive.infolist() if item.filename.endswith("/data.pkl")), None)
            if member is None or member.file_size > _MAX_PICKLE:
                return []
            with archive.open(member) as file:
                raw = file.read(_MAX_PICKLE)
        return [value for _, value, _ in pickletools.genops(raw) if isinstance(value, str)]
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError, EOFError, OSError, RuntimeError, UnicodeError):
        # The file is refused as a pickle anyway; its names would only have made the message better.
        return []

"""Names from users and strangers, confined to one folder.

Every name that becomes part of a path (a preset, a model, a download, a conversion's output) goes through `confine`. It
rejects instead of mapping: two names that map to one file would overwrite each other in silence. The rules are those of
the strictest file system we run on, so that a folder made on Linux can be copied to Windows.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from modules.errors import InvalidParameter

# Leaves room for the suffixes we add (".part", ".corrupt-20260101T000000") under the usual limit of 255 bytes.
MAX_NAME_BYTES = 200
MAX_DEPTH = 8

_RESERVED = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|clock\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(?:\..*)?", re.IGNORECASE | re.DOTALL
)
_ESCAPED_SEPARATOR = re.compile(r"%(?:2e|2f|5c|00)", re.IGNORECASE)
_FORBIDDEN = frozenset('<>:"|?*')
# Marks that turn or hide the letters around them, so that a name shows as another one.
_INVISIBLE = frozenset("\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")


def confine(root: Path, name: str, *, nested: bool = False) -> Path:
    """The path of `name` inside `root`, which need not exist.

    `nested` allows "/" between parts, each of which must pass by itself (a model id such as "llama/q4.gguf"). The name is
    normalised to NFC, so that one typed on a Mac finds the file. Raises InvalidParameter, whose message names the rule
    and never the folder; nothing is said about whether such a file exists.
    """
    name = unicodedata.normalize("NFC", name)
    parts = name.split("/") if nested else [name]
    if len(parts) > MAX_DEPTH:
        raise _refused(f"has more than {MAX_DEPTH} folders")
    for part in parts:
        if reason := name_problem(part):
            raise _refused(reason)
    path = root.joinpath(*parts)
    if not is_inside(path, root):
        raise _refused("leads out of its folder through a link")
    return path


def name_problem(name: str) -> str | None:
    """Why `name` can't be one file's name, as the end of a sentence that begins "The name …"; None when it can."""
    if not name or name in {".", ".."}:
        return "is empty or only dots"
    if any(character in "/\\" for character in name) or _ESCAPED_SEPARATOR.search(name):
        return "contains a folder separator"
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        return "contains a control character"
    if any(character in _INVISIBLE for character in name):
        return "contains an invisible character"
    if any(character in _FORBIDDEN for character in name):
        return 'contains one of < > : " | ? *'
    if name[0] in " ." or name[-1] in " .":
        return "begins or ends with a dot or a space"
    if _RESERVED.fullmatch(name):
        return "is reserved by Windows"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return None


def is_inside(path: Path, root: Path) -> bool:
    """Whether `path`, with every link followed, lies in `root`. Neither needs to exist."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links leads nowhere
        return False


def _refused(reason: str) -> InvalidParameter:
    return InvalidParameter(
        f"The name {reason}.", hint="Use letters, digits, spaces inside, and - _ . ( ) [ ] + instead.", param="name"
    )

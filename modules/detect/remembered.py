"""What headers said, kept over a restart: a folder of large vocabularies takes minutes to read and a moment to look up.

An entry counts only while every file that it came from has the name, size and time it had, and while the rules in modules/detect
are the same. Before each load the files are read and checked again anyway (detect.check).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.schema import ModelFiles, from_wire, to_wire

if TYPE_CHECKING:
    from collections.abc import Collection

log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20


class HeaderCache:
    """Safe to use from several threads. A file that is torn, foreign or of other rules counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._entries: dict[str, list[Any]] | None = None
        self._dirty = False

    def get(self, path: str, fingerprint: object) -> ModelFiles | None:
        """What was found at `path` when it was as `fingerprint` says."""
        with self._mutex:
            entry = self._loaded().get(path)
        if entry is None or entry[0] != _digest(fingerprint):
            return None
        try:
            return from_wire(ModelFiles, entry[1])
        except (TypeError, ValueError, AttributeError):
            return None

    def put(self, path: str, fingerprint: object, files: ModelFiles) -> None:
        with self._mutex:
            self._loaded()[path] = [_digest(fingerprint), to_wire(files)]
            self._dirty = True

    def save(self, seen: Collection[str]) -> None:
        """Write what is new, without the paths that are not there any more."""
        with self._mutex:
            if not self._dirty:
                return
            self._dirty = False
            self._entries = {path: entry for path, entry in self._loaded().items() if path in seen}
            text = json.dumps({"rules": _rules(), "models": self._entries})
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            os.replace(part, self._path)
        except OSError as error:  # it only saves time
            log.debug("what the models' headers say was not kept: %s", error)
            part.unlink(missing_ok=True)

    def _loaded(self) -> dict[str, list[Any]]:
        if self._entries is None:
            self._entries = _read(self._path)
        return self._entries


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    models = data.get("models") if isinstance(data, dict) and data.get("rules") == _rules() else None
    if not isinstance(models, dict):
        return {}
    return {
        key: entry for key, entry in models.items() if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], dict)
    }


def _rules() -> str:
    """The version of what is found: the text of this package and of the data's shape."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "schema.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _digest(fingerprint: object) -> str:
    return hashlib.sha256(repr(fingerprint).encode("utf-8", "surrogatepass")).hexdigest()[:32]

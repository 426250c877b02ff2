"""Logging: one line per event, no prompt text, no secrets, no control characters.

Prompts and answers are logged nowhere unless --verbose asks; even then one record is one line, so that text from a model or a
client can't forge another record.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path

_SECRETS = re.compile(
    r"(?i)(bearer\s+|x-api-key[\"':=\s]+|api[-_]?key[\"':=\s]+|[?&]token=|authorization[\"':=\s]+(?:bearer\s+)?)([^\s\"'&,;]{4,})"
)
_TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,})")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
REPEAT_WINDOW_S = 60.0
REPEATS = 5


def clean(text: str, secrets: Iterable[str] = ()) -> str:
    """Text fit for one log record: secrets masked, control characters shown as escapes, line breaks as a visible mark."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = _TOKENS.sub("***", _SECRETS.sub(r"\1***", text))
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n")).replace("\n", "\n    ")


class CleanFormatter(logging.Formatter):
    """Everything that goes out passes `clean`, tracebacks included."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._secrets = [s for s in secrets if s]

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record), self._secrets)


class RateLimit(logging.Filter):
    """At most REPEATS equal messages a minute: random bytes sent to the port must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg))
        now = time.monotonic()
        begun, count = self._seen.get(key, (now, 0))
        if now - begun > REPEAT_WINDOW_S:
            begun, count = now, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (begun, count + 1)
        return count < REPEATS or record.levelno < logging.WARNING


def set_up(folder: Path | None, *, verbose: bool = False, secrets: Iterable[str] = ()) -> None:
    """Log to stderr and, where `folder` can be written, to switchyard.log in it. Replaces earlier handlers of ours."""
    formatter = CleanFormatter(secrets)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.DEBUG if verbose else logging.INFO)
    problem = ""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handlers.append(
                RotatingFileHandler(folder / "switchyard.log", maxBytes=2_000_000, backupCount=3, encoding="utf-8", delay=True)
            )
        except OSError as error:
            problem = f"no log file: {error.strerror}"
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "switchyard", False)]:
        root.removeHandler(handler)
        handler.close()
    limit = RateLimit()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(limit)
        handler.switchyard = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("modules").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if verbose else logging.WARNING)
    for noisy in ("uvicorn", "uvicorn.error", "httpx", "asyncio", "gradio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if problem:
        logging.getLogger(__name__).warning(problem)

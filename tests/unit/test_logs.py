"""Log records: one record per event whatever a stranger's text holds, no secret, no flood."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from modules.logs import REPEATS, RateLimit, clean, set_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcd1234", "abcd1234"),
        ("x-api-key: s3cret-value", "s3cret-value"),
        ("GET /?token=abcdef12345&x=1", "abcdef12345"),
        ("using hf_abcdefghijkl for it", "hf_abcdefghijkl"),
        ("key sk-abcdefgh1234", "sk-abcdefgh1234"),
        ("the key is my own", "my own"),
    ],
)
def test_secrets_are_masked(text: str, secret: str) -> None:
    cleaned = clean(text, ["my own"])
    assert secret not in cleaned and "***" in cleaned


def test_control_characters_can_not_forge_a_record() -> None:
    cleaned = clean("name\n2026-01-01 00:00:00 INFO    forged\x1b[2J\x07\u202e\r")
    assert "\x1b" not in cleaned and "\u202e" not in cleaned and "\r" not in cleaned
    assert all(line.startswith("    ") for line in cleaned.split("\n")[1:])


def test_repeats_are_limited_and_others_pass() -> None:
    limit = RateLimit()

    def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
        return logging.LogRecord("x", level, "", 0, text, None, None)

    assert sum(limit.filter(record("same")) for _ in range(100)) == REPEATS
    assert limit.filter(record("other"))
    assert all(limit.filter(record("info", logging.INFO)) for _ in range(20))


def test_the_file_is_written_in_utf_8_and_an_unwritable_folder_is_no_error(tmp_path: Path, restored: None) -> None:
    set_up(tmp_path / "logs ä")
    logging.getLogger("modules.x").warning("naïve 漢字 Bearer abcd1234")
    text = (tmp_path / "logs ä" / "switchyard.log").read_text(encoding="utf-8")
    assert "naïve 漢字" in text and "abcd1234" not in text
    blocker = tmp_path / "file"
    blocker.write_text("", encoding="utf-8")
    set_up(blocker / "logs")
    logging.getLogger("modules.x").warning("still works")


def test_prompts_are_not_logged_by_default(tmp_path: Path, restored: None) -> None:
    set_up(tmp_path)
    logging.getLogger("modules.model_manager").debug("worker r1: a prompt")
    path = tmp_path / "switchyard.log"
    assert not path.exists() or "a prompt" not in path.read_text(encoding="utf-8")

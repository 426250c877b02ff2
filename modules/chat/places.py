"""Where chats are kept: a data folder (SQLite), or a database by its URL (PostgreSQL)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from modules.errors import ConfigError

if TYPE_CHECKING:
    from modules.chat.store_sql import SqlChatStore


def open_place(place: str | Path, folder: Path | None) -> SqlChatStore:
    """The store of a place, not opened yet. `folder` is this server's data folder, None for a command that is no server.
    Raises ConfigError for what is no place."""
    if isinstance(place, Path):
        from modules.chat.store_sqlite import SqliteChatStore

        return SqliteChatStore(place)
    url = read_url(place)
    # SQLAlchemy and psycopg take half a second to import: only whoever uses them waits for it.
    try:
        from modules.chat.store_postgres import PostgresChatStore
    except ImportError as error:
        raise ConfigError(
            f"--database-url needs {error.name or 'a package'}, which is not installed.",
            hint="Run the start script's update, or `pip install -r requirements.txt`.",
        ) from error
    return PostgresChatStore(url, folder)


def read_url(text: str) -> str:
    """The URL itself, or the first line of the file that `@FILE` names. What is wrong is said without the text: it may hold a
    password."""
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(f"--database-url: the file {path} can't be read: {reason}.") from error
        text = lines[0] if lines else ""
    if "://" not in text:
        raise ConfigError("--database-url is no URL.", hint="It looks like postgresql://user@host/database, or @FILE.")
    return text


def passwords(place: str | None) -> list[str]:
    """What of a URL must not be logged, in every form it may appear in."""
    found = urlsplit(read_url(place)).password if place else None
    return [found, unquote(found)] if found else []


def is_url(text: str) -> bool:
    return "://" in text or text.startswith("@")

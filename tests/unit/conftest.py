"""The databases a chat store may stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modules.chat.places import open_place
from modules.chat.store import ChatStore
from modules.chat.store_sqlite import SqliteChatStore

Place = Callable[[], ChatStore]


@pytest.fixture(params=["index", "scan", "postgresql"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """Gives a store that is not open yet, on the same new database each time: SQLite with and without its index, PostgreSQL."""
    folder = tmp_path / "my dätä"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").database()
        return lambda: open_place(url, folder)
    return lambda: SqliteChatStore(folder, full_text=request.param == "index")

"""Two server processes on one PostgreSQL database."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.api.test_ui_routes import Page, listening

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.conftest import Server
    from tests.postgres_lab import Postgres

pytest.importorskip("sqlalchemy")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_one_server_shows_and_goes_on_with_the_chats_of_another(
    postgres: Postgres, launch: Callable[..., Server], tmp_path: Path
) -> None:
    url = tmp_path / "database-url"
    url.write_text(postgres.database(), encoding="utf-8")
    first, second = [launch("--database-url", f"@{url}").wait_ready() for _ in range(2)]
    one, two = Page(first), Page(second)
    with listening(second) as wait:
        chat = one.ask(one.new(), "hello")
        wait(lambda e: e.kind == "conversation" and e.data["id"] == chat["id"])
        assert two.chat(chat)["messages"] == chat["messages"]
        two.send(chat, "stale", status=409, parent=chat["messages"][0]["id"], revision=1)
        one.send(chat, "[[echo tokens=100000 rate=20]] x")

        def shown() -> dict[str, object]:
            return dict(two.chat(chat)["messages"][-1])

        second.until(lambda: bool(shown()["text"]), "text of the other server to be seen")
        assert shown()["status"] == "generating" and shown()["run"] is None
        assert two.call("GET", "conversations")["conversations"][0]["generating"]
        two.send(chat, "too early", status=409)
        two.act(two.chat(chat)["messages"][-1], "stop")
        second.until(lambda: shown()["status"] == "interrupted", "stopped from the other page")
        one.send(chat, "[[echo tokens=100000 rate=20]] x")
        second.until(lambda: bool(shown()["text"]), "text of the other server to be seen again")
        first.process.kill()
        second.until(lambda: shown()["status"] == "interrupted", "seen to be interrupted")
        kept = str(shown()["text"])
        assert kept
        done = two.ask(chat, "and on")
        assert [m["status"] for m in done["messages"]][-3:] == ["interrupted", "complete", "complete"]
    assert second.stop() == 0
    logs = [line for path in second.data.glob("logs/*") for line in path.read_text(encoding="utf-8").splitlines()]
    assert logs and not [line for line in (*second.lines, *logs) if "s3cret" in line]


def test_a_database_that_is_not_there_ends_the_start_with_what_to_do(launch: Callable[..., Server]) -> None:
    with pytest.raises(AssertionError, match="did not start") as refused:
        launch("--database-url", "postgresql://me:s3cret@127.0.0.1:1/chats")
    assert "can't be reached" in str(refused.value) and "Check that it runs" in str(refused.value)
    assert "s3cret" not in str(refused.value)

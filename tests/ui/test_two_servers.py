"""Two servers on one store: a page shows what the other server writes, says so, and can stop it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, expect

from tests.pictures import RED, encoded, png
from tests.ui.conftest import Server, Visit, answer, body, send, start_server, stop_server

if TYPE_CHECKING:
    from tests.postgres_lab import Postgres

pytest.importorskip("sqlalchemy")
NOTE = "Another server is writing this answer."


@pytest.fixture(scope="module")
def two_servers(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    url = tmp_path_factory.mktemp("shared") / "database-url"
    url.write_text(postgres.database(), encoding="utf-8")
    running: list[Server] = []
    try:
        for name in ("one", "two"):
            running.append(start_server(tmp_path_factory.mktemp(name), "--model", "echo", "--database-url", f"@{url}"))
        yield running[0], running[1]
    finally:
        for server in running:
            stop_server(server)


@pytest.fixture
def windows(browser: Browser, two_servers: tuple[Server, Server]) -> Iterator[tuple[Visit, Visit]]:
    """A window on each server."""
    contexts = [browser.new_context() for _ in two_servers]
    for context in contexts:
        context.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    visits = [Visit(context, server) for context, server in zip(contexts, two_servers, strict=True)]
    yield visits[0], visits[1]
    for visit in visits:
        visit.context.close()
        assert visit.errors == []


def test_an_answer_that_another_server_writes_is_shown_as_such_and_can_be_stopped(windows: tuple[Visit, Visit]) -> None:
    one, two = windows
    here = one.open()
    send(here, "[[echo tokens=100000 rate=20]] x")
    here.wait_for_selector(".sy-message:last-child[data-role=assistant][data-status=generating]")
    expect(here.get_by_test_id("elsewhere")).to_have_count(0)
    chat = here.evaluate("new URLSearchParams(location.search).get('c')")
    there = two.open(chat)
    note = there.get_by_test_id("elsewhere")
    expect(note).to_contain_text(NOTE)
    last = there.get_by_test_id("message").last
    expect(last).to_have_attribute("data-status", "generating")
    expect(last.locator(".sy-body")).not_to_be_empty()
    seen = body(last)
    there.wait_for_function(
        "(length) => document.querySelector('.sy-message:last-child .sy-body').textContent.trim().length > length", arg=len(seen)
    )  # it follows
    note.get_by_role("button", name="Stop it").click()
    stopped = answer(there, "interrupted", 30_000)
    expect(there.get_by_test_id("elsewhere")).to_have_count(0)
    expect(stopped.get_by_test_id("interrupted")).to_have_count(0)  # somebody wanted it so
    kept = body(answer(here, "interrupted", 30_000))
    expect(stopped.locator(".sy-body")).to_have_text(re.compile(re.escape(kept[-20:])))
    send(there, "and on from here")
    assert body(answer(there)) == "and on from here"
    expect(here.get_by_test_id("message")).to_have_count(4)
    assert body(answer(here)) == "and on from here"


def test_an_image_of_one_server_is_shown_by_the_other(windows: tuple[Visit, Visit]) -> None:
    one, two = windows
    name = one.server.api("POST", "/ui-api/attachments", {"image": encoded(png(RED))})["name"]
    here = one.open()
    send(here, f"look ![red](cid:{name})")
    answer(here)
    there = two.open(here.evaluate("new URLSearchParams(location.search).get('c')"))
    there.wait_for_function("document.querySelector('.sy-message[data-role=user] .sy-body img')?.naturalWidth === 40")

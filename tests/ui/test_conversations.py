"""The list of chats, and two tabs on one chat."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Browser, Page, expect

from tests.ui.conftest import Visit, answer, body, ready, send, start_server, stop_server, wait

if TYPE_CHECKING:
    import pytest

    from tests.ui.conftest import Server


def row(page: Page, title: str) -> object:
    return page.locator(".sy-conversations li", has_text=title)


def choose(page: Page, title: str, action: str) -> None:
    entry = page.locator(".sy-conversations li", has_text=title).first
    entry.hover()
    entry.get_by_test_id("conversation-menu").click()
    page.get_by_role("menuitem", name=action).click()


def test_rename_pin_trash_restore_and_purge(visit: Visit, server: Server) -> None:
    server.import_chat(["an older chat to sort by", "yes"])
    page = visit.open()
    send(page, "a chat about signals")
    answer(page)
    choose(page, "a chat about signals", "Rename")
    page.get_by_role("textbox", name="Rename chat").fill("Signal box Überlingen")
    page.get_by_role("button", name="Rename", exact=True).click()
    expect(page.get_by_test_id("title")).to_have_text("Signal box Überlingen")
    send(page, "[[echo tokens=3]] second")
    answer(page)
    choose(page, "Signal box", "Pin")
    expect(page.locator(".sy-conversations li").first).to_contain_text("Signal box")
    choose(page, "Signal box", "Move to trash")
    expect(page.locator(".sy-conversations li", has_text="Signal box")).to_have_count(0)
    page.get_by_test_id("trash").click()
    choose(page, "Signal box", "Restore")
    expect(page.locator(".sy-conversations li", has_text="Signal box")).to_have_count(0)
    page.get_by_test_id("trash").click()
    expect(page.locator(".sy-conversations li", has_text="Signal box")).to_have_count(1)
    choose(page, "Signal box", "Move to trash")
    page.get_by_test_id("trash").click()
    choose(page, "Signal box", "Delete for ever")
    page.get_by_role("dialog").get_by_role("button", name="Delete for ever").click()
    expect(page.locator(".sy-conversations li", has_text="Signal box")).to_have_count(0)
    assert not any("Signal" in c["title"] for c in server.api("GET", "/ui-api/conversations?trashed=true")["conversations"])


def test_search_looks_into_titles_and_texts(visit: Visit, server: Server) -> None:
    server.import_chat(["what is a funicular", "a cable railway on a slope"])
    server.import_chat(["something else", "entirely"])
    page = visit.open()
    page.get_by_test_id("search").fill("cable")
    expect(page.locator(".sy-conversations li")).to_have_count(1)
    expect(page.locator(".sy-snippet")).to_contain_text("cable")
    page.get_by_test_id("search").fill("no such words at all")
    expect(page.get_by_test_id("conversations")).to_contain_text("Nothing found")


def test_export_and_import_give_the_same_chat(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    send(page, "export me, 🚂 and all")
    answer(page)
    with page.expect_download() as download:
        page.get_by_test_id("chat-menu").click()
        page.get_by_role("menuitem", name="Export as JSON").click()
    file = tmp_path / "chat.json"
    download.value.save_as(file)
    assert "export me, 🚂 and all" in json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False)
    page.get_by_test_id("new-chat").click()
    page.get_by_test_id("import-file").set_input_files(file)
    expect(page.get_by_test_id("message")).to_have_count(2)
    assert body(page.get_by_test_id("message").last).strip() == "export me, 🚂 and all"
    bad = tmp_path / "bad.json"
    bad.write_text("<html>", encoding="utf-8")
    page.get_by_test_id("import-file").set_input_files(bad)
    expect(page.get_by_test_id("toasts")).to_contain_text("not JSON")


def test_two_tabs_show_the_same_chat(visit: Visit) -> None:
    first = visit.open()
    send(first, "seen in both tabs")
    answer(first)
    chat = first.evaluate("new URLSearchParams(location.search).get('c')")
    second = visit.context.new_page()
    visit.watch(second)
    second.goto(f"{visit.server.url}/?c={chat}")
    ready(second)
    send(first, "[[echo tokens=90 rate=60]]")
    expect(second.get_by_test_id("message")).to_have_count(4)
    assert body(answer(second)) == body(answer(first))
    second.get_by_test_id("delete").last.click()
    expect(first.get_by_test_id("message")).to_have_count(3)
    first.get_by_test_id("title").click()
    first.get_by_role("textbox", name="Rename chat").fill("Renamed here")
    first.keyboard.press("Enter")
    expect(second.get_by_test_id("title")).to_have_text("Renamed here")


def test_a_stale_tab_is_asked_and_keeps_both(visit: Visit, server: Server) -> None:
    page = visit.open()
    send(page, "the common start")
    answer(page)
    chat = page.evaluate("new URLSearchParams(location.search).get('c')")
    # A tab that slept: it hears no events, and another one goes on.
    page.route("**/ui-api/events", lambda route: route.abort())
    page.reload()
    ready(page)
    server.api("POST", f"/ui-api/conversations/{chat}/messages", {"text": "from the other tab", "client_id": "other-1"})
    wait(lambda: server.api("GET", f"/ui-api/conversations/{chat}")["messages"][-1]["status"] == "complete")
    send(page, "from the stale tab")
    conflict = page.get_by_test_id("conflict")
    expect(conflict).to_be_visible()
    conflict.get_by_role("button", name="Keep both").click()
    answer(page)
    expect(page.get_by_test_id("message")).to_have_count(4)
    expect(page.get_by_test_id("version").first).to_have_text(re.compile("2/2"))
    page.get_by_test_id("previous-version").first.click()
    wait(lambda: "from the other tab" in body(page.get_by_test_id("message").nth(2)))


def test_a_lost_server_keeps_the_draft_and_the_page_recovers(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lost")
    running = start_server(folder, "--model", "echo")
    context = browser.new_context()
    try:
        opened = Visit(context, running)
        page = opened.open()
        stop_server(running)
        send(page, "typed while the server was away")
        expect(page.get_by_test_id("toasts")).to_contain_text("does not answer")
        expect(page.get_by_test_id("composer")).to_have_value("typed while the server was away")
        expect(page.get_by_role("alert").filter(has_text="reconnects")).to_be_visible()
        assert opened.errors == []
    finally:
        context.close()
        if running.process.poll() is None:
            stop_server(running)

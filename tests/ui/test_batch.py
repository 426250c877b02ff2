"""The Batch page: a file uploaded, answered, paused, gone on with after a reload, fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, Route, expect

from tests.ui.test_layout import PHONE, no_sideways_scroll

if TYPE_CHECKING:
    from tests.ui.conftest import Server, Visit


def batch_file(folder: Path, count: int, text: str = "hello wörld 🙂") -> Path:
    path = folder / "my requests.jsonl"
    lines = []
    for number in range(count):
        body = {"messages": [{"role": "user", "content": f"{text} {number}"}], "max_tokens": 40}
        lines.append(json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    path.write_text("\n".join([*lines, "broken {", ""]), encoding="utf-8")
    return path


def open_page(visit: Visit) -> Page:
    page = visit.open()
    page.evaluate("window.switchyard.page('batch')")
    expect(page.get_by_test_id("batch-choose")).to_be_visible()
    return page


def forget_all(server: Server) -> None:
    for batch in server.api("GET", "/ui-api/batches")["batches"]:
        server.api("POST", f"/ui-api/batches/{batch['id']}/cancel")
        server.api("DELETE", f"/ui-api/batches/{batch['id']}")


def test_upload_and_results(visit: Visit, server: Server, tmp_path: Path) -> None:
    server.load_echo()
    forget_all(server)
    page = open_page(visit)
    expect(page.get_by_test_id("batch-model")).to_have_value("echo")
    page.get_by_test_id("batch-file").set_input_files(batch_file(tmp_path, 6))
    card = page.get_by_test_id("batch-job")
    expect(card).to_have_attribute("data-state", "done", timeout=30_000)
    expect(card).to_contain_text("my requests.jsonl")
    expect(card.get_by_test_id("batch-progress")).to_contain_text("7 of 7 lines · 1 with errors")
    with page.expect_download() as download:
        card.get_by_test_id("batch-results").click()
    assert download.value.suggested_filename == "my requests-results.jsonl"
    found = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert {item["custom_id"] for item in found} == {None, *(f"r{n}" for n in range(6))}
    answer = next(item for item in found if item["custom_id"] == "r2")
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "hello wörld 🙂 2"
    card.get_by_test_id("batch-delete").click()
    page.get_by_role("button", name="Delete", exact=True).last.click()
    expect(card).to_have_count(0)


def test_a_reply_that_comes_after_its_events_changes_nothing(visit: Visit, server: Server, tmp_path: Path) -> None:
    server.load_echo()
    forget_all(server)
    page = open_page(visit)
    card = page.get_by_test_id("batch-job")

    def held(route: Route) -> None:
        reply = route.fetch()
        assert reply.json()["state"] == "waiting"
        expect(card).to_have_attribute("data-state", "done", timeout=30_000)
        route.fulfill(response=reply)

    page.route("**/batches/*/start", held)
    with page.expect_response("**/batches/*/start") as started:
        page.get_by_test_id("batch-file").set_input_files(batch_file(tmp_path, 3))
    started.value.finished()
    expect(page.get_by_test_id("batch-choose")).to_be_enabled()
    expect(card).to_have_attribute("data-state", "done")
    forget_all(server)


def test_pause_reload_and_go_on(visit: Visit, server: Server, tmp_path: Path) -> None:
    server.load_echo()
    forget_all(server)
    page = open_page(visit)
    page.get_by_test_id("batch-file").set_input_files(batch_file(tmp_path, 600, "[[echo tokens=6 rate=2]]"))
    card = page.get_by_test_id("batch-job")
    expect(card).to_have_attribute("data-state", "running", timeout=30_000)
    page = open_page(visit)
    card = page.get_by_test_id("batch-job")
    expect(card).to_have_attribute("data-state", "running")
    card.get_by_test_id("batch-pause").click()
    expect(card).to_have_attribute("data-state", "paused")
    page = open_page(visit)
    expect(page.get_by_test_id("batch-job")).to_have_attribute("data-state", "paused")
    page.get_by_test_id("batch-start").click()
    expect(page.get_by_test_id("batch-job")).to_have_attribute("data-state", "running")
    page.get_by_test_id("batch-cancel").click()
    expect(page.get_by_test_id("batch-job")).to_have_attribute("data-state", "cancelled")
    forget_all(server)


def test_a_file_without_requests_is_refused(visit: Visit, server: Server, tmp_path: Path) -> None:
    server.load_echo()
    forget_all(server)
    page = open_page(visit)
    path = tmp_path / "no.jsonl"
    path.write_text("this is\nno batch\n", encoding="utf-8")
    page.get_by_test_id("batch-file").set_input_files(path)
    expect(page.locator(".sy-toast").last).to_contain_text("No line of the file is a request. Line 1")
    expect(page.get_by_test_id("batch-job")).to_have_attribute("data-state", "uploading")
    forget_all(server)


@pytest.mark.parametrize("visit", [{}, PHONE], indirect=True, ids=["desktop", "phone"])
def test_nothing_sticks_out(visit: Visit, server: Server, tmp_path: Path) -> None:
    server.load_echo()
    forget_all(server)
    page = open_page(visit)
    page.get_by_test_id("batch-file").set_input_files(batch_file(tmp_path, 3))
    expect(page.get_by_test_id("batch-job")).to_have_attribute("data-state", "done", timeout=30_000)
    page.locator("summary", has_text="The format").click()
    no_sideways_scroll(page)
    if pictures := os.environ.get("SWITCHYARD_PICTURES"):
        page.screenshot(path=Path(pictures) / f"batch-{page.viewport_size['width']}.png", full_page=True)
    forget_all(server)

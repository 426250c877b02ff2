"""Other servers on the Models page: added with a key, seen, chatted with, removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from tests.api.conftest import Server as FarServer
from tests.certificates import Authority
from tests.ui.conftest import answer, ready, send
from tests.ui.test_layout import PHONE, no_sideways_scroll
from tests.unit.far_server import far_server
from tests.unit.proxy_server import proxy_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.ui.conftest import Server, Visit

KEY = "a-key-of-the-far-server"


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarServer]:
    server = FarServer(tmp_path_factory.mktemp("far"), "--api-key", KEY)
    yield server
    server.stop()


def open_page(visit: Visit) -> Page:
    page = visit.open()
    page.evaluate("window.switchyard.page('models')")
    expect(page.get_by_test_id("remote-form")).to_be_visible()
    return page


def test_a_server_is_added_used_and_removed(visit: Visit, server: Server, far: FarServer) -> None:
    page = open_page(visit)
    page.get_by_test_id("remote-name").fill("far")
    page.get_by_test_id("remote-key").fill(KEY)
    page.get_by_test_id("remote-url").fill("http://169.254.169.254/latest")
    page.get_by_test_id("remote-add").click()
    expect(page.get_by_test_id("remote-form").get_by_role("alert")).to_contain_text("no such server can be")
    expect(page.get_by_test_id("remote-row")).to_have_count(0)
    page.get_by_test_id("remote-url").fill(far.url)
    page.get_by_test_id("remote-add").click()
    row = page.get_by_test_id("remote-row")
    expect(row).to_contain_text("Answers", timeout=30_000)
    expect(row).to_contain_text("key saved")
    expect(row).to_contain_text("remote/far/echo")
    expect(page.get_by_test_id("remote-key")).to_have_value("")
    assert KEY not in page.content()
    no_sideways_scroll(page)
    model = page.locator("[data-testid=model-row][data-model='remote/far/echo']")
    expect(model).to_be_visible(timeout=30_000)
    server.api("POST", "/ui-api/models/load", {"model": "remote/far/echo"})
    page.evaluate("window.switchyard.page('chat')")
    ready(page)
    send(page, "hello over there")
    expect(answer(page)).to_contain_text("hello over there")
    page.evaluate("window.switchyard.page('models')")
    row.get_by_test_id("remote-remove").click()
    page.get_by_role("button", name="Remove", exact=True).last.click()
    expect(page.get_by_test_id("remote-row")).to_have_count(0)
    expect(model).to_have_count(0, timeout=30_000)
    server.load_echo()


def test_a_server_with_its_own_certificates_behind_a_proxy(visit: Visit, tmp_path: Path) -> None:
    authority = Authority()
    pem = tmp_path / "ca.pem"
    pem.write_text(authority.pem, encoding="ascii")
    with far_server(authority.server(tmp_path, "127.0.0.1")) as far, proxy_server() as proxy:
        proxy.user = "me:s3cret"
        page = open_page(visit)
        page.get_by_test_id("remote-name").fill("private")
        page.get_by_test_id("remote-url").fill(far.url)
        page.get_by_text("Proxy and certificates").click()
        page.get_by_test_id("remote-proxy").fill("socks5://127.0.0.1:1080")
        page.get_by_test_id("remote-add").click()
        expect(page.get_by_test_id("remote-form").get_by_role("alert")).to_contain_text("SOCKS")
        page.get_by_test_id("remote-proxy").fill(proxy.url("me:s3cret"))
        page.get_by_test_id("remote-ca-file").set_input_files(pem)
        expect(page.get_by_test_id("remote-ca")).to_have_value(authority.pem)
        page.get_by_test_id("remote-add").click()
        row = page.locator("[data-testid=remote-row][data-server=private]")
        expect(row).to_contain_text("Answers", timeout=30_000)
        expect(row).to_contain_text(f"certificates of its own · through {proxy.url()}")
        expect(page.get_by_test_id("remote-proxy")).to_have_value("")
        assert "s3cret" not in page.content() and proxy.asked
        no_sideways_scroll(page)
        row.get_by_test_id("remote-remove").click()
        page.get_by_role("button", name="Remove", exact=True).last.click()
        expect(row).to_have_count(0)


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_the_form_on_a_phone(visit: Visit, server: Server) -> None:
    page = open_page(visit)
    page.get_by_test_id("remote-form").scroll_into_view_if_needed()
    no_sideways_scroll(page)
    box = page.get_by_test_id("remote-add").bounding_box()
    assert box is not None and box["height"] >= 44

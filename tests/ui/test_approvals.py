"""Under --model-switch ask the page asks before an API request may load a model; the request waits meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.ui.conftest import Visit, start_server, stop_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.ui.conftest import Server


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("asking server"), "--no-model", "--model-switch", "ask")
    yield running
    stop_server(running)


@pytest.fixture
def page_of(asking: Server, browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield Visit(context, asking)
    context.close()


def ask(server: Server, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    body: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "still there"}]}
    return pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=120)


def test_the_page_asks_and_the_request_goes_on_or_is_refused(page_of: Visit) -> None:
    page, server = page_of.open(), page_of.server
    banner = page.get_by_test_id("approvals")
    expect(banner).to_have_text("")
    with ThreadPoolExecutor() as pool:
        refused = ask(server, pool)
        expect(banner).to_contain_text("1 API request asks for echo, which is not loaded.")
        banner.get_by_role("button", name="Refuse").click()
        reply = refused.result(60)
        assert reply.status_code >= 400 and "echo" in reply.json()["error"]["message"]
        expect(banner).to_have_text("")

        both = [ask(server, pool), ask(server, pool)]
        expect(banner).to_contain_text("2 API requests ask for echo, which is not loaded.")
        assert not any(request.done() for request in both)
        banner.get_by_role("button", name="Load it").click()
        for request in both:
            answer = request.result(60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == "still there"
        expect(banner).to_have_text("")
        assert ask(server, pool).result(60).status_code == 200  # it is loaded now: nobody is asked
    assert page_of.errors == []

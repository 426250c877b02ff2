"""A real server with the echo loader, and a real browser: what every test of the page drives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
CHECKS = re.sub(r"\A//.*\n", "", (Path(__file__).parent / "checks.js").read_text(encoding="utf-8")).strip()
CHROMIUM = next(
    (
        path
        for path in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("google-chrome"))
        if path and Path(path).exists()
    ),
    None,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.ui)
            if CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="there is no Chromium on this machine"))


@dataclass
class Server:
    """A running server.py. `api` speaks JSON to it."""

    url: str
    process: subprocess.Popen[str]
    data: Path

    def api(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if text else None

    def load_echo(self, **options: Any) -> None:
        """The echo model, freshly loaded and ready."""
        resident = self.api("POST", "/ui-api/models/load", {"model": "echo", "loader": "echo", "options": options})["resident"]
        wait(
            lambda: any(
                r["id"] == resident["id"] and r["state"] == "ready" for r in self.api("GET", "/ui-api/models")["residents"]
            )
        )

    def import_chat(self, texts: list[str]) -> str:
        """A stored chat of these messages, user and answer in turn; its id."""
        pairs = [texts[at : at + 2] for at in range(0, len(texts), 2)]
        return str(self.api("POST", "/ui-api/conversations/import", {"internal": pairs})["id"])


def wait(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Poll until true; the value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("the condition did not come true in time")


def start_server(folder: Path, *flags: str, root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> Server:
    """server.py of `root` on a free port, its data below `folder` (with a space and an umlaut in its path)."""
    data = folder / "user dätä"
    presets = folder / "presets"
    presets.mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    command = [
        sys.executable,
        str(root / "server.py"),
        "--listen-port",
        "0",
        "--user-data-dir",
        str(data),
        "--preset-dir",
        str(presets),
    ]
    command += ["--model-dir", str(folder / "models"), "--no-background-install", *flags]
    variables = {**environment, "PYTHONUNBUFFERED": "1"}
    log = (folder / "server.log").open("a", encoding="utf-8")
    process = subprocess.Popen(command, cwd=root, env=variables, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8")
    log.close()
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http" not in line:
        process.kill()
        raise AssertionError(f"the server did not start: {line!r} {(folder / 'server.log').read_text(encoding='utf-8')[-3000:]}")
    server = Server(line[line.index("http") :].strip().split("?")[0].rstrip("/"), process, data)
    try:
        wait(lambda: _health(server).get("ui") == "ready", 120)
    except BaseException:
        stop_server(server)
        raise
    return server


def stop_server(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(20)
    finally:
        server.process.kill()
        server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()


def _health(server: Server) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            return dict(json.loads(answer.read()))
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.loads(error.read()))


# Package scope, not session: Playwright's event loop would be in the way of the asyncio tests that come after these.
@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("ui server"), "--model", "echo")
    yield running
    stop_server(running)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """One browser window on the page, with what went wrong in it."""

    def __init__(self, context: BrowserContext, server: Server) -> None:
        self.context = context
        self.server = server
        self.page = context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.watch(self.page)

    def watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, chat: str | None = None) -> Page:
        self.page.goto(f"{self.server.url}/" + (f"?c={chat}" if chat else ""))
        ready(self.page)
        return self.page

    def off_host(self) -> list[str]:
        return [url for url in self.requests if not url.startswith((self.server.url, "data:", "blob:"))]


def ready(page: Page) -> None:
    page.wait_for_selector(".sy-chat[data-ready]", timeout=30_000)


def choices(page: Page) -> Locator:
    """The entries of the dropdown that is open (a plain <select>'s options are no part of it)."""
    return page.get_by_role("listbox").get_by_role("option")


def choose(page: Page, dropdown: str, name: str) -> None:
    """Open this dropdown of Gradio's and take the first entry that has these words."""
    page.locator(f"{dropdown} input").click()
    choices(page).filter(has_text=name).first.click()


def send(page: Page, text: str) -> None:
    page.get_by_test_id("composer").fill(text)
    page.get_by_test_id("send").click()


def answer(page: Page, status: str = "complete", timeout_ms: float = 20_000) -> Any:
    """The last message, once it is an answer in this status."""
    page.wait_for_selector(f".sy-message:last-child[data-role=assistant][data-status={status}]", timeout=timeout_ms)
    return page.get_by_test_id("message").last


def growing(page: Page, length: int) -> str:
    """The text of the answer that is being written, once it is longer than this."""
    selector = ".sy-message:last-child[data-role=assistant][data-status=generating] .sy-body"
    page.wait_for_function(f"(document.querySelector('{selector}')?.textContent.length ?? 0) > {length}")
    return str(page.locator(selector).text_content())


def check(page: Page, name: str, *arguments: Any) -> Any:
    """Run one function of checks.js in the page."""
    return page.evaluate(f"(args) => ({CHECKS}).{name}(...args)", list(arguments))


def body(message: Any) -> str:
    return str(message.locator(".sy-body").text_content()).strip()


@pytest.fixture
def visit(browser: Browser, server: Server, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh window at 1280 × 800; parametrize `visit` indirectly with context options for another one."""
    options = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light", **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.set_default_timeout(15_000)
    expect.set_options(timeout=15_000)
    opened = Visit(context, server)
    yield opened
    context.close()
    assert opened.errors == []
    assert opened.off_host() == []

"""A backend that is missing is installed from the Models page: a real pip makes a real environment, from wheels of the test."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from modules.overlays import site_packages, write_json
from tests import pip_lab
from tests.ui.conftest import ROOT, Server, Visit, start_server, stop_server

INSTALLED_MS = 120_000  # an upper bound: a virtual environment and pip, on a busy machine


@dataclass
class Shelf:
    """A page of wheels for pip's --find-links. A wheel in `held` is not given before its event is set."""

    folder: Path
    held: dict[str, threading.Event] = field(default_factory=dict)
    asked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                shelf.give(self, self.path.strip("/"))

            def log_message(self, *_: object) -> None:
                """Not into the test's output."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def give(self, to: BaseHTTPRequestHandler, name: str) -> None:
        if name in self.held:
            self.asked.set()
            self.held[name].wait()
        names = [path.name for path in self.folder.glob("*.whl")]
        body = (self.folder / name).read_bytes() if name in names else "".join(f'<a href="{n}">{n}</a>' for n in names).encode()
        to.send_response(200)
        to.send_header("Content-Type", "application/octet-stream" if name in names else "text/html")
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    def close(self) -> None:
        for event in self.held.values():
            event.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Place:
    server: Server
    shelf: Shelf
    env_dir: Path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A user's folder: the program with environments of its own, of which one is not there and is small."""
    root = tmp_path / "Switchyard of üser"
    for name in ("modules", "loaders", "extensions"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("server.py", "requirements.txt"):
        shutil.copy2(ROOT / name, root / name)
    requirements = root / "loaders" / "requirements"
    shutil.rmtree(requirements / "locks")
    (requirements / "rwkv.txt").write_text("# title: RWKV\n# size-mb: 1\nrwkv==7.7\n", encoding="utf-8")
    environments = root / "installer_files" / "sets" / "first"
    write_json(environments / "set.json", {"made": "by the test"})
    shelf = Shelf(tmp_path / "wheels")
    for name in ("torch", "safetensors", "tokenizers"):
        pip_lab.make_wheel(shelf.folder, name)
    variables = pip_lab.environment(tmp_path / "pip.conf", shelf.url)
    variables |= {"SWITCHYARD_SET": str(environments), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    server = start_server(tmp_path, "--model", "echo", root=root, environment=variables)
    try:
        yield Place(server, shelf, environments / "rwkv")
    finally:
        shelf.close()
        stop_server(server)


@pytest.fixture
def page(place: Place, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    visit = Visit(context, place.server)
    opened = visit.open()
    opened.get_by_test_id("page-models").click()
    yield opened
    context.close()
    assert visit.errors == [] and visit.off_host() == []


def backend(page: Page) -> Locator:
    return page.locator("[data-testid=loader-row][data-loader=rwkv]")


def test_a_missing_backend_is_installed_from_the_page(page: Page, place: Place) -> None:
    here = backend(page).get_by_test_id("install-here")
    expect(backend(page)).to_contain_text("Not installed")
    here.get_by_test_id("install").click()
    expect(here.locator(".sy-card-error")).to_contain_text("no package rwkv==7.7 fits", timeout=INSTALLED_MS)

    needs = "torch\nRequires-Dist: safetensors\nRequires-Dist: tokenizers"
    wheel = pip_lab.make_wheel(place.shelf.folder, "rwkv", "7.7", needs)
    release = place.shelf.held[wheel.name] = threading.Event()
    here.get_by_test_id("install").click()
    assert place.shelf.asked.wait(INSTALLED_MS / 1000), "pip did not come for the wheel"
    expect(here.get_by_role("progressbar")).to_be_visible()
    expect(here).to_contain_text("Installing: rwkv")
    here.locator("summary").click()
    lines = re.compile(r"making a virtual environment.*no package rwkv==7\.7 fits.*\nrwkv\b", re.DOTALL)
    expect(here.locator("pre")).to_have_text(lines, use_inner_text=True)
    expect(page.get_by_test_id("install-bar")).to_contain_text("Installing RWKV rwkv")
    page.reload()
    page.get_by_test_id("page-models").click()
    expect(here).to_contain_text("Installing: rwkv")  # who comes later sees it, too

    release.set()
    expect(backend(page)).to_contain_text("Ready", timeout=INSTALLED_MS)
    expect(page.get_by_test_id("install-bar")).to_contain_text("RWKV is installed")
    expect(here).to_have_count(0)
    site = site_packages(place.env_dir)
    assert site is not None and {"rwkv.py", "torch.py", "tokenizers.py"} <= {path.name for path in site.iterdir()}

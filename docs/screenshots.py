"""Pictures of the page for the documentation, taken from a real server with a real model.

    python docs/screenshots.py [--model NAME] [--out docs/images]

Runs in the environment of the tests. Every answer in the pictures is what the model wrote.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from tests.ui.conftest import CHROMIUM, FLAGS, Server, ready, start_server, stop_server  # noqa: E402

PROMPTS = ("Hello! What can you do?", "What is GPTQ?", "Tell me a short story about a lighthouse.")
SIZES = {"1280": {"width": 1280, "height": 800}, "390": {"width": 390, "height": 844}}


def ask(page: Page, text: str) -> None:
    page.get_by_test_id("composer").fill(text)
    before = page.get_by_test_id("message").count()
    page.get_by_test_id("send").click()
    selector = f".sy-message:nth-child({before + 2})[data-status=complete]"
    page.wait_for_selector(selector, timeout=600_000)


def take(browser: Browser, server: Server, chat: str, size: str, scheme: str, out: Path) -> None:
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, has_touch=size == "390", is_mobile=size == "390")  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{server.url}/?c={chat}")
    ready(page)
    page.wait_for_timeout(800)
    page.screenshot(path=out / f"chat-{scheme}-{size}.png")
    if scheme == "light":
        page.get_by_test_id("parameters").click()
        page.wait_for_timeout(400)
        page.screenshot(path=out / f"parameters-{scheme}-{size}.png")
        page.get_by_test_id("parameters").click()
        page.get_by_test_id("page-models").click()
        page.wait_for_timeout(600)
        page.screenshot(path=out / f"models-{scheme}-{size}.png")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name in the models folder; default: the bundled one")
    parser.add_argument("--model-dir", default=str(ROOT / "models"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    flags = ["--model-dir", arguments.model_dir, *(["--model", arguments.model] if arguments.model else [])]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = start_server(Path(folder), *flags)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport=SIZES["1280"])  # type: ignore[arg-type]
            page.goto(server.url)
            ready(page)
            page.wait_for_selector("[data-testid=model-state][data-state=ready]", timeout=180_000)
            for prompt in PROMPTS:
                ask(page, prompt)
                time.sleep(0.5)
            chat = page.evaluate("new URLSearchParams(location.search).get('c')")
            page.close()
            for size in SIZES:
                for scheme in ("light", "dark"):
                    take(browser, server, chat, size, scheme, arguments.out)
        finally:
            browser.close()
            stop_server(server)


if __name__ == "__main__":
    main()

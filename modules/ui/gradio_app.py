"""The page put together, and its place in the server.

Importing this module imports Gradio, which takes seconds: the server does it in a thread after it has started to listen.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read by Gradio at import: no look-ups of strangers' hosts, no run history.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

import gradio as gr
from gradio.routes import App
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from modules.ui.access import Access
from modules.ui.batch_tab import batch_tab
from modules.ui.evaluate_tab import evaluate_tab
from modules.ui.models import QUIET, ModelBar, load_options_form
from modules.ui.parameters import ParameterPanel
from modules.ui.quantize_tab import quantize_tab
from modules.ui.settings_page import SettingsPage
from modules.ui.theme import make_theme
from modules.ui.views import backends_view, chat_view, models_view, remotes_view, shell_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI
    from starlette.responses import Response
    from starlette.types import Scope

    from modules.services import Services
STATIC = Path(__file__).parent / "static"
STYLES = ("tokens", "shell", "chat", "message", "models", "library", "measure", "gradio")
HEAD = "\n".join(f'<link rel="stylesheet" href="./ui-static/css/{name}.css">' for name in STYLES) + (
    '\n<link rel="icon" type="image/svg+xml" href="./ui-static/icon.svg">'
    '\n<link rel="modulepreload" href="./ui-static/js/chatview.js">'
    '\n<link rel="modulepreload" href="./ui-static/js/shell.js">'
)
# Gradio 6.31 polls its queue every millisecond, 6-7 % of a core for ever; at these intervals it is under 2 %.
QUEUE_POLL_S = 0.02
PROGRESS_POLL_S = 0.1
KINDS = {
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".md": "text/plain; charset=utf-8",
}
SESSIONS = 100  # each opened page costs about 113 KB, kept for an hour


class UiStatic(StaticFiles):
    """The page's own files. Revalidated on every load, so that an update never mixes old and new modules."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "no-cache"
        # Windows' registry may call a .js file text/plain, which a browser refuses to run.
        response.headers["Content-Type"] = KINDS.get(Path(full_path).suffix, "application/octet-stream")
        return response


def build_blocks(services: Services) -> gr.Blocks:
    """The whole page. Everything it shows is filled by `load`, so a reload never shows stale values."""
    access = Access(services)
    with gr.Blocks(title="Switchyard", fill_width=True, analytics_enabled=False) as blocks:
        shell = shell_view()
        bar = ModelBar(access)
        with gr.Tabs(elem_id="sy-tabs", selected="chat"):
            with gr.Tab("Chat", id="chat", elem_id="sy-page-chat"):
                chat_view()
            with gr.Tab("Models", id="models", elem_id="sy-page-models"):
                models_view()
                options = load_options_form(access)
                remotes_view()
                backends_view()
            with gr.Tab("Quantise", id="quantize", elem_id="sy-page-quantize"):
                quantize_tab()
            with gr.Tab("Evaluate", id="evaluate", elem_id="sy-page-evaluate"):
                evaluate_tab()
            with gr.Tab("Batch", id="batch", elem_id="sy-page-batch"):
                batch_tab()
            with gr.Tab("Settings", id="settings", elem_id="sy-page-settings"):
                settings = SettingsPage(access)
        panel = ParameterPanel(access)
        bar.wire(options)
        panel.wire()
        bar.follow(blocks, shell, panel)
        blocks.load(panel.fill, None, panel.outputs, **QUIET)
        blocks.load(settings.fill, None, settings.outputs, **QUIET)
        changed = shell.settings_changed(panel.fill, None, panel.outputs, **QUIET)
        changed = changed.then(settings.fill, None, settings.outputs, **QUIET)
        changed.then(None, None, None, js="() => { window.switchyard.settingsFilled(); }", **QUIET)
    return blocks


def mount(app: FastAPI, services: Services) -> Mounted:
    """Add the page to a running server, behind every route it has. Slow: call it in a thread, then await `start`."""
    with _no_spare_apps():
        blocks = build_blocks(services)
    blocks._queue.sleep_when_free = QUEUE_POLL_S
    blocks._queue.progress_update_sleep_when_free = PROGRESS_POLL_S
    blocks.state_session_capacity = SESSIONS
    app.mount("/ui-static", UiStatic(directory=STATIC), name="ui-static")
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        pwa=False,
        ssr_mode=False,
        show_error=False,
        theme=make_theme(),
        head=HEAD,
    )
    mounted = Mounted(app, blocks)
    blocks.app = mounted.gradio
    return mounted


@contextlib.contextmanager
def _no_spare_apps() -> Iterator[None]:
    """Blocks make an application when they begin and when they end, mounting makes a third: only that one ever answers.

    The description of the page is made three times, too; mounting makes its own. Each costs up to a tenth of a second
    (internal to Gradio: tests/ui covers it).
    """
    create, describe = App.create_app, gr.Blocks.get_config_file
    App.create_app = staticmethod(lambda *_, **__: None)
    gr.Blocks.get_config_file = lambda _: {}
    try:
        yield
    finally:
        App.create_app = staticmethod(create)
        gr.Blocks.get_config_file = describe


class Mounted:
    """The mounted page. The server's own start-up is over by then, so Gradio's has to be run by hand."""

    def __init__(self, app: FastAPI, blocks: gr.Blocks) -> None:
        self.gradio: Any = next(route.app for route in reversed(app.routes) if isinstance(route, Mount) and route.path == "")
        self._blocks = blocks
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Run what the Gradio app does at start-up (internal to Gradio: tests/ui covers it)."""
        await self._stack.enter_async_context(self.gradio.router.lifespan_context(self.gradio))
        self._blocks.run_startup_events()
        await self._blocks.run_extra_startup_events()

    async def close(self) -> None:
        self._blocks._queue.close()
        await self._stack.aclose()

"""The server: routes, splash page, start and end.

The order of the start is what makes it fast: bind the port, open the store, answer the API and a splash page; only then load
the first model and import Gradio (seconds), both in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from fastapi import FastAPI
from starlette.responses import FileResponse, HTMLResponse

from modules.api import (
    anthropic_routes,
    body_schema,
    conformance_routes,
    docs_page,
    embeddings,
    errors,
    examples,
    health,
    internal_routes,
    kobold_routes,
    llama_server_routes,
    metrics,
    ollama_routes,
    openai_routes,
    responses,
    splash,
    ui_routes,
)
from modules.api.access import AccessControl
from modules.api.batch_lines import answer_line
from modules.api.http_protocol import DeadlineProtocol
from modules.api.middleware import Guard, Hosts
from modules.batch.jobs import BatchJobs
from modules.chat.places import passwords
from modules.chat.service import ChatService
from modules.command_line import print_problem
from modules.errors import AppError, ConfigError
from modules.logs import set_up
from modules.wiring import build_services, end_streams, running

if TYPE_CHECKING:
    from types import FrameType

    from modules.config import Config
    from modules.services import Services

log = logging.getLogger(__name__)
T = TypeVar("T")

# Kobold's /api/v1 and /api/extra before Ollama's /api; none of them clashes with Gradio, which is mounted behind all of them.
PROTOCOLS = (
    openai_routes,
    responses,
    embeddings,
    anthropic_routes,
    kobold_routes,
    ollama_routes,
    llama_server_routes,
    internal_routes,
    conformance_routes,
)
ICON = Path(__file__).parent / "ui" / "static" / "icon.svg"
SAME_SIGNAL_S = 0.5  # a terminal and a start script that passes it on may both deliver one Ctrl-C
GRACE_S = 2  # for streams that don't end by themselves, after all generations have been stopped


def build_app(config: Config, services: Services | None = None) -> FastAPI:
    """The application with everything wired, the guard in front included. Its lifespan starts and ends the services."""
    services = services or build_services(config)
    access = AccessControl.of(config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(services):
            page = asyncio.create_task(_bring_page(app, services)) if services.ui_state == "starting" else None
            if page is None:
                _started()
            try:
                yield
            finally:
                if page is not None:
                    page.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await page

    app = FastAPI(
        title="Switchyard",
        description="One API for every local LLM backend.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.services = services
    app.state.access = access
    errors.install(app)
    app.include_router(health.build_router(services))
    figures = metrics.Metrics(services)
    services.runs.on_end = figures.ended
    app.include_router(metrics.build_router(figures))
    for protocol in PROTOCOLS:
        app.include_router(protocol.build_router(services))
    services.chat = services.chat or ChatService(services)
    services.batches = services.batches or BatchJobs(services, config.user_data_dir / "batches", answer_line)
    app.include_router(ui_routes.build_router(services))
    body_schema.install(app)
    body_schema.install(app)
    examples.install(app)
    app.include_router(access.build_router())
    # Before the page is there, and without it: a browser asks for one on any of our own pages.
    app.add_api_route("/favicon.ico", _icon, include_in_schema=False, methods=["GET", "HEAD"])
    app.add_api_route("/docs", _docs, include_in_schema=False, methods=["GET", "HEAD"])
    if not config.nowebui:
        services.ui_state = "starting"
        app.add_api_route("/", _splash, include_in_schema=False, methods=["GET", "HEAD"])
    own = [] if config.host in ("0.0.0.0", "::") else [config.host]
    hosts = Hosts([*config.allowed_hosts, *own], loopback_only=config.is_loopback)
    app.add_middleware(
        Guard,
        access=access,
        hosts=hosts,
        origins=config.allowed_origins,
        max_body_bytes=config.max_body_mb << 20,
        on_response=figures.responded,
    )
    return app


async def _icon() -> FileResponse:
    return FileResponse(ICON, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})


async def _docs() -> HTMLResponse:
    return HTMLResponse(docs_page.PAGE)


async def _splash() -> HTMLResponse:
    return HTMLResponse(splash.PAGE, headers={"Cache-Control": "no-store"})


async def _bring_page(app: FastAPI, services: Services) -> None:
    """Import Gradio in a thread, mount the page behind every other route, and take the splash page away."""
    mounted: Any = None

    def build() -> Any:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from modules.ui.gradio_app import mount

        return mount(app, services)

    try:
        mounted = await _in_daemon_thread(build)
        await mounted.start()
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "endpoint", None) is not _splash]
        services.ui_state = "ready"
        log.info("the page is ready")
        await _in_daemon_thread(_started)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise
    except Exception:
        services.ui_state = "failed"
        log.exception("the page could not be loaded; the API works")
        _started()
    finally:
        if mounted is not None:
            await mounted.close()


def _started() -> None:
    """Collect garbage from here on; what the start made stays and is looked through no more."""
    if not gc.isenabled():
        gc.collect()
        gc.freeze()
        gc.enable()


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """`work` in a thread that the end of the server does not wait for: Gradio's import takes seconds."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="page", daemon=True).start()
    return await future


# --- serving -------------------------------------------------------------------------------------------------------


def serve(config: Config) -> int:
    """Run until a signal; the process's exit status. Problems are one line on stderr."""
    try:
        secrets = [key for key in (config.api_key, config.admin_key, *passwords(config.database_url)) if key]
    except ConfigError as error:
        return print_problem(error)
    set_up(config.user_data_dir / "logs", verbose=config.verbose, secrets=secrets)
    gc.disable()  # until `_started`: nearly all that an import makes stays, and looking through it takes a tenth of the start
    try:
        listener = bind(config.host, config.listen_port)
    except OSError as error:
        print(f"Switchyard: {busy_message(config.host, config.listen_port, error)}", file=sys.stderr)
        return 1
    _raise_file_limit()
    with contextlib.closing(listener):
        try:
            return asyncio.run(_serve(config, listener))
        except AppError as error:
            print(f"Switchyard: {error}", file=sys.stderr)
            return 1


async def _serve(config: Config, listener: socket.socket) -> int:
    app = build_app(config)
    services: Services = app.state.services
    settings = uvicorn.Config(
        app,
        http=DeadlineProtocol,
        ws="none",
        lifespan="off",
        access_log=config.verbose,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=65_536,
        backlog=1024,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        root_path=config.subpath,
        proxy_headers=False,
    )
    server = Server(settings, services)
    async with app.router.lifespan_context(app):
        access: AccessControl = app.state.access
        port = listener.getsockname()[1]
        url = access.login_url(_url(config, port))
        print(f"Switchyard: {url}", flush=True)
        if config.auto_launch:
            asyncio.get_running_loop().call_soon(_open_browser, url)
        await server.serve(sockets=[listener])
    return 0


def _url(config: Config, port: int) -> str:
    """Port 0 asks the system for one."""
    return config.url.replace(":0", f":{port}", 1) if config.listen_port == 0 else config.url


def _open_browser(url: str) -> None:
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


class Server(uvicorn.Server):
    """Ends in an orderly way on the first SIGINT or SIGTERM, at once on the second; the exit status is then our own."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._signalled_at: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again afterwards."""
        names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last one is Windows' Ctrl-Break
        watched = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.signal(number, self.handle_exit) for number in watched}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self.should_exit = True
        elif now - self._signalled_at > SAME_SIGNAL_S:
            for resident in self._services.manager.residents():
                with contextlib.suppress(AppError, OSError):
                    pid = self._services.manager.client(resident.id).pid
                    if pid is not None:
                        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            os._exit(130)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await end_streams(self._services)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A bound, listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where it sees that it is TCP: else each stream begins 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def busy_message(host: str, port: int, error: OSError) -> str:
    """One line that names the port and what to do."""
    if error.errno in (errno.EADDRINUSE, 10048):
        return f"port {port} is in use on {host}{_owner(port)}. Stop that program, or use another port: --listen-port {port + 1}"
    if error.errno in (errno.EACCES, 10013):
        return f"port {port} may not be opened by this user. Use a port above 1023: --listen-port 7860"
    return f"{host} port {port} can't be opened: {error.strerror}. Check --listen-host and --listen-port."


def _owner(port: int) -> str:
    """ " by NAME (process N)" where the system tells."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:  # other users' processes may not be looked at
        return ""
    return ""


def _raise_file_limit() -> None:
    """Hundreds of streams need hundreds of descriptors; many systems start with 1024 or 256."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        if soft < wanted:
            with contextlib.suppress(ValueError, OSError):  # a system may still say no; the old limit then holds
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

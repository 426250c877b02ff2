"""A real HTTP proxy: CONNECT tunnels and plain forwarding, with a password if asked for one."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class _Handler(BaseHTTPRequestHandler):
    server: ProxyServer

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        self._through(host, int(port), b"", tunnel=True)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        kept = [f"{k}: {v}" for k, v in self.headers.items() if not k.lower().startswith(("proxy-", "connection"))]
        head = "\r\n".join([f"{self.command} {parts.path} HTTP/1.1", *kept, "Connection: close", "", ""])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._through(parts.hostname or "", parts.port or 80, head.encode("latin-1") + body, tunnel=False)

    do_POST = do_GET

    def _through(self, host: str, port: int, first: bytes, *, tunnel: bool) -> None:
        self.close_connection = True
        given = self.headers.get("Proxy-Authorization", "")
        self.server.asked.append((self.command, f"{host}:{port}"))
        if self.server.user is not None and given != f"Basic {base64.b64encode(self.server.user.encode()).decode()}":
            self.send_response(407, f"Proxy wants more than {self.server.user}")
            self.send_header("Proxy-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            far = socket.create_connection((self.server.names.get(host, host.strip("[]")), port), timeout=30)
        except OSError:
            self.send_error(502)
            return
        with far:
            far.settimeout(None)
            if tunnel:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            far.sendall(first)
            up = threading.Thread(target=_pump, args=(self.connection, far), daemon=True)
            up.start()
            _pump(far, self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test reads `server.asked`."""


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Bytes from one to the other until either ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for side in (source, target):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


class ProxyServer(ThreadingHTTPServer):
    """`asked`: (method, host:port) as they came. `names`: what it knows names to be. `user`: name:password that it wants."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str]] = []
        self.names: dict[str, str] = {}
        self.user: str | None = None

    def url(self, user: str = "") -> str:
        return f"http://{user + '@' if user else ''}127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""


@contextlib.contextmanager
def proxy_server() -> Iterator[ProxyServer]:
    server = ProxyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

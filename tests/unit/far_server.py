"""A server that does what a test tells it: the far end of the remote loader, with every fault of such servers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request. `body` is its JSON; the helpers write whole answers and pieces of streams."""

    server: FarServer
    body: Any = None

    def do_GET(self) -> None:
        self.server.requests.append((self.path, None, dict(self.headers)))
        answer = self.server.routes.get(self.path)
        if answer is not None:
            answer(self)
        elif self.path == "/v1/models":
            self.send_json({"data": [{"id": name, "owned_by": self.server.owner} for name in self.server.models]})
        else:
            self.send_json({"error": "nothing here"}, 404)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.body, dict(self.headers)))
        self.server.routes.get(self.path, lambda h: h.send_json({"error": {"message": "nothing here"}}, 404))(self)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send_bytes(json.dumps(value).encode(), "application/json", status, **headers)

    def send_bytes(self, data: bytes, kind: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """A stream that ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True

    def piece(self, **choice: Any) -> None:
        self.data(json.dumps({"choices": [{"index": 0, **choice}]}).encode())

    def data(self, data: bytes) -> None:
        self.wfile.write(b"data: " + data + b"\n\n")
        self.wfile.flush()

    def wait_for_end(self) -> None:
        """Until the client has closed its side."""
        with contextlib.suppress(OSError):
            while self.connection.recv(1024):
                continue

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test reads `server.requests`."""


class FarServer(ThreadingHTTPServer):
    """`routes`: path -> what it does. `requests`: (path, body, headers) as they came. `closed` is set by a route that waits."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http" if tls is None else "https"
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.models = ["m"]
        self.owner = "somebody"
        self.routes: dict[str, Answer] = {}
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.closed = threading.Event()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/v1"

    def asked(self, path: str) -> list[Any]:
        return [body for where, body, _ in self.requests if where == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


@contextlib.contextmanager
def far_server(tls: ssl.SSLContext | None = None) -> Iterator[FarServer]:
    server = FarServer(tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()

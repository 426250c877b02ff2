"""What stands in front of everything (D5, D7-D9, D11-D14, A30), with raw sockets: client libraries tidy too much."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from modules.api.access import AccessControl
from modules.api.middleware import Guard
from modules.errors import RequestTimeout, TooManyRequests, Unauthorized

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.conftest import Server

Launch = Callable[..., "Server"]
BODY = json.dumps({"messages": [{"role": "user", "content": "x"}]})
PATHS = ["/", "/health", "/v1/models", "/ui-api/models", "/ui-api/events", "/ui-static/js/chatview.js"]


def ask(server: Server, path: str = "/health", method: str = "GET", body: str = "", **headers: str) -> int:
    """The status of one hand-written request; `headers` with _ for -; Host is ours unless given (an empty Host is none)."""
    lines = {"host": f"127.0.0.1:{server.port}", "connection": "close", **{k.replace("_", "-"): v for k, v in headers.items()}}
    if body:
        lines.setdefault("content-type", "application/json")
        lines["content-length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    answer = server.raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n{body}".encode("latin-1"))
    return int(answer.split(b" ", 2)[1])


def requests_seen(server: Server) -> int:
    """Conversations, which a POST that got through would add to."""
    return len(server.http.get("/ui-api/conversations").json()["conversations"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:7860", "localhost.evil.com", "user@localhost", "127.0.0.1.evil.com", "1.2.3.4", "::1"]
)
def test_d7_foreign_hosts(server: Server, host: str, path: str) -> None:
    assert ask(server, path, host=host) == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.2:80", "[::1]", "[::1]:7860"])
def test_d7_our_hosts(server: Server, host: str) -> None:
    assert ask(server, host=host) == 200


def test_d7_no_host_two_hosts_and_absolute_targets(server: Server) -> None:
    for head in (
        "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "GET http://evil.com/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "GET /health HTTP/1.0\r\n\r\n",
    ):
        assert int(server.raw(head.encode()).split(b" ", 2)[1]) in (400, 403), head
    assert ask(server, host="") == 403
    server.oracle()


ORIGINS = [
    "http://evil.com",
    "null",
    "http://localhost.evil.com",
    "http://127.0.0.1:1",
    "https://evil.com:7860",
    "file://",
    "garbage",
    "",
]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_d8_a_foreign_origin_runs_no_handler(server: Server, origin: str, kind: str) -> None:
    before = requests_seen(server)
    for path in ("/ui-api/conversations", "/v1/chat/completions", "/gradio_api/queue/join"):
        assert ask(server, path, "POST", body="{}", origin=origin, content_type=kind) == 403
    assert requests_seen(server) == before


def test_d8_preflight_and_reads_get_no_permission(server: Server) -> None:
    answer = server.raw(
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.com\r\n"
        b"Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n"
    )
    assert answer.split(b" ", 2)[1] == b"403" and b"access-control" not in answer.lower()
    read = server.http.get("/v1/models", headers={"Origin": server.url})
    assert read.status_code == 200
    assert not [name for name in read.headers if name.startswith("access-control")]


def test_d8_our_own_origin_passes(server: Server) -> None:
    for origin in (server.url, server.url.replace("http:", "https:")):
        assert server.http.post(
            "/v1/chat/completions", content=BODY, headers={"Origin": origin, "Content-Type": "application/json"}
        )
    assert ask(server, "/v1/chat/completions", "POST", BODY, origin=f"http://127.0.0.1:{server.port}") == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_d11_cross_site_fetches(server: Server, site: str) -> None:
    assert ask(server, "/v1/models", sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest="script") == 403
    assert ask(server, "/v1/models", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="iframe") == 403
    assert ask(server, "/v1/chat/completions", "POST", BODY, sec_fetch_site=site, sec_fetch_mode="navigate") == 403
    assert ask(server, "/health", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="document") == 200
    assert ask(server, "/v1/models", sec_fetch_site="same-origin", sec_fetch_mode="cors") == 200


def test_d9_websockets_are_refused(server: Server) -> None:
    status = ask(
        server, "/gradio_api/ws", upgrade="websocket", connection="Upgrade, close", sec_websocket_key="x" * 22 + "==",
        sec_websocket_version="13", origin="http://evil.com",
    )  # fmt: skip
    assert status == 403


def test_d13_bytes_that_are_no_http(server: Server) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 512,
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        assert not answer or answer.startswith(b"HTTP/1.1 4")
    server.oracle()


def test_many_and_large_headers(server: Server) -> None:
    many = "".join(f"x-{i}: 1\r\n" for i in range(300))
    assert server.raw(f"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{many}\r\n".encode()).split()[1] == b"400"
    large = f"GET /health HTTP/1.1\r\nHost: localhost\r\nx-large: {'a' * 200_000}\r\n\r\n"
    try:
        answer = server.raw(large.encode())
    except (ConnectionResetError, BrokenPipeError):
        answer = b"HTTP/1.1 400"
    assert answer.startswith(b"HTTP/1.1 4")
    server.oracle()


def test_security_headers_are_everywhere(server: Server) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        headers = server.http.get(path).headers
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    refused = server.http.get("/health", headers={"Host": "evil.com"})
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_d5_a_head_that_trickles_in_is_cut_off(server: Server) -> None:
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=40) for _ in range(50)]
    for connection in connections:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: lo")
    server.oracle()
    ended = 0
    for connection in connections:
        with connection:
            try:
                while connection.recv(4096):
                    pass
                ended += 1
            except ConnectionResetError:
                ended += 1
    assert ended == 50
    server.oracle()


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.api.conftest import Server

    server = Server(tmp_path_factory.mktemp("locked"), "--api-key", "user-key-1234", "--admin-key", "admin-key-1234")
    server.until(lambda: server.http.get("/health").status_code == 200, "ready")
    yield server
    assert server.stop() == 0
    log = "".join(server.lines)
    assert "user-key-1234" not in log and "wrong-key" not in log


GOOD: list[dict[str, str]] = [
    {"Authorization": "Bearer user-key-1234"},
    {"Authorization": "bearer user-key-1234"},
    {"x-api-key": "user-key-1234"},
    {"api-key": "admin-key-1234"},
]
BAD: list[dict[str, str]] = [
    {},
    {"Authorization": "user-key-1234"},
    {"Authorization": "Basic user-key-1234"},
    {"x-api-key": "user-key-123"},
    {"x-api-key": "user-key-12345"},
    {"Authorization": "Bearer user-key-1234", "x-api-key": "wrong-key-1"},
    {"Cookie": "switchyard_session=wrong-key-2"},
]


@pytest.mark.parametrize("headers", GOOD)
def test_a30_good_keys(locked: Server, headers: dict[str, str]) -> None:
    assert locked.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a30_bad_keys(headers: dict[str, str]) -> None:
    access = AccessControl({"user-key-1234": "user", "admin-key-1234": "admin"})
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    for path in ("/v1/models", "/", "/docs", "/nothing"):
        with pytest.raises(Unauthorized):
            access.check("GET", path, raw, "1.2.3.4")
    access.check("GET", "/health", raw, "1.2.3.4")


def test_a30_every_path_gives_the_same_answer(locked: Server) -> None:
    answers = [
        locked.http.get(path)
        for path in ("/v1/models", "/ui-api/models", "/openapi.json", "/nothing", "/v1/models?key=user-key-1234")
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["error"]["code"] == "invalid_api_key"


def test_d12_a_guesser_beside_a_good_client() -> None:
    access = AccessControl({"user-key-1234": "user"})
    good, wrong = [(b"x-api-key", b"user-key-1234")], [(b"x-api-key", b"guess")]
    access.check("GET", "/v1/models", good, "1.2.3.4")
    for _ in range(10):
        with pytest.raises(Unauthorized):
            access.check("GET", "/v1/models", wrong, "1.2.3.4")
    with pytest.raises(TooManyRequests):
        access.check("GET", "/v1/models", wrong, "1.2.3.4")
    access.check("GET", "/v1/models", good, "1.2.3.4")
    access.check("GET", "/v1/models", good, "5.6.7.8")


def test_a_user_key_loads_no_models(locked: Server) -> None:
    for key, status in (("user-key-1234", 403), ("admin-key-1234", 404)):
        answer = locked.http.post("/ui-api/models/load", json={"model": "no such"}, headers={"x-api-key": key})
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/pull"), ("DELETE", "/api/delete")])
def test_a_user_key_brings_and_removes_no_models(locked: Server, method: str, path: str) -> None:
    for key, status in (("user-key-1234", 403), ("admin-key-1234", 404)):
        answer = locked.http.request(method, path, json={"model": "no such"}, headers={"x-api-key": key})
        assert answer.status_code == status, answer.text


def test_the_printed_address_logs_in_once(locked: Server) -> None:
    assert "?token=" in locked.login
    with httpx.Client(base_url=locked.url, follow_redirects=False) as browser:
        page = browser.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 401 and 'type="password"' in page.text
        first = browser.get(locked.login)
        assert first.status_code == 303 and "token" not in first.headers["location"]
        cookie = first.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert browser.get("/ui-api/models").status_code == 200
    with httpx.Client(base_url=locked.url) as stranger:
        assert stranger.get(locked.login).status_code == 401


def test_login_with_a_key(locked: Server) -> None:
    with httpx.Client(base_url=locked.url, follow_redirects=False) as browser:
        assert browser.post("/login", data={"key": "wrong-key-3"}).status_code == 401
        assert browser.post("/login", data={"key": "admin-key-1234"}).status_code == 303
        assert browser.get("/ui-api/models").status_code == 200


def test_d12_guessing_is_slowed_down(launch: Launch) -> None:
    server = launch("--api-key", "user-key-1234")
    codes = [server.http.get("/v1/models", headers={"x-api-key": f"wrong-key-{i}"}).status_code for i in range(15)]
    assert codes[:10] == [401] * 10 and codes[-1] == 429
    assert server.http.get("/health").status_code in (200, 503)


def test_d14_no_key_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "server.py", "--listen", "--listen-port", "0", "--user-data-dir", str(tmp_path), "--no-model"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and "keys create" in ended.stderr


def test_a_listed_origin_may_call(launch: Launch) -> None:
    server = launch("--allowed-origins", "http://friend.example", "--allowed-hosts", "my.box").wait_ready()
    headers = {"Origin": "http://friend.example"}
    answer = server.http.post("/v1/chat/completions", content=BODY, headers={**headers, "Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://friend.example")
    preflight = server.http.options("/v1/models", headers={**headers, "Access-Control-Request-Method": "GET"})
    assert preflight.status_code == 204
    assert ask(server, host="my.box:80") == 200
    assert ask(server, origin="http://foe.example") == 403


def test_the_body_has_a_deadline() -> None:
    """The rule itself, with a short deadline: the real one is a minute."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    sent = iter([{"type": "http.request", "body": b"a", "more_body": True}])

    async def receive() -> Any:
        for message in sent:
            return message
        await asyncio.sleep(60)

    async def go() -> None:
        guard = Guard(app, access=AccessControl({}), body_deadline_s=0.05)
        headers = [(b"host", b"localhost"), (b"content-length", b"5")]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "client": None}
        with pytest.raises(RequestTimeout):
            await guard(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(go(), 30))

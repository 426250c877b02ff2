"""One guard in front of everything: page, API, event streams, static files, Gradio.

A web page anywhere can make a browser send requests to a local server. So: the Host must be one of ours (DNS rebinding), the
Origin must be our own or absent (cross-site calls), a cross-site fetch is refused before any handler runs. Then keys, then
limits on headers, body, receipt time and concurrency. Responses get the security headers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.responses import HTMLResponse, Response

from modules import caller
from modules.api.access import LOGIN_PAGE, NOBODY
from modules.api.errors import response_of
from modules.errors import AppError, BodyTooLarge, Forbidden, InvalidParameter, Overloaded, RequestTimeout, Unauthorized

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from modules.api.access import AccessControl, Identity

OnResponse = Callable[[str, str, int, float], None]
"""Called with method, route, status and seconds once a response has begun to go out and ended."""

MAX_HEADERS = 256
BODY_DEADLINE_S = 60.0
MAX_REQUESTS = 512
LARGE_BODIES = {"/ui-api/conversations/import": 256 << 20, "/ui-api/attachments": 28 << 20}
SAFE_METHODS = frozenset({"GET", "HEAD"})
REVOCATION_CHECK_S = 3.0

# Gradio's page holds inline scripts and styles and compiles templates, hence the two 'unsafe' words; nothing may come from or
# go to another host, whatever a model's answer contains.
CSP = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
SECURITY_HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_OURS = frozenset(name for name, _ in SECURITY_HEADERS)


class Hosts:
    """Which Host headers are ours: loopback always; beyond it the configured names, this machine's name, and addresses.

    A literal address can't be rebound by DNS, so on a server that listens beyond loopback every one is allowed.
    """

    def __init__(self, names: Iterable[str] = (), *, loopback_only: bool = True) -> None:
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._loopback_only = loopback_only
        if not loopback_only:
            self._names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        self._known: dict[bytes, bool] = {}

    def allowed(self, host: bytes) -> bool:
        known = self._known.get(host)
        if known is None:
            known = self._judge(host)
            if len(self._known) < 1000:
                self._known[host] = known
        return known

    def _judge(self, raw: bytes) -> bool:
        name = host_name(raw.decode("latin-1"))
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback_only


def host_name(host: str) -> str | None:
    """The name of a Host header without its port; None for anything that is no plain host[:port]."""
    if not host or any(c in host for c in "@/\\?# \t,") or not host.isascii():
        return None
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or (port and not (port.startswith(":") and port[1:].isdigit())):
            return None
        return name.lower()
    name, _, port = host.partition(":")
    if (":" in host and not port.isdigit()) or not name:
        return None
    return name.lower()


class Guard:
    """Pure ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: AccessControl,
        hosts: Hosts | None = None,
        origins: Iterable[str] = (),
        max_body_bytes: int = 10 << 20,
        max_requests: int = MAX_REQUESTS,
        body_deadline_s: float = BODY_DEADLINE_S,
        on_response: OnResponse | None = None,
    ) -> None:
        self._app = app
        self._access = access
        self._hosts = hosts or Hosts()
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self._max_body = max_body_bytes
        self._max_requests = max_requests
        self._deadline_s = body_deadline_s
        self._on_response = on_response
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await _refuse_websocket(receive, send)  # nothing here speaks it
            return
        headers = _Headers(scope)
        client = (scope.get("client") or ("", 0))[0]
        caller.enter(caller.Caller(client, agent=headers.agent))
        try:
            foreign = self._check(scope, headers)
        except AppError as error:
            await self._refuse(error, scope, headers, receive, send)
            return
        if scope["method"] == "OPTIONS" and foreign and headers.preflight:
            await _preflight(foreign, headers)(scope, receive, send)
            return
        if headers.query_has_token and scope["method"] == "GET":
            redirect = self._access.take_token(scope["path"], scope["query_string"].decode("latin-1"))
            if redirect is not None:
                await redirect(scope, receive, _Sender(send, None))
                return
        try:
            identity = self._access.check(scope["method"], headers.path, scope["headers"], client)
            if self._active >= self._max_requests and headers.path != "/health":
                raise Overloaded("The server is at its limit of concurrent requests.", hint="Try again in a moment.")
        except AppError as error:
            await self._refuse(error, scope, headers, receive, send, foreign)
            return
        if identity is not NOBODY:
            caller.enter(caller.Caller(client, identity.name, headers.agent))
            receive = self._while_valid(identity, receive)
        self._active += 1
        began = time.monotonic()
        sender = _Sender(send, foreign)
        try:
            await self._app(scope, self._bounded(headers, receive), sender)
        finally:
            self._active -= 1
            if self._on_response is not None:
                route = getattr(scope.get("route"), "path", "") or "other"
                self._on_response(scope["method"], route, sender.status, time.monotonic() - began)

    # --- checks -----------------------------------------------------------------------------------------------

    def _check(self, scope: Scope, headers: _Headers) -> str | None:
        """The foreign origin that the operator allows, None for our own. Raises AppError."""
        if headers.count > MAX_HEADERS:
            raise InvalidParameter(f"A request may have at most {MAX_HEADERS} header lines.")
        if not scope["path"].startswith("/"):
            raise InvalidParameter("The request target must be a path.")
        if len(headers.hosts) != 1 or not self._hosts.allowed(headers.hosts[0]):
            raise Forbidden("This server is not known by that name.", hint="Start it with --allowed-hosts NAME.")
        foreign = self._check_origin(headers)
        if foreign is None and headers.site in (b"cross-site", b"same-site"):
            navigation = headers.mode == b"navigate" and headers.dest in (b"document", b"")
            if scope["method"] not in SAFE_METHODS or not navigation:
                raise Forbidden("Pages of other sites may not call this server.")
        if headers.length is not None and headers.length > self._limit(headers):
            raise _too_large(self._limit(headers))
        return foreign

    def _check_origin(self, headers: _Headers) -> str | None:
        if not headers.origins:
            return None
        origin = headers.origins[0].decode("latin-1").lower()
        if len(headers.origins) == 1:
            if _same_host(origin, headers.hosts[0].decode("latin-1").lower()):
                return None
            if origin in self._origins:
                return headers.origins[0].decode("latin-1")
        raise Forbidden("Pages of other sites may not call this server.", hint="Start it with --allowed-origins ORIGIN.")

    def _limit(self, headers: _Headers) -> int:
        return max(self._max_body, LARGE_BODIES.get(headers.path, 0))

    def _bounded(self, headers: _Headers, receive: Receive) -> Receive:
        """`receive` with the size limit and the receipt deadline, for requests that have a body."""
        if not headers.has_body:
            return receive
        limit, loop = self._limit(headers), asyncio.get_running_loop()
        due = loop.time() + self._deadline_s * max(1.0, limit / (10 << 20))
        received = 0
        complete = False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, due - loop.time()))
            except asyncio.TimeoutError:
                raise RequestTimeout("The request's body did not arrive in time.") from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > limit:
                    raise _too_large(limit)
            else:
                complete = True
            return message

        return bounded

    def _while_valid(self, identity: Identity, receive: Receive) -> Receive:
        """`receive` that tells a request whose key was revoked that its client has gone."""

        async def until_revoked() -> Message:
            waiting = asyncio.ensure_future(receive())
            try:
                while not (await asyncio.wait([waiting], timeout=REVOCATION_CHECK_S))[0]:
                    if not self._access.valid(identity):
                        return {"type": "http.disconnect"}
                return waiting.result()
            finally:
                waiting.cancel()

        return until_revoked

    async def _refuse(
        self, error: AppError, scope: Scope, headers: _Headers, receive: Receive, send: Send, foreign: str | None = None
    ) -> None:
        response: Response
        if isinstance(error, Unauthorized) and scope["method"] == "GET" and headers.wants_html:
            response = HTMLResponse(LOGIN_PAGE, status_code=401, headers={"Cache-Control": "no-store"})
        else:
            response = response_of(error, headers.path)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        if self._on_response is not None:
            self._on_response(scope["method"], "refused", response.status_code, 0.0)
        await response(scope, receive, _Sender(send, foreign))


class _Headers:
    """What the guard looks at, gathered in one pass."""

    __slots__ = (
        "accept", "agent", "chunked", "count", "dest", "hosts", "length", "mode", "origins", "path", "preflight", "query",
        "site", "wanted",
    )  # fmt: skip

    def __init__(self, scope: Scope) -> None:
        self.hosts: list[bytes] = []
        self.origins: list[bytes] = []
        self.length: int | None = None
        self.chunked = self.preflight = False
        self.accept = self.dest = self.mode = self.site = self.wanted = b""
        self.agent = ""
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))  # behind a proxy with --subpath
        self.query: bytes = scope.get("query_string", b"")
        self.count = len(scope["headers"])
        for name, value in scope["headers"]:
            if name == b"host":
                self.hosts.append(value)
            elif name == b"origin":
                self.origins.append(value)
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() and len(value) < 19 else 1 << 62
            elif name == b"transfer-encoding":
                self.chunked = True
            elif name == b"accept":
                self.accept = value
            elif name == b"sec-fetch-site":
                self.site = value
            elif name == b"sec-fetch-mode":
                self.mode = value
            elif name == b"sec-fetch-dest":
                self.dest = value
            elif name == b"user-agent":
                self.agent = value[:200].decode("latin-1")
            elif name == b"access-control-request-method":
                self.preflight = True
            elif name == b"access-control-request-headers":
                self.wanted = value

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)

    @property
    def wants_html(self) -> bool:
        return b"text/html" in self.accept

    @property
    def query_has_token(self) -> bool:
        return b"token=" in self.query


def _same_host(origin: str, host: str) -> bool:
    """Whether an Origin is this very host and port. A default port may be left out on either side."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
        return False
    default = ":443" if parts.scheme == "https" else ":80"
    return parts.netloc.removesuffix(default) == host.removesuffix(default)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than {limit >> 20} MB.", hint="Send less, or raise --max-body-mb.")


class _Sender:
    """`send` that adds the security headers and the request's id to the start of the response, where the app set none."""

    __slots__ = ("_foreign", "_send", "status")

    def __init__(self, send: Send, foreign: str | None) -> None:
        self._send = send
        self._foreign = foreign
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = [(k, v) for k, v in message.get("headers", ()) if not k.lower().startswith(b"access-control-")]
            names = {k.lower() for k, _ in given} & _OURS
            extra = [pair for pair in SECURITY_HEADERS if pair[0] not in names]
            extra.append((b"x-request-id", caller.request_id().encode()))
            if self._foreign:
                extra += [(b"access-control-allow-origin", self._foreign.encode("latin-1")), (b"vary", b"Origin")]
                extra.append((b"access-control-expose-headers", b"X-Request-Id"))
            message = {**message, "headers": [*given, *extra]}
        await self._send(message)


def _preflight(origin: str, headers: _Headers) -> Response:
    """A listed origin may send the headers its client library asks for (x-stainless-…, anthropic-version)."""
    asked = headers.wanted.decode("latin-1")
    wanted = asked if re.fullmatch(r"[\w\-]+(?: ?, ?[\w\-]+)*", asked, re.ASCII) else "Authorization, Content-Type, X-Api-Key"
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
            "Access-Control-Allow-Headers": wanted,
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        },
    )


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})

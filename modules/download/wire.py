"""One GET of a hub's file over a blocking socket: proxies, redirects by our rules, and nothing read that was not asked for.

The standard library's client hands over what a socket has as it is; an asyncio client copies it several times and can't keep up
with a fast disk. It runs in a thread of its own (transfer.py), which `Wire.cut` wakes from any wait.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from modules.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modules.download.hub import Hub

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 15.0
REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Retry(Exception):
    """This attempt failed in a way the next one may not; `wait_s` when the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Stopped(Exception):
    """`cut` was called."""


class Wire:
    """One request at a time. `cut`, from any thread, ends it and every later one."""

    def __init__(self, hub: Hub, stall_s: float) -> None:
        self._hub = hub
        self._stall_s = stall_s
        self._connection: http.client.HTTPConnection | None = None
        self._mutex = threading.Lock()
        self.stopped = False

    def get(self, url: str, have: int) -> http.client.HTTPResponse:
        """The answer to GET `url` from byte `have` on, redirects followed: each target is checked, the token stays at the hub.

        Raises DownloadError, Retry, Stopped.
        """
        for hop in range(MAX_REDIRECTS + 1):
            headers = self._hub.headers_for(url)
            if have:
                headers["Range"] = f"bytes={have}-"
            with self._network():
                response = self._ask(url, headers, redirected=hop > 0)
            if response.status not in REDIRECTS:
                return response
            url = urljoin(url, response.getheader("Location", ""))
            self._hub.check_redirect(url)
        raise DownloadError("The hub redirects in a circle.", hint="Check the hub's address; try another mirror.")

    def read(self, response: http.client.HTTPResponse, limit: int) -> bytes:
        """What has arrived of the body, as soon as there is something; b"" at its end. Raises Retry, Stopped."""
        with self._network():
            return response.read1(limit)

    def cut(self) -> None:
        with self._mutex:
            self.stopped = True
            sock = self._connection.sock if self._connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._mutex:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        """What goes wrong on the network, as Retry; after `cut`, whatever it is, as Stopped."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise DownloadError(
                f"The hub's certificate is not trusted: {error.verify_message}.",
                hint="A proxy may be opening the connection: set its certificate with SSL_CERT_FILE.",
            ) from error
        except TimeoutError as error:
            raise (Stopped() if self.stopped else Retry("the server sent nothing for too long")) from error
        except (OSError, http.client.HTTPException) as error:
            # http.client's own words for a proxy that refuses, such as "Tunnel connection failed: 407 Authentication Required".
            reason = str(error) if str(error).startswith("Tunnel") else "the connection failed"
            raise (Stopped() if self.stopped else Retry(reason[:200])) from error
        if self.stopped:
            raise Stopped

    def _ask(self, url: str, headers: dict[str, str], *, redirected: bool) -> http.client.HTTPResponse:
        self.close()
        parts = urlsplit(url)
        proxy = proxy_for(parts, self._hub.proxy)
        connection, target = _connection(parts, proxy, headers)
        with self._mutex:
            self._connection = connection
        connection.connect()
        if redirected and proxy is None:
            # The name may lead elsewhere than when it was checked.
            self._hub.check_address(connection.sock.getpeername()[0])
        connection.sock.settimeout(self._stall_s)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.stopped:
            raise Stopped
        connection.request("GET", target, headers=headers)
        return connection.getresponse()


def proxy_for(parts: SplitResult, chosen: str | None) -> str | None:
    """The proxy for an address: the chosen one, else the environment's; none for hosts that NO_PROXY names."""
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    found = getproxies()
    return chosen or found.get(parts.scheme) or found.get("all")


def _connection(parts: SplitResult, proxy: str | None, headers: dict[str, str]) -> tuple[http.client.HTTPConnection, str]:
    """(an unopened connection, what to ask it for)."""
    host, secure = str(parts.hostname), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if proxy is None:
        return _plain_or_tls(host, port, secure), target
    via = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    if via.scheme != "http" or not via.hostname:
        raise DownloadError("The proxy's address is not understood.", hint="It looks like http://proxy.example.org:3128.")
    login = {}
    if via.username is not None:
        pair = f"{unquote(via.username)}:{unquote(via.password or '')}"
        login["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    if not secure:
        headers.update(login)
        shown = f"[{host}]" if ":" in host else host
        return _plain_or_tls(via.hostname, via.port or 80, False), f"http://{shown}:{port}{target}"
    connection = _plain_or_tls(via.hostname, via.port or 80, True)
    connection.set_tunnel(host, port, login)
    return connection, target


def _plain_or_tls(host: str, port: int, secure: bool) -> http.client.HTTPConnection:
    if not secure:
        return http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
    import httpx  # not at every start

    # httpx's context, so that SSL_CERT_FILE and the bundled certificates count as in every other request.
    return http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=httpx.create_ssl_context())

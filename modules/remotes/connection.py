"""HTTP to one remote server, by our rules: its address looked up once and kept, no redirect to another place, every answer
measured before it is believed, and the key in no message.

Each failure becomes an AppError that names the server and says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

import httpx

from modules.errors import AppError, ContextLengthExceeded, EngineTimeout, ModelNotFound, RemoteBusy, RemoteError, RequestError
from modules.remotes.address import PORTS, origin, without_password
from modules.remotes.route import Route, find_route, make_client

if TYPE_CHECKING:
    from modules.remotes.store import Server

MAX_BODY = 16 << 20
MAX_LINE = 4 << 20
MAX_SAID = 300
MAX_REDIRECTS = 3
CONNECT_S = 10.0
LAST_WORDS_S = 0.5  # between [DONE] and the end of the stream
ASKED_S = 30.0  # for what costs a server nothing: lists and properties
_TOO_LONG = re.compile(
    r"context (length|window|size)|maximum context|too long|exceeds? the (available )?context|max_model_len", re.I
)


class Connection:
    """One server. Belongs to one event loop; `silence_s` is how long it may send nothing where it computes."""

    def __init__(self, server: Server, *, silence_s: float = 300.0, connect_s: float = CONNECT_S) -> None:
        self.server = server
        self._silence_s = silence_s
        self._connect_s = connect_s
        self._route: Route | None = None
        self._clients: dict[str | None, httpx.AsyncClient] = {}  # by the proxy's address, which may come to be another
        self._headers = {"User-Agent": "switchyard", "Accept-Encoding": "identity"}
        if server.key:
            self._headers["Authorization"] = f"Bearer {server.key}"

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    # --- requests -------------------------------------------------------------------------------------------------

    def url(self, path: str, *, root: bool = False) -> str:
        """An address below the base, or with `root` beside its /v1, where the servers' own routes are."""
        base = self.server.url
        return (base.removesuffix("/v1") if root else base) + path

    async def get(self, path: str, *, root: bool = False) -> Any:
        """The JSON answer. Raises AppError."""
        async with self.open("GET", self.url(path, root=root)) as response:
            return await self._json(response)

    async def post(self, path: str, body: dict[str, Any], *, root: bool = False) -> Any:
        """The JSON answer. Raises AppError."""
        async with self.open("POST", self.url(path, root=root), body) as response:
            return await self._json(response)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The objects of a streamed answer, up to [DONE] or its end; a whole answer is one object. Raises AppError."""
        async with self.open("POST", self.url(path), body) as response:
            kind = _content_type(response)
            if kind == "application/json":
                yield await self._json(response)
                return
            if kind != "text/event-stream":
                raise self._no_api(kind)
            lines = self._data(response)
            async for data in lines:
                if data == b"[DONE]":
                    break
                yield self._object(data)
            # Read to its very end, the connection serves the next request, too.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_drain(lines), LAST_WORDS_S)

    @contextlib.asynccontextmanager
    async def open(self, method: str, url: str, body: dict[str, Any] | None = None) -> AsyncIterator[httpx.Response]:
        """A successful response, its body still to be read. Redirects are followed at the same place alone."""
        content = None if body is None else json.dumps(body, ensure_ascii=True).encode("ascii")
        try:
            for _ in range(MAX_REDIRECTS):
                response = await self._send(method, url, content)
                try:
                    if response.status_code in (301, 302, 303, 307, 308):
                        url = self._redirected(method, url, response)
                        continue
                    if response.status_code != 200:
                        raise self._refusal(response, await _read(response, MAX_BODY))
                    yield response
                    return
                finally:
                    await response.aclose()
            raise RemoteError(f"{self.server.name} redirects in a circle.", hint="Check its address.")
        except httpx.HTTPError as error:
            raise self._broken(error) from error

    async def _send(self, method: str, url: str, content: bytes | None) -> httpx.Response:
        """Connect to the addresses that were checked, whatever the name means by now."""
        parts = urlsplit(url)
        route = self._route
        if route is None:
            route = self._route = await asyncio.to_thread(find_route, self.server)
        client = self._clients.get(route.proxy)
        if client is None:
            client = self._clients[route.proxy] = make_client(self.server, route, self._headers)
        headers = {"Host": parts.netloc}
        if content is not None:
            headers["Content-Type"] = "application/json"
        failure: httpx.HTTPError | None = None
        for address in route.hosts:
            place = f"[{address}]" if ":" in address else address
            fixed = urlunsplit((parts.scheme, f"{place}:{parts.port or PORTS[parts.scheme]}", parts.path, parts.query, ""))
            request = client.build_request(method, fixed, headers=headers, content=content, timeout=self._timeout(method))
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
                failure = error
        self._route = None  # it may have moved: looked up, and judged, again by the next request
        assert failure is not None
        raise failure

    def _timeout(self, method: str) -> httpx.Timeout:
        return httpx.Timeout(self._silence_s if method == "POST" else ASKED_S, connect=self._connect_s, pool=None)

    def _redirected(self, method: str, url: str, response: httpx.Response) -> str:
        target = urljoin(url, response.headers.get("location", ""))
        try:
            same = origin(target) == origin(url)
        except ValueError:
            same = False
        if not same:
            place = _printable(urlsplit(target).netloc.rpartition("@")[2]) or "nowhere"
            raise RemoteError(
                f"{self.server.name} redirects to another place ({place}), which is not followed.",
                hint="If you trust that place, save its address as a server.",
            )
        if method == "POST" and response.status_code not in (307, 308):
            raise RemoteError(f"{self.server.name} redirects a request in a way that drops it.", hint="Check its address.")
        return str(target)

    # --- answers --------------------------------------------------------------------------------------------------

    async def _json(self, response: httpx.Response) -> Any:
        body = await _read(response, MAX_BODY)
        if len(body) > MAX_BODY:
            raise RemoteError(f"{self.server.name} sent an answer of more than {MAX_BODY >> 20} MB.", hint="Check its address.")
        try:
            return json.loads(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            raise self._no_api(_content_type(response)) from None

    async def _data(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The data lines of server-sent events."""
        buffer = bytearray()
        async for chunk in response.aiter_raw():
            buffer += chunk
            *lines, rest = buffer.split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield bytes(line[5:].strip())
            if len(rest) > MAX_LINE:
                raise RemoteError(
                    f"{self.server.name} sent a line of more than {MAX_LINE >> 20} MB.", hint="Look at that server's log."
                )
            buffer = rest
        if buffer.startswith(b"data:"):
            yield bytes(buffer[5:].strip())

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RemoteError(f"{self.server.name} sent something that is no JSON.", hint="Look at that server's log.")
        if value.get("error"):
            raise self.said(_status(value["error"]), value)
        return value

    def _no_api(self, kind: str) -> RemoteError:
        what = f"It answered with {_printable(kind) or 'something that has no type'}."
        return RemoteError(
            f"There is no OpenAI API at the address of {self.server.name}. {what}",
            hint="The address usually ends with /v1; a proxy's login page may be in between.",
        )

    # --- failures -------------------------------------------------------------------------------------------------

    def _refusal(self, response: httpx.Response, body: bytes) -> AppError:
        try:
            value = json.loads(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            value = None
        return self.said(response.status_code, value, _seconds(response.headers.get("retry-after")))

    def said(self, status: int, value: Any, retry_after: float | None = None) -> AppError:
        """The far server's own error as ours. A refused key is our operator's business, not our client's: it is no 401."""
        words, code = self._words(value)
        name = self.server.name
        colon = f": {words}" if words else "."
        if status in (401, 403):
            has = "its key" if self.server.key else "a request without a key"
            return RemoteError(
                f"{name} refused {has} ({status}){colon}", hint=f"Save it with the right key: server.py remote add {name} …"
            )
        if status == 407 and self.server.proxy is not None:
            return self._refused_by_proxy(str(status))
        if status in (429, 503, 529):
            when = f" in {retry_after:.0f} s" if retry_after else " in a moment"
            return RemoteBusy(f"{name} is busy ({status}){colon}", hint=f"Try again{when}.", detail={"retry_after": retry_after})
        if status == 413 or code == "context_length_exceeded" or (status < 500 and _TOO_LONG.search(words)):
            return ContextLengthExceeded(f"{name}{colon}", hint="Shorten the prompt.", param="prompt")
        if code == "model_not_found" or (status == 404 and "model" in words.lower()):
            return ModelNotFound(f"{name}{colon}", hint="Refresh the model list: it has other models now.", param="model")
        if status in (404, 405, 501):
            return RemoteError(f"{name} has no such route ({status}){colon}", hint="Check its address: it usually ends with /v1.")
        if 400 <= status < 500:
            return RequestError(f"{name} refused the request ({status}){colon}")
        return RemoteError(f"{name} failed ({status}){colon}", hint="Look at that server's log.")

    def _words(self, value: Any) -> tuple[str, str]:
        """(message, code) of the error bodies in use; the key, should it be quoted, is taken out."""
        error = value.get("error", value) if isinstance(value, dict) else value
        words, code = (error, "") if isinstance(error, str) else ("", "")
        if isinstance(error, dict):
            found = error.get("message") or error.get("detail") or error.get("msg") or ""
            words, code = (
                found if isinstance(found, str) else json.dumps(found),
                str(error.get("code") or error.get("type") or ""),
            )
        return self._shown(words), code

    def _shown(self, words: str) -> str:
        """A stranger's words, without our secrets should they quote them."""
        for secret in self.server.secrets():
            words = words.replace(secret, "***")
        return _printable(words)

    def _reason(self, error: Exception) -> str:
        return self._shown(str(error)).rstrip(".") or type(error).__name__

    def _refused_by_proxy(self, words: str) -> RemoteError:
        where = without_password(self.server.proxy or "")
        hint = "Look at the proxy's own log: it must let this machine reach the server."
        if words.startswith("407"):
            hint = "It wants a name and a password: save the server with --proxy http://user:password@…"
        return RemoteError(f"The proxy of {self.server.name}, {where}, refused to connect: {words}.", hint=hint)

    def _broken(self, error: httpx.HTTPError) -> AppError:
        name = self.server.name
        through = f" through {without_password(self.server.proxy)}" if self.server.proxy is not None else ""
        if isinstance(error, httpx.ProxyError):
            return self._refused_by_proxy(self._reason(error))
        if isinstance(error, httpx.ConnectTimeout):
            return RemoteError(f"{name} does not answer{through}.", hint="Check that it runs and that its address is right.")
        if isinstance(error, httpx.ConnectError):
            reason = self._reason(error)
            return RemoteError(f"{name} can't be reached{through}: {reason}.", hint=_hint(reason, self.server.ca is not None))
        if isinstance(error, httpx.TimeoutException):
            return EngineTimeout(f"{name} sent nothing for too long.", hint="It may be overloaded; its log says more. Try again.")
        return RemoteError(
            f"{name} broke the connection: {self._reason(error)}.", hint="It may have ended; look at its log, then try again."
        )


async def _drain(lines: AsyncIterator[bytes]) -> None:
    async for _ in lines:
        continue


async def _read(response: httpx.Response, limit: int) -> bytes:
    """The body, or its beginning of more than `limit` bytes."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            break
    return bytes(body)


def _status(error: Any) -> int:
    """The status that an error in a stream, whose own was 200, would have had: a request's fault stays the request's."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return 400 if isinstance(error, dict) and error.get("type") == "invalid_request_error" else 500


def _content_type(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; a date is not read."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= 86_400 else None


def _printable(text: str) -> str:
    """A stranger's words, fit for one line of a message."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:MAX_SAID]


def _hint(reason: str, has_ca: bool) -> str:
    """What to do about a connection that did not come about."""
    if "mismatch" in reason:
        return "Its certificate is for another name: save the address that the certificate names."
    if "CERTIFICATE_VERIFY_FAILED" in reason and has_ca:
        return "Its certificate is of none of the authorities it was saved with: add it again with the right --ca FILE."
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "If its certificate is of an authority of your own, add it with --ca FILE."
    return "Check that it runs and that its address is right."

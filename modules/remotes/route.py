"""The way to a remote server: to an address that was checked, straight or through a proxy, and whose certificates count.

Through a proxy the rules are the same. It is asked for the address that was looked up and checked here, not for a name that may
mean something else to it, unless the operator has said that the proxy looks names up.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from modules import reach
from modules.errors import InvalidParameter, RemoteError
from modules.remotes.address import is_name, origin, resolve

if TYPE_CHECKING:
    import httpx

    from modules.remotes.store import Server

MAX_CA = 256 << 10
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


@dataclass(frozen=True)
class Route:
    """`hosts`: what to ask for, in turn; IP addresses, or one name that the proxy looks up. `proxy`: the proxy's IP address."""

    hosts: tuple[str, ...]
    proxy: str | None = None


def find_route(server: Server) -> Route:
    """Look up and judge. Blocks. Raises RemoteError."""
    if server.proxy is None:
        return Route(_checked(server.url, server.reach, server.name))
    proxy = _checked(server.proxy, server.proxy_reach, f"the proxy of {server.name}")[0]
    if server.proxy_resolves and is_name(server.url):
        return Route((origin(server.url)[1],), proxy)
    return Route(_checked(server.url, server.reach, server.name), proxy)


def _checked(url: str, allowed: int, whose: str) -> tuple[str, ...]:
    addresses, innermost = resolve(url)
    if innermost > allowed:
        where = "this computer" if innermost == reach.LOOPBACK else "the local network"
        raise RemoteError(
            f"The address of {whose} now leads into {where}, which it did not when it was saved.",
            hint="If you mean that, remove the server and add it again.",
        )
    return tuple(addresses)


def make_client(server: Server, route: Route, headers: dict[str, str]) -> httpx.AsyncClient:
    """A client for this route. Nothing is taken from the environment."""
    import httpx  # not at every start

    scheme, host, _ = origin(server.url)
    return httpx.AsyncClient(
        headers=headers,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        follow_redirects=False,
        trust_env=False,
        verify=_trust(host, server.ca) if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        proxy=_proxy(server.proxy, route.proxy, server.ca) if server.proxy is not None and route.proxy is not None else None,
    )


def _proxy(url: str, address: str, ca: str | None) -> httpx.Proxy:
    import httpx

    scheme, host, port = origin(url)
    parts = urlsplit(url)
    return httpx.Proxy(
        f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}",
        auth=(unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None,
        ssl_context=_trust(host, ca) if scheme == "https" else None,
    )


class _Named(ssl.SSLContext):
    """Greets and checks the server by its name, whatever address was connected to."""

    name: str

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False, server_hostname: Any = None,
        session: Any = None,
    ) -> ssl.SSLObject:  # fmt: skip
        return super().wrap_bio(incoming, outgoing, server_side, self.name, session)


def _trust(host: str, ca: str | None) -> ssl.SSLContext:
    """Certificates of the authorities in `ca` count, and only those; of the usual ones where there are none."""
    context = _Named(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the name
    context.name = host
    if ca is not None:
        context.load_verify_locations(cadata=ca)
    else:
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def check_ca(text: str | None) -> str | None:
    """The certificates of a PEM file, without what is written between them; None for an empty one. Raises InvalidParameter."""
    if text is None or not text.strip():
        return None
    hint = "Give the PEM file of the authority, which begins with -----BEGIN CERTIFICATE-----."
    if len(text) > MAX_CA:
        raise InvalidParameter(f"The certificates are larger than {MAX_CA >> 10} KB.", hint=hint, param="ca")
    if "PRIVATE KEY-----" in text:
        raise InvalidParameter("This holds a private key, which belongs to its owner alone.", hint=hint, param="ca")
    found = _CERTIFICATE.findall(text.replace("\r", ""))
    pem = "\n".join(found) + "\n"
    try:
        if not found:
            raise ValueError
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise InvalidParameter("There is no readable certificate in it.", hint=hint, param="ca") from None
    return pem

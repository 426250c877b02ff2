"""Addresses of remote servers and of the proxies before them: what may be saved, and where a name may lead when it is used.

Only the operator adds servers, so this machine and its network are allowed, because the operator named them. Never allowed are
the addresses where clouds keep their secrets, and a name that has come to lead further inside than when it was saved.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit, urlunsplit

from modules import reach
from modules.errors import InvalidParameter, RemoteError

MAX_URL = 500
PORTS = {"http": 80, "https": 443}


def check_url(text: str) -> str:
    """A base URL such as http://box:8000/v1, made canonical; without a path, /v1 is meant. Raises InvalidParameter."""
    hint = "Give the address of its OpenAI API, such as http://192.168.1.20:8000/v1."
    text = text.strip()
    if len(text) > MAX_URL or any(ord(c) <= 32 or ord(c) == 127 or c == "\\" for c in text):
        raise InvalidParameter("The address holds a space or control character, or is too long.", hint=hint, param="url")
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise InvalidParameter("This is no address.", hint=hint, param="url") from None
    if parts.scheme not in PORTS or not host:
        raise InvalidParameter("The address must begin with http:// or https:// and name a host.", hint=hint, param="url")
    if parts.username is not None or parts.password is not None:
        raise InvalidParameter("A name or password does not belong into the address.", hint="Give the key apart.", param="url")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise InvalidParameter("The address has a query or a fragment.", hint=hint, param="url")
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != PORTS[parts.scheme]:
        place = f"{place}:{port}"
    return urlunsplit((parts.scheme, place, parts.path.rstrip("/") or "/v1", "", ""))


def check_proxy(text: str) -> str:
    """A proxy's URL, made canonical; a name and password in it are kept. Raises InvalidParameter, which never repeats them."""
    hint = "It looks like http://proxy.example:3128, or http://user:password@proxy.example:3128."
    text = text.strip()
    if len(text) > MAX_URL or any(not 33 <= ord(c) <= 126 or c == "\\" for c in text):
        raise InvalidParameter("The proxy's address holds an odd character, or is too long.", hint=hint, param="proxy")
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise InvalidParameter("This is no address of a proxy.", hint=hint, param="proxy") from None
    if parts.scheme.startswith("socks"):
        raise InvalidParameter("A SOCKS proxy can't be used.", hint="Give an HTTP proxy.", param="proxy")
    if parts.scheme not in PORTS or not host or parts.path not in ("", "/") or "?" in text or "#" in text:
        raise InvalidParameter("A proxy is http:// or https://, a host and a port.", hint=hint, param="proxy")
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    place = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{user}{place}:{port or PORTS[parts.scheme]}"


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def is_name(url: str) -> bool:
    """Whether its host has to be looked up."""
    try:
        ipaddress.ip_address(origin(url)[1])
    except ValueError:
        return True
    return False


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for a port that is none."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or PORTS.get(parts.scheme, 0)


def resolve(url: str) -> tuple[list[str], int]:
    """(the IP addresses of a URL's host, the innermost reach among them). Blocks while the name is looked up.

    Raises RemoteError for a name that can't be found, and for an address that nobody may be led to.
    """
    _, host, port = origin(url)
    try:
        found = [ipaddress.ip_address(host)]
    except ValueError:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise RemoteError(f"{host} can't be found.", hint="Check the name and the network.") from None
        found = list(dict.fromkeys(ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in rows))
    innermost = max(map(reach.reach_of, found), default=reach.PUBLIC)
    if innermost == reach.LINK_LOCAL or any(address.is_unspecified for address in found):
        raise RemoteError(
            f"{host} leads to an address where no such server can be.",
            hint="Link-local, multicast and cloud metadata addresses are never used.",
        )
    return [str(address) for address in found], innermost

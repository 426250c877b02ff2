"""The images that requests name: data: URLs are taken at once; http(s) URLs only where the operator allows it (`--fetch-images`).

Fetching for a stranger must not lead inside (server-side request forgery): only public addresses, looked up once and connected to
as such, no redirects, bounded in bytes and time.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urlsplit

from modules.errors import InvalidImage
from modules.images import MAX_BYTES, check, from_data_url
from modules.reach import PUBLIC, Address, reach_of

MAX_URL = 2000
FETCH_S = 20.0
_PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Sequence[Address]]


def image_source(url: str, param: str) -> str:
    """The base64 of a data: URL's image, checked; an http(s) URL as it is, for `fetched`. Raises InvalidImage for any other."""
    if url[:5].lower() == "data:":
        return from_data_url(url, param)
    if url[:8].lower().startswith(("http://", "https://")) and len(url) <= MAX_URL and url.isprintable() and " " not in url:
        return url
    raise _refused("An image must be a data: URL, such as data:image/png;base64,….", param)


def look_up(host: str, port: int) -> list[Address]:
    """The IP addresses of a name. Blocks; raises OSError or UnicodeError."""
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in rows]


async def fetched(source: str, allowed: bool, *, resolve: Resolve = look_up, reach: int = PUBLIC) -> str:
    """The base64 of an image that is base64 already, or is fetched now. Raises InvalidImage.

    `reach` is the innermost kind of address that may be connected to (`modules.reach`).
    """
    if ":" not in source[:8]:  # base64 has no colon
        return source
    if not allowed:
        raise _refused("This server fetches no images.")
    try:
        data = await asyncio.wait_for(_fetch(source, resolve, reach), FETCH_S)
    except (asyncio.TimeoutError, OSError, UnicodeError):
        raise _refused("The image could not be fetched.") from None
    check(data, "messages")
    return base64.b64encode(data).decode("ascii")


async def _fetch(url: str, resolve: Resolve, reach: int) -> bytes:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        raise _refused("The image's address can't be read.") from None
    if not host or parts.username is not None:
        raise _refused("The image's address can't be read.")
    addresses = await asyncio.to_thread(resolve, host, port)
    if not addresses or any(reach_of(address) > reach for address in addresses):
        raise _refused("The image's address is not a public one.")
    return await _get(parts, host, port, addresses[0])


async def _get(parts: SplitResult, host: str, port: int, address: Address) -> bytes:
    """The body, from this very address: a name could lead elsewhere the next time it is looked up."""
    place = f"[{address}]" if address.version == 6 else str(address)
    named = f"[{host}]" if ":" in host else host
    target = parts._replace(netloc=f"{place}:{port}", fragment="").geturl()
    header = named if port == _PORTS[parts.scheme] else f"{named}:{port}"
    import httpx  # not at every start

    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=FETCH_S) as client,
            client.stream("GET", target, headers={"Host": header}, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.status_code != 200:
                raise _refused(f"The image could not be fetched: its server answered {answer.status_code}.")
            data = b""
            async for part in answer.aiter_bytes():
                data += part
                if len(data) > MAX_BYTES:
                    raise _refused(f"The image is larger than {MAX_BYTES >> 20} MB.")
    except httpx.HTTPError as error:
        raise OSError(str(error)) from error
    return data


def _refused(message: str, param: str = "messages") -> InvalidImage:
    return InvalidImage(message, hint="Send the image itself as a data: URL.", param=param, detail={"reason": "url"})

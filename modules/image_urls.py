"""The images that requests name: data: URLs are taken at once; http(s) URLs only where the operator allows it (`--fetch-images`).

Fetching for a stranger must not lead inside (server-side request forgery): only public addresses, looked up once and connected to
as such, no redirects, bounded in bytes and time.
"""

from __future__ import annotations

from modules.errors import InvalidImage
from modules.images import from_data_url

MAX_URL = 2000


def image_source(url: str, param: str) -> str:
    """The base64 of a data: URL's image, checked; an http(s) URL as it is, for `fetch`. Raises InvalidImage for any other."""
    if url[:5].lower() == "data:":
        return from_data_url(url, param)
    if url[:8].lower().startswith(("http://", "https://")) and len(url) <= MAX_URL and url.isprintable() and " " not in url:
        return url
    raise refused_url("An image must be a data: URL, such as data:image/png;base64,….", param)


def is_url(source: str) -> bool:
    """Whether an image is still to be fetched; base64 holds no colon."""
    return ":" in source[:8]


def refused_url(message: str, param: str | None, hint: str = "Send the image itself as a data: URL.") -> InvalidImage:
    return InvalidImage(message, hint=hint, param=param, detail={"reason": "url"})


async def fetched(source: str, allowed: bool) -> str:
    """The base64 of an image that is base64 already, or is fetched now. Raises InvalidImage."""
    if not is_url(source):
        return source
    raise refused_url("This server fetches no images.", "messages")

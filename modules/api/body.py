"""A request's JSON body, strictly: UTF-8, one document, finite numbers, valid Unicode, bounded depth."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from modules.api.dialects import dialect_of, path_of
from modules.errors import InvalidJson, InvalidParameter, InvalidUnicode, UnsupportedMediaType

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_DEPTH = 128
CURL_DEFAULT = "application/x-www-form-urlencoded"
CURL_DIALECTS = ("ollama", "llama_server", "kobold")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = re.compile(rb"(?:\[\s*|\{\s*\"[^\"]{0,64}\"\s*:\s*){%d}" % MAX_DEPTH)
_ODD_NUMBER = re.compile(rb"NaN|Infinity|\d[eE]\+?\d{3}")


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidJson, InvalidUnicode, InvalidParameter or UnsupportedMediaType.

    Clients that send JSON without a content type, or as text/plain, are many; a form or an upload is refused. Ollama's and
    llama.cpp's own manuals say `curl -d '{…}'`, which calls it a form: there that is read too (the guard has refused what comes
    from other sites' pages, whatever its type). Duplicate keys: the last one wins, as in every common parser.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    taken = kind in ("", "application/json", "text/plain") or kind.endswith("+json")
    if not taken and not (kind == CURL_DEFAULT and dialect_of(path_of(request)) in CURL_DIALECTS):
        raise UnsupportedMediaType("The body must be JSON.", hint="Send the header Content-Type: application/json.")
    return parse_object(await request.body())


def parse_object(body: bytes) -> dict[str, Any]:
    """`read_object` without the request."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidJson("The body is not valid UTF-8.") from None
    try:
        value = json.loads(text)
    except RecursionError:
        raise InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except ValueError:  # a number of more than 4300 digits
        raise InvalidJson("The body holds a number that is too long.") from None
    if not isinstance(value, dict):
        raise InvalidJson("The body must be a JSON object.")
    # The walk costs time on a large body and most bodies can't need it.
    if _SURROGATE_ESCAPE.search(body) or _ODD_NUMBER.search(body) or _DEEP.search(body):
        _check_tree(value)
    return value


def _check_tree(root: dict[str, Any]) -> None:
    stack: list[tuple[Any, int, str]] = [(item, 1, name) for name, item in root.items()]
    for name in root:
        _check_text(name, None)
    while stack:
        value, depth, param = stack.pop()
        if depth > MAX_DEPTH:
            raise InvalidJson(f"{_safe(param)} is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, str):
            _check_text(value, param)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidParameter(f"{_safe(param)} must hold finite numbers.", param=_safe(param))
        elif isinstance(value, list):
            stack.extend((item, depth + 1, param) for item in value)
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_text(key, param)
                stack.append((item, depth + 1, param))


def _check_text(text: str, param: str | None) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        name = _safe(param) if param else "A name"
        raise InvalidUnicode(f"{name} holds half of a surrogate pair, which is no character.", param=_safe(param)) from None


def _safe(param: str | None) -> str:
    """A client's own field name, fit for a message."""
    return re.sub(r"[^\w.\-]", "?", param or "")[:64]

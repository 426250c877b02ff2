"""A server's model list, read with care: it is a stranger's."""

from __future__ import annotations

from typing import Any

from modules.errors import RemoteError

MAX_MODELS = 1000
MAX_NAME = 300


def entries(value: Any) -> list[dict[str, Any]]:
    """The models of an answer to GET /models, each with a usable `id`; {"models": …} and a bare list are taken, too. What another
    Switchyard has from elsewhere is left out: two that know each other would list each other's lists for ever.

    Raises RemoteError for something else.
    """
    listed = value.get("data", value.get("models")) if isinstance(value, dict) else value
    if not isinstance(listed, list):
        raise RemoteError(
            "It answered with something that is no list of models.", hint="Check its address: it usually ends with /v1."
        )
    found: dict[str, dict[str, Any]] = {}
    for item in listed:
        entry = {"id": item} if isinstance(item, str) else item
        name = entry.get("id", entry.get("name")) if isinstance(entry, dict) else None
        if isinstance(entry, dict) and entry.get("format") == "remote":
            continue
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip():
            found.setdefault(name, {**entry, "id": name})
        if len(found) == MAX_MODELS:
            break
    return list(found.values())

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


def listed_vision(entry: dict[str, Any]) -> bool | None:
    """Whether an entry of a model list says that the model reads images; None: it does not say. In use are a list of
    capabilities (Switchyard, Ollama's /api/show), an object of them (Mistral), and input modalities (OpenRouter)."""
    told = entry.get("capabilities")
    if isinstance(told, list):
        return "vision" in told
    if isinstance(told, dict) and "vision" in told:
        return told["vision"] is True
    architecture = entry.get("architecture")
    for place in (entry, architecture if isinstance(architecture, dict) else {}):
        if isinstance(place.get("input_modalities"), list):
            return "image" in place["input_modalities"]
    return None

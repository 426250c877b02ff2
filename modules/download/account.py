"""Which hub downloads come from, by which proxy, with whose token: hub.json in the data folder, readable by its owner alone.

A token belongs to one origin (scheme, host, port): choosing a mirror never hands it the token of another hub. It goes in and is
never shown again. Flags and the environment are the operator's base; what is saved here wins.
"""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from modules.download.hub import Hub, check_endpoint, origin, split_url
from modules.errors import ConfigError, InvalidParameter
from modules.overlays import read_json
from modules.private_file import write_private
from modules.yaml_file import save_error

if TYPE_CHECKING:
    from pathlib import Path

FILE = "hub.json"
_TOKEN = re.compile(r"[\x21-\x7e]{4,500}")


class HubAccount:
    """Safe to use from several threads. `endpoint` and `proxy` are the flags."""

    def __init__(self, folder: Path, endpoint: str | None = None, proxy: str | None = None) -> None:
        self._path = folder / FILE
        self._flags = {"endpoint": endpoint, "proxy": proxy}
        self._mutex = threading.Lock()

    def hub(self) -> Hub:
        """The hub to ask now. Raises ConfigError."""
        saved = self._saved()
        base = Hub.from_environment(self._flags["endpoint"])
        endpoint = check_endpoint(saved["endpoint"]) if saved.get("endpoint") else base.endpoint
        token = saved["tokens"].get(_key(endpoint))
        if token is None and origin(endpoint) == origin(base.endpoint):
            token = base.token
        return Hub(endpoint, token, saved.get("proxy") or self._flags["proxy"] or None)

    def shown(self) -> dict[str, Any]:
        """What the page may know: no token, and no password of a proxy. Raises ConfigError."""
        saved, hub = self._saved(), self.hub()
        own = _key(hub.endpoint) in saved["tokens"]
        return {
            "endpoint": hub.endpoint,
            "own_endpoint": bool(saved.get("endpoint")),
            "proxy": _without_password(hub.proxy) if hub.proxy else None,
            "own_proxy": bool(saved.get("proxy")),
            "token": "saved" if own else "environment" if hub.token else None,
        }

    def change(self, changes: dict[str, Any]) -> None:
        """Take `endpoint`, `proxy` and `token` (of the hub as it is after the change); null or "" takes one away.

        Raises InvalidParameter, StorageError's subclasses.
        """
        with self._mutex:
            saved = self._saved()
            if "endpoint" in changes:
                saved["endpoint"] = _checked_endpoint(changes["endpoint"])
            if "proxy" in changes:
                saved["proxy"] = _checked_proxy(changes["proxy"])
            if "token" in changes:
                endpoint = saved.get("endpoint") or Hub.from_environment(self._flags["endpoint"]).endpoint
                saved["tokens"].pop(_key(endpoint), None)
                if changes["token"]:
                    saved["tokens"][_key(endpoint)] = _checked_token(changes["token"])
            self._write({name: value for name, value in saved.items() if value})

    def _saved(self) -> dict[str, Any]:
        """A damaged file counts as empty: nothing in it opens anything, and the next change writes it anew."""
        data = read_json(self._path)
        tokens = data.get("tokens")
        texts = {name: data[name] for name in ("endpoint", "proxy") if isinstance(data.get(name), str)}
        good = {k: v for k, v in tokens.items() if isinstance(v, str)} if isinstance(tokens, dict) else {}
        return {**texts, "tokens": good}

    def _write(self, data: dict[str, Any]) -> None:
        try:
            write_private(self._path, json.dumps(data, indent=1))
        except OSError as error:
            raise save_error(FILE, error) from error


def _key(endpoint: str) -> str:
    scheme, host, port = origin(endpoint)
    return f"{scheme}://{host}:{port}"


def _checked_endpoint(value: Any) -> str | None:
    if not value:
        return None
    if not isinstance(value, str) or len(value) > 500:
        raise InvalidParameter("endpoint must be a web address.", param="endpoint")
    try:
        return check_endpoint(value)
    except ConfigError as error:
        raise InvalidParameter(error.message, hint=error.hint, param="endpoint") from error


def _checked_proxy(value: Any) -> str | None:
    if not value:
        return None
    parts = split_url(value) if isinstance(value, str) and len(value) <= 500 else None
    if parts is None or parts.scheme != "http" or not parts.hostname or not value.isprintable():
        raise InvalidParameter("proxy must be an address like http://proxy.example.org:3128.", param="proxy")
    return str(value)


def _checked_token(value: Any) -> str:
    if not isinstance(value, str) or not _TOKEN.fullmatch(value.strip()):
        raise InvalidParameter("token must be the hub's token: letters and digits without spaces.", param="token")
    return value.strip()


def _without_password(proxy: str) -> str:
    parts = urlsplit(proxy)
    if parts.password is None:
        return proxy
    return urlunsplit(parts._replace(netloc=f"{parts.username}:•••@{parts.netloc.rpartition('@')[2]}"))

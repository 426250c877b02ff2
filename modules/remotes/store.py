"""The saved servers: name, address, key, certificates and proxy, in one file of the data folder that its owner alone can read.

The file is read again whenever it changes, so a running server takes what `server.py remote` does, and a worker finds its key
here: the key crosses no pipe, stands in no option, and is in no answer and no log.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from modules.errors import ConfigError, Conflict, InvalidParameter, NotFound, RemoteError
from modules.private_file import write_private
from modules.remotes.address import check_proxy, check_url, is_name, resolve, without_password
from modules.remotes.route import check_ca
from modules.yaml_file import save_error

FILE = "remotes.json"
MAX_SERVERS = 100
MAX_KEY = 4096
PREFIX = "remote/"
KINDS = ("auto", "switchyard", "vllm", "llama-server", "llama-cpp-python", "tgi", "ollama", "tabbyapi", "openai")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, slots=True)
class Server:
    """One saved server. `reach` is how far inside its address led when it was saved (modules.reach), `proxy_reach` its proxy's.

    `ca`: the certificates, as PEM, of the only authorities that count for it; None: the usual ones. `proxy`: the URL of an HTTP
    proxy, with its password; `proxy_resolves`: the proxy looks the server's name up.
    """

    name: str
    url: str
    kind: str = "auto"
    reach: int = 0
    key: str | None = field(default=None, repr=False)
    ca: str | None = field(default=None, repr=False)
    proxy: str | None = field(default=None, repr=False)
    proxy_reach: int = 0
    proxy_resolves: bool = False

    def public(self) -> dict[str, Any]:
        """What may be shown: everything but the key and the proxy's password."""
        return {
            "name": self.name,
            "url": self.url,
            "kind": self.kind,
            "has_key": self.key is not None,
            "has_ca": self.ca is not None,
            "proxy": without_password(self.proxy) if self.proxy is not None else None,
            "proxy_resolves": self.proxy_resolves,
        }

    def secrets(self) -> list[str]:
        """What no message may hold."""
        password = urlsplit(self.proxy).password if self.proxy is not None else None
        return [word for word in (self.key, password, unquote(password or "")) if word]


def check_key(key: str | None) -> str | None:
    """A key fit for a header; None for an empty one. Raises InvalidParameter."""
    key = (key or "").strip()
    if len(key) > MAX_KEY or any(not 33 <= ord(c) <= 126 for c in key):
        raise InvalidParameter("A key is one word of printable ASCII characters.", param="key")
    return key or None


class RemoteStore:
    """The servers of one data folder. Safe to use from several threads and processes (a write replaces the whole file)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._mutex = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._servers: tuple[Server, ...] = ()

    def servers(self) -> tuple[Server, ...]:
        """Every server, by name. Raises ConfigError for a file that can't be read."""
        with self._mutex:
            try:
                status = self.path.stat()
            except FileNotFoundError:
                self._servers, self._stamp = (), None
                return ()
            except OSError as error:
                raise ConfigError(f"{self.path.name} can't be read: {error.strerror}.") from error
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._servers, self._stamp = read_servers(self.path), stamp
            return self._servers

    def get(self, name: str) -> Server:
        """Raises NotFound."""
        for server in self.servers():
            if server.name == name:
                return server
        raise NotFound(f"There is no server named {name[:60]!r}.", hint="server.py remote list shows them.", param="name")

    def add(
        self,
        name: str,
        url: str,
        key: str | None = None,
        kind: str = "auto",
        *,
        ca: str | None = None,
        proxy: str | None = None,
        proxy_resolves: bool = False,
    ) -> Server:
        """Check and save one. It blocks: the names are looked up. Raises InvalidParameter, Conflict, StorageError."""
        if not _NAME.fullmatch(name):
            raise InvalidParameter(
                "A server's name has 1 to 40 letters, digits, dots, _ or -, and begins with a letter or digit.", param="name"
            )
        if kind not in KINDS:
            raise InvalidParameter(f"A server's kind is one of {', '.join(KINDS)}.", param="kind")
        url, key, ca = check_url(url), check_key(key), check_ca(ca)
        proxy = check_proxy(proxy) if proxy is not None and proxy.strip() else None
        if ca is not None and not url.startswith("https:"):
            raise InvalidParameter("Certificates are for an https:// address.", param="ca")
        if proxy_resolves and proxy is None:
            raise InvalidParameter("There is no proxy that could look the name up.", param="proxy_resolves")
        proxy_reach = _reach(proxy, "proxy") if proxy is not None else 0
        reach = 0 if proxy_resolves and is_name(url) else _reach(url, "url", proxied=proxy is not None)
        servers = self.servers()
        if any(server.name.lower() == name.lower() for server in servers):
            raise Conflict(f"There is already a server named {name}.", hint="Remove it first, or choose another name.")
        if len(servers) >= MAX_SERVERS:
            raise InvalidParameter(f"There are {MAX_SERVERS} servers already.", hint="Remove some.")
        server = Server(name, url, kind, reach, key, ca, proxy, proxy_reach, proxy_resolves)
        self._write((*servers, server))
        return server

    def remove(self, name: str) -> Server:
        """Forget a server and its key. Raises NotFound."""
        found = self.get(name)
        self._write(tuple(server for server in self.servers() if server.name != name))
        return found

    def _write(self, servers: tuple[Server, ...]) -> None:
        rows = [asdict(server) for server in sorted(servers, key=lambda server: server.name.lower())]
        for row in rows:  # an older version reads what it knows
            for name in [name for name in ("ca", "proxy", "proxy_reach", "proxy_resolves") if not row[name]]:
                del row[name]
        try:
            write_private(self.path, json.dumps({"servers": rows}, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise save_error(self.path.name, error) from error


def _reach(url: str, param: str, *, proxied: bool = False) -> int:
    """How far inside an address leads. Raises InvalidParameter where it leads nowhere."""
    try:
        return resolve(url)[1]
    except RemoteError as error:
        hint = "If only the proxy knows this name, let the proxy look it up (--proxy-resolves)." if proxied else error.hint
        raise InvalidParameter(error.message, hint=hint, param=param) from error


def read_servers(path: Path) -> tuple[Server, ...]:
    """Raises ConfigError for a damaged file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["servers"]
        servers = tuple(Server(**row) for row in rows)
        if not all(_sound(server) for server in servers):
            raise ValueError
    except OSError as error:
        raise ConfigError(f"{path.name} can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, InvalidParameter) as error:
        raise ConfigError(
            f"{path.name} is damaged.", hint="Put a copy of it back, or delete it and add the servers again."
        ) from error
    return servers


def _sound(server: Server) -> bool:
    texts = isinstance(server.name, str) and isinstance(server.url, str) and isinstance(server.reach, int)
    return (
        texts
        and _NAME.fullmatch(server.name) is not None
        and server.kind in KINDS
        and check_url(server.url) == server.url
        and (server.key is None or (isinstance(server.key, str) and check_key(server.key) == server.key))
        and (server.ca is None or (isinstance(server.ca, str) and check_ca(server.ca) == server.ca))
        and (server.proxy is None or (isinstance(server.proxy, str) and check_proxy(server.proxy) == server.proxy))
        and isinstance(server.proxy_reach, int)
        and isinstance(server.proxy_resolves, bool)
    )


# --- a model of a server, as the rest of the product names it -----------------------------------------------------


def model_id(server: str, model: str) -> str:
    return f"{PREFIX}{server}/{model}"


def model_path(file: Path, server: str, model: str) -> str:
    """What a worker is told to load: where the servers are saved, which of them, and its name for the model."""
    return f"{file}#{server}/{model}"


def split_path(path: str) -> tuple[Path, str, str] | None:
    """The parts of `model_path`, None for something else."""
    file, mark, rest = path.rpartition(f"{FILE}#")
    server, slash, model = rest.partition("/")
    return (Path(f"{file}{FILE}"), server, model) if mark and slash and server and model else None

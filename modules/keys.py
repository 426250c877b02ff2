"""API keys with names: made, listed and revoked by `server.py keys`, kept as hashes in the data folder.

A key is 256 random bits, so one SHA-256 of it is as good as the key is: nothing can be guessed from the file. The file is read
again whenever it changes, so a running server takes a new key, and drops a revoked one, at its next request.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modules.errors import AppError, ConfigError, Conflict, InvalidParameter, NotFound, StorageError
from modules.private_file import write_private

if TYPE_CHECKING:
    import argparse

    from modules.config import Config

Scope = Literal["user", "admin"]
SCOPES: tuple[Scope, ...] = ("user", "admin")
FILE = "keys.json"
PREFIX = "sy-"
MAX_KEYS = 1000
_NAME = re.compile(r"[^\W_][\w .@+-]{0,62}[\w)]|[^\W_]")
_HEX = re.compile(r"[0-9a-f]{64}")
_RECHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Key:
    """One key without its secret. `hint` is its last four characters, to tell keys apart; `created_at` is seconds UTC."""

    name: str
    scope: Scope
    sha256: str
    hint: str
    created_at: int

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)


def digest(text: str) -> bytes:
    """What is stored and compared in place of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class KeyStore:
    """The key file of one data folder. Safe to use from several threads and processes (a write replaces the whole file)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._keys: tuple[Key, ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        self._looked_at = float("-inf")
        self._mutex = threading.Lock()

    def keys(self, *, now: bool = True) -> tuple[Key, ...]:
        """Every key. With `now` False the file is looked at once a second at most.

        Raises ConfigError for a file that can't be read: a server that took it for empty would be open.
        """
        with self._mutex:
            if not now and time.monotonic() - self._looked_at < _RECHECK_S:
                return self._keys
            try:
                status = self.path.stat()
            except FileNotFoundError:
                self._keys, self._stamp = (), None
            except OSError as error:
                raise ConfigError(f"The key file {self.path} can't be read: {error.strerror}.") from error
            else:
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if stamp != self._stamp:
                    self._keys, self._stamp = _read(self.path), stamp
            self._looked_at = time.monotonic()
            return self._keys

    def create(self, name: str, scope: Scope = "user") -> str:
        """Make a key and return it: the only time it can be seen. Raises InvalidParameter or Conflict."""
        if not _NAME.fullmatch(name):
            raise InvalidParameter(
                "A key's name has 1 to 64 letters, digits, spaces and . _ @ + -, and begins with a letter or digit.", param="name"
            )
        if scope not in SCOPES:
            raise InvalidParameter("A key's scope is user or admin.", param="scope")
        keys = self.keys()
        if any(key.name == name for key in keys):
            raise Conflict(f"There is already a key named {name}.", hint=f"Revoke it first: server.py keys revoke {name!r}.")
        if len(keys) >= MAX_KEYS:
            raise InvalidParameter(f"There are {MAX_KEYS} keys already.", hint="Revoke some.")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._write((*keys, Key(name, scope, digest(secret).hex(), secret[-4:], int(time.time()))))
        return secret

    def revoke(self, name: str) -> Key:
        """Forget a key: its next request is refused. Raises NotFound."""
        keys = self.keys()
        found = next((key for key in keys if key.name == name), None)
        if found is None:
            raise NotFound(f"There is no key named {name!r}.", hint="server.py keys list shows them.")
        self._write(tuple(key for key in keys if key is not found))
        return found

    def _write(self, keys: tuple[Key, ...]) -> None:
        text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1, ensure_ascii=False) + "\n"
        try:
            write_private(self.path, text)
        except OSError as error:
            raise StorageError(f"The key file could not be written: {error.strerror}.", hint="The keys are as before.") from error
        with self._mutex:
            self._stamp, self._looked_at = None, float("-inf")


def _read(path: Path) -> tuple[Key, ...]:
    broken = ConfigError(
        f"The key file {path} is damaged.", hint="Put a copy of it back, or delete it and make new keys with `server.py keys`."
    )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = tuple(Key(**row) for row in rows)
    except OSError as error:
        raise ConfigError(f"The key file {path} can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise broken from error
    if not all(key.scope in SCOPES and isinstance(key.sha256, str) and _HEX.fullmatch(key.sha256) for key in keys):
        raise broken
    return keys


# --- server.py keys --------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `keys` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="API keys for programs and people. A key is shown once, when it is made; the data folder holds only its "
        "hash. As soon as there is one, every request needs a key. A running server takes changes at once.",
    )
    parser.add_argument("action", choices=("create", "list", "revoke"), help="make a key and print it, show all, take one back")
    parser.add_argument("name", nargs="?", help="whose or what the key is for, such as laptop")
    parser.add_argument("--scope", choices=SCOPES, default="user", help="user: use models; admin: also load and install them")
    parser.add_argument("--json", action="store_true", dest="as_json", help="list: as JSON")
    return parser


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 done, 1 refused."""
    store = KeyStore(config.user_data_dir)
    try:
        if (arguments.name is None) != (arguments.action == "list"):
            raise InvalidParameter(f"keys {arguments.action} takes {'no name' if arguments.name else 'a name'}.", param="name")
        if arguments.action == "create":
            secret = store.create(arguments.name, arguments.scope)
            print(secret)
            print(f"Keep it: it is not shown again. Scope: {arguments.scope}.", file=sys.stderr)
        elif arguments.action == "revoke":
            store.revoke(arguments.name)
            print(f"{arguments.name} is revoked.")
        else:
            _list(store.keys(), as_json=arguments.as_json)
    except ConfigError:
        raise
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    return 0


def _list(keys: tuple[Key, ...], *, as_json: bool) -> None:
    if as_json:
        shown = [{"name": k.name, "scope": k.scope, "hint": k.hint, "created_at": k.created_at} for k in keys]
        print(json.dumps(shown, ensure_ascii=False))
        return
    if not keys:
        print("There are no keys. Make one: server.py keys create NAME")
    for key in keys:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_at))
        print(f"{key.name:<24} {key.scope:<6} …{key.hint}  {made}")

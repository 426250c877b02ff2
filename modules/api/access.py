"""Who may call: keys for programs, a cookie for browsers. Off while there is no key, on this machine alone.

Keys are those of `server.py keys` (modules.keys) and of --api-key and --admin-key. A key comes as `Authorization: Bearer KEY`,
`x-api-key: KEY` or `api-key: KEY`, by one code path, compared in constant time. A browser logs in once, with the one-time
`?token=` that the server prints at start or with a key, and then holds a cookie that no script can read and no other site can
send.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from modules.api.body import parse_object
from modules.api.errors import body_of
from modules.errors import ConfigError, Forbidden, TooManyRequests, Unauthorized
from modules.keys import KeyStore, Scope, digest

if TYPE_CHECKING:
    from modules.config import Config

log = logging.getLogger(__name__)

COOKIE = "switchyard_session"
SESSION_S = 30 * 24 * 3600
FAILURES, FAILURE_WINDOW_S = 10, 60.0
FREE_PATHS = frozenset({"/health", "/login", "/favicon.ico"})
# Reading these is anybody's; changing what is loaded, installed or applied is the operator's.
ADMIN_WRITES = (
    *("/ui-api/models/", "/ui-api/loaders/", "/ui-api/evaluations", "/ui-api/quantizations", "/ui-api/datasets"),
    *("/ui-api/downloads", "/ui-api/conversions", "/ui-api/trash", "/ui-api/remotes", "/api/pull", "/api/delete"),
)
# What text-generation-webui asks its admin key for, reading included.
ADMIN_PATHS = tuple(
    f"/v1/internal/{name}"
    for name in ("model/list", "model/plan", "model/load", "model/unload", "model/download", "lora/", "remotes")
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whoever showed a key. `name` is the key's; the command line's are called "the user key" and "the admin key"."""

    name: str
    scope: Scope
    digest: bytes


NOBODY = Identity("", "admin", b"")  # while no key is needed
OPERATOR = Identity("operator", "admin", b"")  # came with the address that the server printed


class AccessControl:
    """`keys` are those of the command line. With `required` nobody comes in without a key, even while there is none."""

    def __init__(
        self,
        keys: Mapping[str, Scope],
        *,
        store: KeyStore | None = None,
        required: bool = False,
        secure_cookie: bool = False,
    ) -> None:
        self._given = [Identity(f"the {scope} key", scope, digest(key)) for key, scope in keys.items() if key]
        self._store = store
        self._stored: list[Identity] = []
        self._seen: object = None
        self._required = required
        self._secure = secure_cookie
        self._sessions: dict[bytes, tuple[float, Identity]] = {}
        self._one_time: bytes | None = None
        self._failures: dict[str, list[float]] = {}
        self._proven: set[tuple[str, bytes]] = set()

    @classmethod
    def of(cls, config: Config) -> AccessControl:
        """Raises ConfigError for a key file that can't be read."""
        keys: dict[str, Scope] = {}
        if config.api_key:
            keys[config.api_key] = "user" if config.admin_key and config.admin_key != config.api_key else "admin"
        if config.admin_key:
            keys[config.admin_key] = "admin"
        store = KeyStore(config.user_data_dir)
        store.keys()
        beyond = not config.is_loopback and not config.i_know
        return cls(keys, store=store, required=beyond, secure_cookie=config.ssl_certfile is not None)

    @property
    def enabled(self) -> bool:
        return bool(self._required or self._given or self._from_store())

    def _from_store(self) -> list[Identity]:
        """The named keys now. A file that became unreadable leaves those last read: a mistake in it must open nothing."""
        if self._store is None:
            return []
        try:
            keys = self._store.keys(now=False)
        except ConfigError as error:
            if self._seen != str(error):
                self._seen = str(error)
                log.error("%s The keys read before stay in force.", error)
            return self._stored
        if keys is not self._seen:
            self._seen = keys
            self._stored = [Identity(key.name, key.scope, key.digest) for key in keys]
        return self._stored

    def login_url(self, url: str) -> str:
        """The address to open in the operator's browser; with keys, it carries a token that works once."""
        if not self.enabled:
            return url
        token = secrets.token_urlsafe(32)
        self._one_time = digest(token)
        return f"{url}/?token={token}"

    # --- checks -----------------------------------------------------------------------------------------------

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], client: str) -> Identity:
        """Who it is. Raises Unauthorized, Forbidden or TooManyRequests. One path for every form of credential."""
        if not self.enabled or path in FREE_PATHS:
            return NOBODY
        credentials, cookie = _credentials(headers)
        identity = self._of_keys(credentials, client) if credentials else self._of_cookie(cookie)
        if identity is None:
            raise Unauthorized("A valid API key is needed.", hint="Send it as: Authorization: Bearer KEY.")
        writes = method not in ("GET", "HEAD") and path.startswith(ADMIN_WRITES)
        if identity.scope != "admin" and (writes or path.startswith(ADMIN_PATHS)):
            raise Forbidden("This needs an admin key.")
        return identity

    def _of_keys(self, credentials: list[str], client: str) -> Identity | None:
        """Several credentials must agree: a proxy's and a client's header must not be mixed up.

        Raises TooManyRequests for an address that guesses; a key that this address has used before still passes, so that one
        misconfigured program does not lock out the others beside it.
        """
        given = digest(credentials[0])
        if (client, given) not in self._proven:
            self._check_rate(client)
        identity = self._find(given) if len(set(credentials)) == 1 else None
        if identity is None:
            self._proven.discard((client, given))
            self._failed(client)
        elif len(self._proven) < 10_000:
            self._proven.add((client, given))
        return identity

    def _find(self, given: bytes) -> Identity | None:
        found: Identity | None = None
        for identity in (*self._from_store(), *self._given):  # every key is compared, whichever matches
            if hmac.compare_digest(identity.digest, given):
                found = identity
        return found

    def _of_cookie(self, cookie: str) -> Identity | None:
        """A session lasts as long as the key it began with."""
        expires, identity = self._sessions.get(digest(cookie), (0.0, NOBODY)) if cookie else (0.0, NOBODY)
        if expires <= time.time():
            return None
        return identity if identity is OPERATOR else self._find(identity.digest)

    def valid(self, identity: Identity) -> bool:
        """Whether a request that came in as `identity` may go on: its key was not revoked meanwhile."""
        return identity is NOBODY or identity is OPERATOR or self._find(identity.digest) is not None

    def _check_rate(self, client: str) -> None:
        now = time.monotonic()
        recent = [t for t in self._failures.get(client, ()) if now - t < FAILURE_WINDOW_S]
        if recent:
            self._failures[client] = recent
        else:
            self._failures.pop(client, None)
        if len(recent) >= FAILURES:
            raise TooManyRequests("Too many wrong keys from this address.", hint="Wait a minute.")

    def _failed(self, client: str) -> None:
        if len(self._failures) > 10_000:
            self._failures.clear()
        self._failures.setdefault(client, []).append(time.monotonic())

    # --- the browser ------------------------------------------------------------------------------------------

    def take_token(self, path: str, query: str) -> Response | None:
        """A redirect that sets the cookie, for a GET with a valid one-time token."""
        pairs = parse_qsl(query, keep_blank_values=True)
        token = next((value for name, value in pairs if name == "token"), None)
        if not self.enabled or token is None or self._one_time is None:
            return None
        if not hmac.compare_digest(self._one_time, digest(token)):
            return None
        self._one_time = None
        rest = urlencode([pair for pair in pairs if pair[0] != "token"])
        response = RedirectResponse("/" + path.lstrip("/") + (f"?{rest}" if rest else ""), status_code=303)
        self._set_cookie(response, OPERATOR)
        return response

    def _set_cookie(self, response: Response, identity: Identity) -> None:
        now = time.time()
        self._sessions = {key: entry for key, entry in self._sessions.items() if entry[0] > now}
        session = secrets.token_urlsafe(32)
        self._sessions[digest(session)] = (now + SESSION_S, identity)
        response.set_cookie(COOKIE, session, max_age=SESSION_S, httponly=True, samesite="strict", secure=self._secure, path="/")

    def build_router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        @router.get("/login")
        async def page() -> Response:
            return HTMLResponse(LOGIN_PAGE, headers={"Cache-Control": "no-store"})

        @router.post("/login")
        async def login(request: Request) -> Response:
            body = await request.body()
            form = request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
            fields = dict(parse_qsl(body.decode("utf-8", "replace"))) if form else parse_object(body)
            client = request.client.host if request.client else ""
            identity = self._of_keys([str(fields.get("key", "")).strip()], client)
            if identity is None:
                if form:
                    return HTMLResponse(LOGIN_PAGE.replace("<!--say-->", "That key is not right."), status_code=401)
                return JSONResponse(body_of(Unauthorized("That key is not right.")), status_code=401)
            response: Response = RedirectResponse("./", status_code=303) if form else JSONResponse({"ok": True})
            self._set_cookie(response, identity)
            return response

        return router


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[str], str]:
    """(keys sent in any header, session cookie)."""
    found: list[str] = []
    cookie = ""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            found.append(key if scheme.lower() == "bearer" else "")
        elif name in (b"x-api-key", b"api-key"):
            found.append(value.decode("latin-1"))
        elif name == b"cookie":
            for pair in value.decode("latin-1").split(";"):
                key, _, content = pair.strip().partition("=")
                cookie = content if key == COOKIE else cookie
    return found, cookie


LOGIN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Switchyard: log in</title><style>
:root { color-scheme: light dark }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; font: 16px/1.5 system-ui, sans-serif }
form { display: grid; gap: .8rem; width: min(20rem, 80vw) }
input, button { font: inherit; padding: .6rem .8rem; min-height: 44px; box-sizing: border-box }
p { margin: 0; min-height: 1.5em }
</style></head><body>
<form method="post" action="login"><label for="key">API key of this Switchyard server</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button><p role="alert"><!--say--></p></form></body></html>
"""

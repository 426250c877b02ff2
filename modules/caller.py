"""Who asks: known from the guard at the edge down to the run, without being handed through every call between them."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's sender. `key` is the name of the key it showed, `agent` its User-Agent; both may be empty.

    `request_id` goes out as X-Request-Id and is the part after the prefix of the response's own id (chatcmpl-…).
    `background` work (a batch) lets every other request go first.
    """

    client: str = ""
    key: str = ""
    agent: str = ""
    request_id: str = field(default_factory=lambda: secrets.token_hex(12))
    background: bool = False

    def same_program(self, other: Caller) -> bool:
        """Whether both requests come from what looks like one program: same address, key and User-Agent."""
        return (self.client, self.key, self.agent) == (other.client, other.key, other.agent)


_CURRENT: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current() -> Caller:
    """The sender of the request being served; outside of one, nobody with a fresh id."""
    return _CURRENT.get() or Caller()


def enter(caller: Caller) -> None:
    """For the task that serves this request, and those it starts."""
    _CURRENT.set(caller)


def request_id() -> str:
    """The id of the request being served, 24 hexadecimal digits."""
    return current().request_id

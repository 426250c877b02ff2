"""Reading the page's JSON bodies: each field named, typed and bounded, nothing beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.api.body import read_object
from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_TEXT = 4_000_000


class Body:
    """Take each field once, then call `end()`: a field that nobody took is refused."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = dict(data)

    @classmethod
    async def of(cls, request: Request) -> Body:
        """The request's body; an empty one is an empty object."""
        return cls({} if not await request.body() else await read_object(request))

    def has(self, name: str) -> bool:
        return name in self._data

    def text(self, name: str, *, limit: int = MAX_TEXT) -> str:
        """A text that must be there; it may be empty."""
        if name not in self._data:
            raise InvalidParameter(f"{name} is missing.", param=name)
        value = self._data.pop(name)
        if not isinstance(value, str) or len(value) > limit:
            raise InvalidParameter(f"{name} must be text of at most {limit} characters.", param=name)
        return value

    def optional_text(self, name: str, *, limit: int = MAX_TEXT) -> str | None:
        """None where it is missing or null."""
        if self._data.get(name) is None:
            self._data.pop(name, None)
            return None
        return self.text(name, limit=limit)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._data.pop(name, default)
        if not isinstance(value, bool):
            raise InvalidParameter(f"{name} must be true or false.", param=name)
        return value

    def optional_int(self, name: str) -> int | None:
        value = self._data.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**53):
            raise InvalidParameter(f"{name} must be a whole number.", param=name)
        return value

    def optional_object(self, name: str) -> dict[str, Any] | None:
        value = self._data.pop(name, None)
        if value is not None and not isinstance(value, dict):
            raise InvalidParameter(f"{name} must be an object.", param=name)
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self._data.pop(name, default)
        if value not in choices:
            raise InvalidParameter(f"{name} must be one of {', '.join(choices)}.", param=name)
        return str(value)

    def optional_texts(self, name: str, *, most: int, limit: int = 1000) -> list[str]:
        """A list of texts; empty where it is missing or null."""
        value = self._data.pop(name, None) or []
        if not isinstance(value, list) or len(value) > most or not all(isinstance(t, str) and 0 < len(t) <= limit for t in value):
            raise InvalidParameter(f"{name} must be a list of at most {most} texts.", param=name)
        return value

    def rest(self) -> dict[str, Any]:
        """Everything that is left, for a table that checks its own names."""
        rest, self._data = self._data, {}
        return rest

    def end(self) -> None:
        if self._data:
            name = "".join(c if c.isprintable() else "?" for c in min(self._data))[:64]
            raise InvalidParameter(f"There is no field {name!r} here.", param=name)

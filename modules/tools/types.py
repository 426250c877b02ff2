"""The types of tool calling, free of any protocol."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Function:
    """One function the model may call. `parameters` is a JSON schema of an object. `strict` holds its calls to that schema
    even where the model could have answered with text."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def openai(self) -> dict[str, Any]:
        """The form chat templates take."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }


@dataclass(frozen=True, slots=True)
class Toolset:
    """The functions of one request. `choice`: "auto", "none", "required", or the name of the one function to call.
    `parallel` allows several calls in one answer."""

    functions: tuple[Function, ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def offered(self) -> tuple[Function, ...]:
        """Those the model is told of."""
        if self.choice == "none":
            return ()
        if self.forced_name is not None:
            return tuple(f for f in self.functions if f.name == self.choice)
        return self.functions

    @property
    def forced_name(self) -> str | None:
        return None if self.choice in ("auto", "none", "required") else self.choice

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice not in ("auto", "none")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A finished call. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"

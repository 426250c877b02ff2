"""Holds an answer to a tool call: what the prompt already writes of it, and the JSON schema of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules.errors import UnsupportedParameter

if TYPE_CHECKING:
    from modules.tools.dialects import Dialect
    from modules.tools.types import Function, Toolset


@dataclass(frozen=True, slots=True)
class Forced:
    """`opening` goes to the end of the prompt, `schema` is what the model may write after it."""

    opening: str
    schema: dict[str, Any]


def force(toolset: Toolset, dialect: Dialect) -> Forced:
    """For tool_choice "required" or a named function. Raises UnsupportedParameter where the dialect names the function before
    its JSON and there are several to choose from.

    The mark before the call goes into the prompt, so that it becomes the special token it may be; the call itself is plain JSON,
    which every loader can be held to.
    """
    functions = toolset.offered
    if dialect.kind == "named":
        if len(functions) > 1:
            raise UnsupportedParameter(
                "This model names the function outside the JSON, so an answer can be held to one function only.",
                hint='Name it: {"type": "function", "function": {"name": …}}.',
                param="tool_choice",
            )
        return Forced(f"{dialect.open}{functions[0].name}{dialect.separator}", _parameters(functions[0]))
    calls = [_call(function, dialect) for function in functions]
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    # A model whose calls are tags is held to the JSON form, which the reader takes from any model.
    opening = "" if dialect.bare else f"{dialect.open}\n"
    if not dialect.listed:
        return Forced(opening, one)
    many: dict[str, Any] = {"type": "array", "items": one, "minItems": 1, "maxItems": 8 if toolset.parallel else 1}
    return Forced(dialect.open, many)


def _call(function: Function, dialect: Dialect) -> dict[str, Any]:
    properties = {dialect.name_key: {"const": function.name}, dialect.arguments_key: _parameters(function)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _parameters(function: Function) -> dict[str, Any]:
    """The parameters' schema; one that says nothing of other properties allows none, as the functions themselves do."""
    schema = function.parameters
    if schema.get("type", "object") == "object" and "additionalProperties" not in schema:
        return {"type": "object", "properties": {}, **schema, "additionalProperties": False}
    return schema

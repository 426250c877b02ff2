"""The JSON schemas of request bodies in the OpenAPI document: a body is checked by `parse`, so FastAPI knows no model of it.

They are made when the document is asked for: all of them at every start would take longer than building the routes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules import sampling

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

_KINDS = {
    "float": "number",
    "int": "integer",
    "bool": "boolean",
    "text": "string",
    "strings": "array",
    "names": "array",
    "bias": "object",
}
_MARK = "x-switchyard-body"
_BODIES: dict[str, tuple[type[BaseModel], bool]] = {}


def body_schema(model: type[BaseModel], *, samplers: bool = True, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route with such a body; with `samplers` the sampling parameters are among its fields."""
    mark = f"{model.__module__}.{model.__qualname__} {samplers}"
    _BODIES[mark] = (model, samplers)
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": {_MARK: mark}}}}}


def install(app: FastAPI) -> None:
    """Put the schemas into the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for operations in document["paths"].values():
            for operation in operations.values():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                if mark := content.get("schema", {}).get(_MARK):
                    content["schema"] = _schema_of(*_BODIES[mark])
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _schema_of(model: type[BaseModel], samplers: bool) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    for parameter in sampling.PARAMETERS.values() if samplers else ():
        entry: dict[str, Any] = {"type": _KINDS[parameter.kind], "description": parameter.help}
        if parameter.minimum is not None:
            entry["minimum"] = parameter.minimum
        if parameter.maximum is not None:
            entry["maximum"] = parameter.maximum
        if parameter.kind in ("strings", "names"):
            entry["items"] = {"type": "string"}
        schema["properties"].setdefault(parameter.name, entry)

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].rpartition("/")[2]])
            return {key: inline(item) for key, item in value.items() if item is not None}  # a default of null says nothing
        return [inline(item) for item in value] if isinstance(value, list) else value

    return dict(inline(schema))

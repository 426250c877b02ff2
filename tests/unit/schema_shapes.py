"""Fifty JSON schemas of the shapes that clients send most: what structured output must compile, and be fast at."""

from __future__ import annotations

from typing import Any

STR, INT, NUM, BOOL = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}


def obj(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    """An object as OpenAI's strict mode wants it: all required, nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def arr(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


TREE = {
    "$defs": {"node": obj(["value"], value=INT, children=arr({"$ref": "#/$defs/node"}, maxItems=2))},
    "$ref": "#/$defs/node",
}
ADDRESS = obj(street=STR, city=STR, zip={"type": "string", "pattern": "^[0-9]{5}$"})
PYDANTIC = {
    "$defs": {
        "Color": {"enum": ["red", "green", "blue"], "title": "Color", "type": "string"},
        "Item": {
            "properties": {
                "name": {"title": "Name", "type": "string"},
                "price": {"minimum": 0, "title": "Price", "type": "number"},
                "color": {"$ref": "#/$defs/Color"},
            },
            "required": ["name", "price", "color"],
            "title": "Item",
            "type": "object",
        },
    },
    "properties": {
        "items": {"items": {"$ref": "#/$defs/Item"}, "title": "Items", "type": "array", "maxItems": 3},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"},
    },
    "required": ["items"],
    "title": "Order",
    "type": "object",
}

SHAPES: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "string": STR,
    "integer": INT,
    "number": NUM,
    "boolean": BOOL,
    "null": {"type": "null"},
    "enum": {"enum": ["yes", "no", "maybe"]},
    "mixed enum": {"enum": ["a", 1, None, True]},
    "const": {"const": "fixed"},
    "one string": obj(answer=STR),
    "one integer": obj(n=INT),
    "two": obj(name=STR, age=INT),
    "ten": obj(**{f"field_{i}": STR for i in range(10)}),
    "forty": obj(**{f"field_{i}": [STR, INT, NUM, BOOL][i % 4] for i in range(40)}),
    "all optional": obj([], a=STR, b=INT, c=BOOL),
    "some optional": obj(["id"], id=INT, name=STR, tags=arr(STR)),
    "open object": {"type": "object", "properties": {"name": STR}, "required": ["name"]},
    "map of integers": {"type": "object", "additionalProperties": INT},
    "no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    "array of strings": arr(STR, maxItems=4),
    "array of objects": arr(obj(x=INT, y=INT), minItems=1, maxItems=3),
    "array in object": obj(items=arr(INT, minItems=2, maxItems=4)),
    "empty array": arr(STR, maxItems=0),
    "matrix": arr(arr(INT, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "tuple": {"type": "array", "prefixItems": [STR, INT], "items": False, "minItems": 2},
    "nested": obj(user=obj(name=STR, address=ADDRESS)),
    "five deep": obj(a=obj(b=obj(c=obj(d=obj(e=INT))))),
    "nullable": obj(name={"type": ["string", "null"]}),
    "any of": obj(value={"anyOf": [STR, INT, {"type": "null"}]}),
    "one of objects": {"oneOf": [obj(kind={"const": "circle"}, r=NUM), obj(kind={"const": "square"}, side=NUM)]},
    "all of": {"allOf": [obj(a=STR) | {"additionalProperties": True}, {"properties": {"b": INT}, "required": ["b"]}]},
    "reference": {"$defs": {"p": obj(x=INT)}, **obj(first={"$ref": "#/$defs/p"}, second={"$ref": "#/$defs/p"})},
    "definitions": {"definitions": {"p": obj(x=INT)}, **obj(first={"$ref": "#/definitions/p"})},
    "tree": TREE,
    "linked list": {
        "$defs": {"l": obj(["v"], v=INT, next={"anyOf": [{"$ref": "#/$defs/l"}, {"type": "null"}]})},
        "$ref": "#/$defs/l",
    },
    "integer range": obj(n={"type": "integer", "minimum": 1, "maximum": 100}),
    "number range": obj(p={"type": "number", "minimum": 0, "maximum": 1}),
    "exclusive": obj(n={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}),
    "length": obj(code={"type": "string", "minLength": 2, "maxLength": 8}),
    "pattern": obj(phone={"type": "string", "pattern": "^\\+[0-9]{1,3} [0-9]{4,10}$"}),
    "date": obj(day={"type": "string", "format": "date"}),
    "date-time": obj(at={"type": "string", "format": "date-time"}),
    "e-mail": obj(to={"type": "string", "format": "email"}),
    "uuid": obj(id={"type": "string", "format": "uuid"}),
    "uri": obj(link={"type": "string", "format": "uri"}),
    "tool call": obj(name={"const": "weather"}, arguments=obj(city=STR, unit={"enum": ["C", "F"]})),
    "tool choice": {
        "anyOf": [obj(name={"const": f"tool_{i}"}, arguments=obj(**{f"argument_{i}": STR})) for i in range(8)],
    },
    "pydantic": PYDANTIC,
    "classification": obj(label={"enum": [f"label_{i}" for i in range(50)]}, confidence={"type": "number"}),
    "steps": obj(steps=arr(obj(explanation=STR, output=STR), maxItems=5), final_answer=STR),
}
assert len(SHAPES) == 50

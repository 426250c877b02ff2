"""JSON Schema -> GBNF, for builds of llama.cpp whose own converter gives another grammar language (xllamacpp's).

What a grammar can't hold to (a pattern, a numeric range, uniqueness) is refused by name rather than dropped: a caller who asks
for it relies on it. Objects are written with their properties in the schema's order, as llama.cpp does.
"""

from __future__ import annotations

import json
from typing import Any

from modules.errors import InvalidGrammar

# Words that say nothing about the value's form.
_NOTES = frozenset(
    "title description default examples $schema $id $comment deprecated readOnly writeOnly $defs definitions".split()
)
_KNOWN = _NOTES | frozenset(
    "type enum const anyOf oneOf allOf $ref properties required additionalProperties items prefixItems minItems maxItems "
    "minLength maxLength".split()
)
_BASIC = {
    "space": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\"" space',
    "integer": r'("-"? ([0-9] | [1-9] [0-9]{0,15})) space',
    "number": r'("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})? space',
    "boolean": '("true" | "false") space',
    "null": '"null" space',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" space (string ":" space value ("," space string ":" space value)*)? "}" space',
    "array": r'"[" space (value ("," space value)*)? "]" space',
}
_NEEDS = {
    "string": ("char", "space"),
    "object": ("string", "value"),
    "array": ("value",),
    "value": ("object", "array", "string", "number", "boolean", "null"),
}
_MAX_DEPTH = 64


def to_gbnf(schema: dict[str, Any]) -> str:
    """A GBNF grammar whose texts are the JSON values of `schema`. Raises InvalidGrammar, naming what it can't hold to."""
    converter = _Converter(schema)
    root = converter.rule_for(schema, "root", 0)
    if root != "root":
        converter.rules["root"] = root
    return "\n".join(f"{name} ::= {body}" for name, body in converter.rules.items()) + "\n"


class _Converter:
    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self.rules: dict[str, str] = {}
        self._references: dict[str, str] = {}

    def rule_for(self, schema: Any, name: str, depth: int) -> str:
        """The name of a rule that matches `schema`."""
        if depth > _MAX_DEPTH:
            raise _refused("it is nested too deep")
        if schema is True or schema == {}:
            return self._basic("value")
        if not isinstance(schema, dict):
            raise _refused("a schema must be an object")
        unknown = sorted(schema.keys() - _KNOWN)
        if unknown:
            raise _refused(f"{unknown[0]!r} can't be held to by a grammar")
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), depth)
        body = self._body(schema, name, depth)
        if body in self.rules or body in _BASIC:
            return body
        return self._add(name, body)

    def _body(self, schema: dict[str, Any], name: str, depth: int) -> str:
        if "const" in schema:
            return f"{_literal(schema['const'])} {self._basic('space')}"
        if "enum" in schema:
            values = schema["enum"]
            if not isinstance(values, list) or not values:
                raise _refused("enum must be a list of values")
            return f"({' | '.join(_literal(value) for value in values)}) {self._basic('space')}"
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._alternatives(schema[word], name, depth)
        if "allOf" in schema:
            return self.rule_for(self._merged(schema), name, depth + 1)
        kind = schema.get("type") or ("object" if "properties" in schema else "array" if "items" in schema else None)
        if isinstance(kind, list):
            return self._alternatives([schema | {"type": one} for one in kind], name, depth)
        return self._typed(kind, schema, name, depth)

    def _typed(self, kind: Any, schema: dict[str, Any], name: str, depth: int) -> str:
        if kind == "object" and ("properties" in schema or "additionalProperties" in schema):
            return self._object(schema, name, depth)
        if kind == "array" and (schema.keys() & {"items", "prefixItems", "minItems", "maxItems"}):
            return self._array(schema, name, depth)
        if kind == "string" and (schema.keys() & {"minLength", "maxLength"}):
            times = _repeat(schema.get("minLength", 0), schema.get("maxLength"))
            return f'"\\"" {self._basic("char")}{times} "\\"" {self._basic("space")}'
        if kind is None:
            return self._basic("value")
        if kind not in ("object", "array", "string", "number", "integer", "boolean", "null"):
            raise _refused(f"there is no type {kind!r}")
        return self._basic(kind)

    def _object(self, schema: dict[str, Any], name: str, depth: int) -> str:
        """Required properties in the schema's order, each optional one or not, then others where they are allowed."""
        space = self._basic("space")
        required = set(schema.get("required") or ())
        properties = dict(schema.get("properties") or {})
        for lacking in sorted(required - properties.keys()):
            properties[lacking] = {}
        pairs = []
        for index, (key, value) in enumerate(properties.items()):
            rule = self.rule_for(value, f"{name}-{index}", depth + 1)
            pairs.append((self._add(f"{name}-{index}-kv", f'{_literal(key)} {space} ":" {space} {rule}'), key in required))
        extra = schema.get("additionalProperties", not properties)
        if extra is not False:
            rule = self.rule_for(extra, f"{name}-more", depth + 1)
            pair = self._add(f"{name}-more-kv", f'{self._basic("string")} ":" {space} {rule}')
            pairs.append((self._add(f"{name}-others", f'{pair} ("," {space} {pair})*'), False))
        # tail i: what may follow once something was written and pairs before i are settled
        tails = [""] * (len(pairs) + 1)
        for index in range(len(pairs) - 1, -1, -1):
            pair, must = pairs[index]
            item = f'"," {space} {pair} {tails[index + 1]}'.rstrip()
            if must:
                tails[index] = item
            else:
                nothing_more = tails[index + 1] or '""'
                tails[index] = self._add(f"{name}-tail{index}", f"({item}) | {nothing_more}")
        starts = []
        for index, (pair, must) in enumerate(pairs):
            starts.append(f"{pair} {tails[index + 1]}".rstrip())
            if must:
                break
        else:
            starts.append('""')
        return f'"{{" {space} ({" | ".join(starts)}) "}}" {space}'

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> str:
        space = self._basic("space")
        first = [self.rule_for(item, f"{name}-{index}", depth + 1) for index, item in enumerate(schema.get("prefixItems") or ())]
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        items = schema.get("items", not first)
        if first:
            body = f' "," {space} '.join(first)
            if items is not False:
                more = self.rule_for(items, f"{name}-item", depth + 1)
                times = _repeat(max(low - len(first), 0), None if high is None else max(int(high) - len(first), 0))
                body += f' ("," {space} {more}){times}'
            return f'"[" {space} {body} "]" {space}'
        if items is False or high == 0:
            return f'"[" {space} "]" {space}'
        rule = self.rule_for(items, f"{name}-item", depth + 1)
        rest = f'{rule} ("," {space} {rule}){_repeat(max(low - 1, 0), None if high is None else int(high) - 1)}'
        return f'"[" {space} {rest if low else f"({rest})?"} "]" {space}'

    def _alternatives(self, options: Any, name: str, depth: int) -> str:
        if not isinstance(options, list) or not options:
            raise _refused("anyOf and oneOf must be lists of schemas")
        return " | ".join(self.rule_for(option, f"{name}-{index}", depth + 1) for index, option in enumerate(options))

    def _merged(self, schema: dict[str, Any]) -> dict[str, Any]:
        """allOf of plain objects as one object."""
        merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = self._resolve(str(part["$ref"])) if isinstance(part, dict) and "$ref" in part else part
            if not isinstance(part, dict) or part.get("type", "object") != "object":
                raise _refused("allOf of other things than objects")
            merged["type"] = "object"
            merged["properties"] = {**merged.get("properties", {}), **part.get("properties", {})}
            merged["required"] = [*merged.get("required", ()), *part.get("required", ())]
        return merged

    def _reference(self, reference: str, depth: int) -> str:
        if reference not in self._references:
            name = f"ref{len(self._references)}"
            self._references[reference] = name  # before its body, which may refer to itself
            found = self.rule_for(self._resolve(reference), name, depth + 1)
            if found != name:
                self.rules[name] = found
        return self._references[reference]

    def _resolve(self, reference: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            raise _refused(f"{reference!r} is outside the schema")
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or part not in found:
                raise _refused(f"{reference!r} leads nowhere")
            found = found[part]
        return found

    def _add(self, name: str, body: str) -> str:
        self.rules[name] = body
        return name

    def _basic(self, name: str) -> str:
        if name not in self.rules:
            self.rules[name] = _BASIC[name]
            for needed in ("space", *_NEEDS.get(name, ())):
                self._basic(needed)
        return name


def _literal(value: Any) -> str:
    """A JSON value as a GBNF string."""
    text = (
        json.dumps(value, ensure_ascii=False).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    )
    return f'"{text}"'


def _repeat(low: Any, high: Any) -> str:
    for bound in (low, high):
        if bound is not None and (not isinstance(bound, int) or not 0 <= bound <= 10_000):
            raise _refused("a length must be a whole number up to 10000")
    if high is not None and high < low:
        raise _refused("a largest length is below the smallest")
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _refused(why: str) -> InvalidGrammar:
    return InvalidGrammar(
        f"The JSON schema can't be made into a grammar: {why}.",
        hint="Change the schema, or leave response_format out.",
        param="json_schema",
    )

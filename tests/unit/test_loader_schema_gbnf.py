"""JSON Schema -> GBNF. The grammars themselves are run by llama.cpp in tests/contract; here are their form and the refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loaders._schema_gbnf import to_gbnf
from modules.errors import InvalidGrammar


def rules(schema: dict[str, Any]) -> dict[str, str]:
    found = {}
    for line in to_gbnf(schema).splitlines():
        name, _, body = line.partition(" ::= ")
        found[name] = body
    return found


SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "string"},
    {"type": ["integer", "null"]},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1, None]}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}},
    },
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
    {"anyOf": [{"const": "a"}, {"type": "number"}], "description": "either"},
    {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}, "required": ["b"]}]},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_every_rule_that_is_named_exists(schema: dict[str, Any]) -> None:
    found = rules(schema)
    assert "root" in found
    for body in found.values():
        bare = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]|\{\d+,?\d*\}', " ", body)
        for name in re.findall(r"[a-z][a-z0-9-]*", bare):
            assert name in found, f"{name} in {body}"


def test_required_comes_always_and_optional_sometimes() -> None:
    found = rules({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "required": ["a"]})
    assert found["root"] == '"{" space (root-0-kv root-tail1) "}" space'
    assert found["root-tail1"] == '("," space root-1-kv) | ""'


def test_literals_are_escaped() -> None:
    assert rules({"const": 'say "hi"\n'})["root"] == r'"\"say \\\"hi\\\"\\n\"" space'


@pytest.mark.parametrize(("low", "high", "times"), [(0, None, "*"), (2, None, "{2,}"), (0, 3, "{0,3}"), (1, 1, "{1,1}")])
def test_lengths(low: int, high: int | None, times: str) -> None:
    schema: dict[str, Any] = {"type": "string", "minLength": low}
    if high is not None:
        schema["maxLength"] = high
    assert rules(schema)["root"] == f'"\\"" char{times} "\\"" space'


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "^a"}, "pattern"),
        ({"type": "integer", "minimum": 3}, "minimum"),
        ({"type": "strange"}, "strange"),
        ({"enum": []}, "enum"),
        ({"$ref": "https://example.org/x"}, "outside"),
        ({"$ref": "#/$defs/none"}, "nowhere"),
        ({"anyOf": []}, "anyOf"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "below"),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 10**9}, "10000"),
        ({"properties": {"a": 3}}, "object"),
    ],
)
def test_what_a_grammar_cannot_hold_to_is_refused_by_name(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidGrammar, match=re.escape(said)) as caught:
        to_gbnf(schema)
    assert caught.value.param == "json_schema"


def test_nesting_is_bounded() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidGrammar, match="deep"):
        to_gbnf(schema)

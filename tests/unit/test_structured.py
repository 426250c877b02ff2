"""Grammars and schemas: what would crash a native parser is refused, what people write passes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modules.errors import InvalidGrammar
from modules.structured import check_gbnf, check_regex, check_schema

JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}  # a comment with ( and root ::= root
"""


@pytest.mark.parametrize(
    "grammar",
    [JSON_GBNF, 'root ::= "yes" | "no"', 'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"', 'root ::= "(((" x\nx ::= "a"{2,5}'],
)
def test_ordinary_grammars_pass(grammar: str) -> None:
    assert check_gbnf(grammar) == grammar


@pytest.mark.parametrize(
    ("grammar", "what"),
    [
        ('root ::= ("a"', "parentheses"),
        ('root ::= "a")', "parentheses"),
        ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "deeper"),
        ("root ::= root", "left-recursive"),
        ('root ::= a\na ::= b "x"\nb ::= a | "y"', "left-recursive"),
        ('root ::= (root | "x")', "left-recursive"),
        ('root ::= "a"{5000}', "repeat"),
        ('root ::= ("a"{2000}){2000}{2}', "repeat"),
        ("x ::= y", "root|rule"),
        ("root ::= nothing", "define"),
    ],
)
def test_dangerous_grammars_are_refused(grammar: str, what: str) -> None:
    with pytest.raises(InvalidGrammar, match=what):
        check_gbnf(grammar)


def test_ordinary_schemas_pass() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 100, "pattern": r"^[A-Z]\w+$"},
            "$ref": {"type": "string"},
            "pattern": {"type": "string"},
            "tree": {"$ref": "#/$defs/node"},
        },
        "$defs": {"node": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    }
    assert check_schema(schema) is schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"properties": {"a": {"$ref": "#/$defs/none"}}},
        {"items": {"$ref": "https://example.com/schema"}},
        {"maxItems": 10**9},
        {"minLength": -1},
        {"pattern": "(a"},
        {"anyOf": [{"pattern": "a{1,100000}"}]},
        json.loads('{"items":' * 80 + "{}" + "}" * 80),
        {"enum": ["x" * 70_000]},
        {"allOf": [{}] * 20_000},
    ],
)
def test_dangerous_schemas_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidGrammar):
        check_schema(schema)


def test_regexes() -> None:
    assert check_regex(r"\(\d{3}\) \d{3}-\d{4}")
    for pattern in ("(" * 60_000, "[a", "a{5000}", "(" * 65 + ")" * 65):
        with pytest.raises(InvalidGrammar):
            check_regex(pattern)

"""Bounds on grammars and JSON schemas, checked before a native library sees them.

A grammar of 60,000 parentheses or an equally deep schema overflows llama.cpp's stack and kills the worker; unbounded
repeats and left recursion hang it. These checks are cheap, conservative and backend-neutral.
"""

from __future__ import annotations

import json
import re
from typing import Any

from modules.errors import InvalidGrammar

MAX_BYTES = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NODES = 10_000
MAX_REPEAT = 2_000
MAX_PARENTHESES = 64
MAX_RULES = 1_000

_RULE = re.compile(r"^[ \t]*([A-Za-z0-9_-]+)[ \t]*::=", re.MULTILINE)
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]|#[^\n]*')
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


def check_schema(schema: dict[str, Any], param: str = "response_format") -> dict[str, Any]:
    """The schema itself. Raises InvalidGrammar when it is too large, too deep, or refers to what is not there."""
    nodes = 0
    stack: list[tuple[Any, int, bool]] = [(schema, 1, True)]
    while stack:
        value, depth, is_schema = stack.pop()
        nodes += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidGrammar(f"The JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels.", param=param)
        if nodes > MAX_SCHEMA_NODES:
            raise InvalidGrammar(f"The JSON schema has more than {MAX_SCHEMA_NODES} parts.", param=param)
        if isinstance(value, list):
            stack.extend((item, depth + 1, True) for item in value)
        elif isinstance(value, dict):
            if is_schema:
                _check_keywords(value, schema, param)
            names = ("properties", "$defs", "definitions", "patternProperties")
            stack.extend((item, depth + 1, not (is_schema and key in names)) for key, item in value.items())
    if len(json.dumps(schema)) > MAX_BYTES:
        raise InvalidGrammar(f"The JSON schema is larger than {MAX_BYTES} bytes.", param=param)
    return schema


def _check_keywords(node: dict[str, Any], root: dict[str, Any], param: str) -> None:
    for key in ("maxLength", "minLength", "maxItems", "minItems"):
        count = node.get(key)
        if isinstance(count, (int, float)) and not 0 <= count <= MAX_REPEAT:
            raise InvalidGrammar(f"{key} must be between 0 and {MAX_REPEAT}.", param=param)
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        check_regex(pattern, param)
    reference = node.get("$ref")
    if isinstance(reference, str):
        _follow(reference, root, param)


def _follow(reference: str, root: dict[str, Any], param: str) -> None:
    """A chain of references must end at a schema that is more than another reference."""
    seen: set[str] = set()
    while True:
        if reference in seen:
            raise InvalidGrammar("The JSON schema's $ref leads back to itself.", param=param)
        seen.add(reference)
        if not reference.startswith("#"):
            raise InvalidGrammar("A JSON schema's $ref must point into the schema itself.", param=param)
        target: Any = root
        for part in reference[1:].strip("/").split("/") if reference != "#" else []:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                raise InvalidGrammar("The JSON schema's $ref points at nothing.", param=param)
            target = target[name]
        following = target.get("$ref") if isinstance(target, dict) and len(target) == 1 else None
        if not isinstance(following, str):
            return
        reference = following


def check_regex(pattern: str, param: str = "regex") -> str:
    """The pattern itself. Raises InvalidGrammar when it is no regular expression, or too large or deep for a grammar."""
    if len(pattern) > 4096:
        raise InvalidGrammar("The pattern is longer than 4096 characters.", param=param)
    bare = re.sub(r"\\.", "", pattern)
    if bare.count("(") > MAX_PARENTHESES:
        raise InvalidGrammar(f"The pattern has more than {MAX_PARENTHESES} groups.", param=param)
    _check_repeats(bare, param)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidGrammar(f"The pattern is no regular expression: {str(error)[:80]}.", param=param) from None
    return pattern


def check_gbnf(grammar: str, param: str = "grammar") -> str:
    """The grammar itself. Raises InvalidGrammar for what would crash or hang a GBNF parser."""
    if len(grammar.encode("utf-8", "replace")) > MAX_BYTES:
        raise InvalidGrammar(f"The grammar is larger than {MAX_BYTES} bytes.", param=param)
    bare = _LITERAL.sub(" '' ", grammar)
    depth = deepest = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
        if depth < 0 or deepest > MAX_PARENTHESES:
            raise InvalidGrammar(f"The grammar's parentheses don't match or are deeper than {MAX_PARENTHESES}.", param=param)
    if depth:
        raise InvalidGrammar("The grammar's parentheses don't match.", param=param)
    _check_repeats(bare, param)
    marks = list(_RULE.finditer(bare))
    if len(marks) > MAX_RULES:
        raise InvalidGrammar(f"The grammar has more than {MAX_RULES} rules.", param=param)
    rules = {
        mark[1]: bare[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else len(bare)] for i, mark in enumerate(marks)
    }
    if "root" not in rules:
        raise InvalidGrammar('The grammar has no rule "root".', param=param)
    _check_recursion(rules, param)
    return grammar


def _check_repeats(bare: str, param: str) -> None:
    total = 1
    for low, high in _REPEAT.findall(bare):
        count = max(int(low[:9]), int((high or "0")[:9]))
        total *= max(1, count)
        if count > MAX_REPEAT or total > MAX_REPEAT * MAX_REPEAT:
            raise InvalidGrammar(f"A repeat count is above {MAX_REPEAT}.", param=param)


_SYMBOL = re.compile(r"''|[A-Za-z0-9_-]+|\{[^}]*\}|\S")


def _check_recursion(rules: dict[str, str], param: str) -> None:
    """Left recursion: a rule whose first symbol leads back to it without reading a character."""
    first = {rule: _first_symbols(body) for rule, body in rules.items()}
    if any(name not in rules for names in first.values() for name in names):
        raise InvalidGrammar("The grammar uses a rule that it does not define.", param=param)
    for start in rules:
        reached: set[str] = set()
        stack = list(first[start])
        while stack:
            rule = stack.pop()
            if rule == start:
                raise InvalidGrammar("The grammar is left-recursive: a rule begins with itself.", param=param)
            if rule not in reached:
                reached.add(rule)
                stack.extend(first[rule])


def _first_symbols(body: str) -> set[str]:
    """The rules that a rule's text may begin with; what can be left out (`?`, `*`, `{0,…}`) lets the next one begin."""
    symbols = _SYMBOL.findall(body)
    found: set[str] = set()
    groups = [True]  # whether each open group stands at the beginning
    at_start = True
    for index, symbol in enumerate(symbols):
        following = symbols[index + 1] if index + 1 < len(symbols) else ""
        optional = following in ("?", "*") or following.replace(" ", "").startswith("{0")
        if symbol == "(":
            groups.append(at_start)
        elif symbol == "|":
            at_start = groups[-1]
        elif symbol == ")":
            began = groups.pop()
            at_start = began and optional
        elif symbol in ("?", "*", "+") or symbol.startswith("{"):
            continue
        elif at_start:
            if symbol[0].isalnum() or symbol[0] in "_-":
                found.add(symbol)
            at_start = optional
    return found

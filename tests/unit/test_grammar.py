"""Structured output: what llguidance makes of schemas, grammars and patterns, and how the shared sampler keeps to it."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from modules.assemble import TokenAssembler
from modules.detokenize import ByteDetokenizer
from modules.errors import InvalidGrammar
from modules.grammar import Constraint, Grammars, Vocabulary, closed
from modules.samplers import SamplerChain
from modules.schema import GenerationRequest, StopParams
from tests.unit.schema_shapes import SHAPES

EOS = 256
PIECES = [
    b'{"',
    b'":',
    b'", "',
    b"true",
    b"false",
    b"null",
    b"  ",
    b"name",
    b"answer",
    b"]}",
    b"}}",
    b'"}',
    "é".encode(),
    b"<|end|>",
]


def grammars(eos: frozenset[int] = frozenset({EOS})) -> Grammars:
    tokens = [bytes([i]) for i in range(256)] + [b"<|eos|>"] + PIECES
    return Grammars(lambda: Vocabulary(len(tokens), eos, tokens=tokens, special_ids=frozenset({EOS, len(tokens) - 1})))


def piece(token: int) -> bytes:
    return bytes([token]) if token < 256 else b"" if token == EOS else PIECES[token - 257]


def request(**form: Any) -> GenerationRequest:
    return GenerationRequest("r", prompt="", stop=StopParams(max_tokens=4000), **form)


def walk(constraint: Constraint, seed: int, eos: frozenset[int] = frozenset({EOS})) -> str:
    """A text of the form, by random choices that lean to the end."""
    rng = random.Random(seed)
    out = b""
    for step in range(4000):
        if constraint.complete:
            break
        allowed = constraint.allowed().tolist()
        closers = (b'"', b"}", b"]", b",", b'"}', b"]}", b"}}", b"@", b":", b".")
        ending = [t for t in allowed if t in eos or ((step > 40 or out[-1:].isdigit()) and piece(t) in closers)]
        plain = [t for t in allowed if t not in eos and (chr(t).isalnum() if t < 256 else True)]
        token = rng.choice(ending or plain or allowed)
        constraint.accept(token)
        if token in eos:
            break
        out += piece(token)
    return out.decode()


@pytest.fixture(scope="module")
def shared() -> Grammars:
    return grammars()


@pytest.mark.parametrize("name", SHAPES)
def test_every_common_schema_compiles_and_holds(shared: Grammars, name: str) -> None:
    for seed in (1, 2, 3):
        constraint = shared.constraint(request(json_schema=SHAPES[name]))
        assert constraint is not None
        value = json.loads(walk(constraint, seed))
        jsonschema_rs.validate(SHAPES[name], value)


@pytest.mark.parametrize("pattern", ["yes|no", "[a-z]{3,5}-[0-9]+", "(ab)*c", r"\d{4}-\d{2}-\d{2}", "é+x?"])
def test_patterns(shared: Grammars, pattern: str) -> None:
    for seed in range(3):
        constraint = shared.constraint(request(regex=pattern))
        assert constraint is not None
        assert re.fullmatch(pattern, walk(constraint, seed))


def test_gbnf(shared: Grammars) -> None:
    grammar = 'root ::= greeting " " name "!"?\ngreeting ::= "hi" | "hello"\nname ::= [A-Z] [a-z]{2,4}  # a comment\n'
    for seed in range(5):
        constraint = shared.constraint(request(grammar=grammar))
        assert constraint is not None
        assert re.fullmatch(r"(hi|hello) [A-Z][a-z]{2,4}!?", walk(constraint, seed))


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"json_schema": {"type": "nothing"}}, "response_format"),
        ({"json_schema": {"type": "string", "pattern": "(?=x)y"}}, "response_format"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "response_format"),
        ({"regex": r"(a)\1"}, "regex"),
        ({"grammar": 'root ::= "a" | | nothing'}, "grammar"),
        ({"grammar": "root = 5"}, "grammar"),
    ],
)
def test_what_cannot_be_held_to_is_refused(shared: Grammars, form: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        shared.constraint(request(**form))
    assert caught.value.param == param
    shared.constraint(request(regex="ok"))  # and nothing is left behind


def test_a_bomb_ends_in_an_error_not_in_a_hang(shared: Grammars) -> None:
    """Beyond the parent's own checks: big for the automaton rather than for the reader."""
    try:
        constraint = shared.constraint(request(regex="(a?){1500}b{1500}(c|d|e|f){1500}"))
    except InvalidGrammar:
        return
    assert constraint is not None  # llguidance took it within its limits, so it must also run
    constraint.accept(int(constraint.allowed()[0]))


def test_objects_that_list_their_properties_are_closed() -> None:
    leaf = {"properties": {"x": {"type": "integer"}}}
    assert closed(leaf)["additionalProperties"] is False
    assert "additionalProperties" not in closed({"type": "object"})
    assert closed({**leaf, "additionalProperties": True})["additionalProperties"] is True
    assert closed({"allOf": [leaf, leaf]}) == {"allOf": [leaf, leaf]}
    assert closed({"type": "array", "items": leaf})["items"]["additionalProperties"] is False
    assert closed({"const": leaf}) == {"const": leaf}
    assert closed({"properties": {"properties": leaf}})["properties"]["properties"]["additionalProperties"] is False


def test_no_form_no_constraint(shared: Grammars) -> None:
    assert shared.constraint(request()) is None


# --- with the shared sampler and assembler ------------------------------------------------------------------------


def run(
    params: dict[str, Any], *, stop: StopParams | None = None, eos: frozenset[int] = frozenset({EOS}), **form: Any
) -> tuple[str, str]:
    """(text, finish_reason) of a model that likes 'z' and the end of text best and hates what the form wants."""
    wanted = GenerationRequest("r", prompt="", stop=stop or StopParams(max_tokens=300), **form)
    constraint = grammars(eos).constraint(wanted)
    size = 257 + len(PIECES)
    chain = SamplerChain(params, [1], size, eos_ids=eos, constraint=constraint)
    assembler = TokenAssembler(wanted, ByteDetokenizer(piece), eos, 1000, constraint)
    rng = np.random.default_rng(5)
    text = ""
    while assembler.finish_reason is None:
        logits = rng.normal(size=size).astype(np.float32)
        logits[ord("z")] += 8
        logits[EOS] += 9
        event = assembler.push(chain.sample(logits, ban_ends=not assembler.may_end))
        text += event.text if event else ""
    return text, str(assembler.finish_reason)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 3, "top_k": 1},
        {"seed": 3, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 1.3},
        {"seed": 3, "mirostat_mode": 2},
        {"seed": 3, "xtc_probability": 1.0, "xtc_threshold": 0.01, "dry_multiplier": 1.0},
        {"seed": 3, "sampler_priority": ["top_k", "temperature"], "top_k": 3},
        {"seed": 3, "logit_bias": {str(ord("z")): 100.0}},
    ],
    ids=str,
)
def test_every_sampler_stays_in_the_form(params: dict[str, Any]) -> None:
    text, reason = run(params, regex="(cat|dog) [0-9]{3}")
    assert re.fullmatch("(cat|dog) [0-9]{3}", text)
    assert reason == "stop"


def test_greedy_is_no_plain_argmax_under_a_constraint() -> None:
    chain = SamplerChain({"temperature": 0.0}, [], 300, constraint=grammars().constraint(request(regex="a")))
    assert not chain.is_argmax
    assert SamplerChain({"temperature": 0.0}, [], 300).is_argmax


def test_the_form_alone_says_where_the_text_ends() -> None:
    free = StopParams(max_tokens=50, min_tokens=40, ignore_eos=True)
    assert run({"temperature": 0.0, "ban_eos_token": True}, stop=free, regex="abc") == ("abc", "stop")
    assert run({"temperature": 0.0}, stop=StopParams(max_tokens=2), regex="abc") == ("ab", "length")


def test_a_model_without_an_end_of_text_stops_too() -> None:
    assert run({"temperature": 0.0}, eos=frozenset(), regex="abc") == ("abc", "stop")

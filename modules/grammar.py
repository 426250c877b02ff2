"""Structured output for every loader: an answer held to a GBNF grammar, a JSON schema or a regular expression.

Runs in the worker. llguidance compiles the form for the model's vocabulary and says before each token which ones may come next;
`modules.samplers.SamplerChain` samples among those only. Compiling has limits of its own: a hostile schema is refused, it can't
hold the worker up.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.errors import BackendUnavailable, GenerationFailed, InvalidGrammar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modules.schema import GenerationRequest

COMPILE_S = 5.0
KEPT_GRAMMARS = 32
# What may stand between the tokens of JSON: as llama.cpp has it, so that a weak model can't go on with blanks for ever.
WHITE_SPACE = r"([ ]|\n[ \t]{0,12})?"
_PARAM = {"grammar": "grammar", "json_schema": "response_format", "regex": "regex"}


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, as far as a grammar must know them.

    Either `tokenizer_json` (a Hugging Face tokenizer.json as text) or `tokens`, the bytes of each id, with `special_ids` those
    that stand for no text. `size` is the length of a row of logits' known part; `eos_ids` end the text.
    """

    size: int
    eos_ids: frozenset[int]
    tokenizer_json: str | None = None
    tokens: Sequence[bytes] = ()
    special_ids: frozenset[int] = field(default_factory=frozenset)


class Constraint:
    """One answer's progress through its grammar. Not thread-safe."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher = matcher
        self._size = size
        self._buffer: NDArray[np.int32] | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a whole one."""
        return bool(self._matcher.is_accepting())

    def allowed(self) -> NDArray[np.intp]:
        """The ids that may come next, in ascending order."""
        import numpy as np

        if self._buffer is None:
            self._buffer = np.empty((self._size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)
        self._check()
        return np.flatnonzero(np.unpackbits(self._buffer.view(np.uint8), bitorder="little")[: self._size])

    def allowed_mask(self) -> int:
        """The same as the bits of one number, for an engine without numpy."""
        mask = int.from_bytes(self._matcher.compute_bitmask(), "little")
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Note the chosen token."""
        if not self._matcher.consume_token(token):
            self._check()

    def takes(self, token: int) -> bool:
        """Note the token if it may come next; False leaves everything as it is. Far cheaper than asking for all that may."""
        taken = self._matcher.try_consume_tokens([token])
        if not taken:
            self._check()
        return bool(taken)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationFailed(
                f"The answer could not be held to its form: {_first_line(self._matcher.get_error())}.",
                hint="Use a simpler grammar or schema.",
            )


class Grammars:
    """The compiled grammars of one loaded model. `vocabulary` is made when the first request needs it."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def constraint(self, request: GenerationRequest) -> Constraint | None:
        """What holds this request's answer to its form; None where it asks for none.

        Raises InvalidGrammar for a form that can't be compiled in time, BackendUnavailable where llguidance is missing.
        """
        for kind in ("grammar", "json_schema", "regex"):
            form = getattr(request, kind)
            if form is not None:
                return self._constraint(kind, form)
        return None

    def _constraint(self, kind: str, form: Any) -> Constraint:
        llguidance = _library()
        key = json.dumps([kind, form], sort_keys=False)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compile(llguidance, kind, form)
            self._compiled[key] = matcher
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(key)
        assert self._vocabulary is not None
        return Constraint(matcher.deep_copy(), self._vocabulary.size)

    def _compile(self, llguidance: Any, kind: str, form: Any) -> Any:
        if self._tokenizer is None:
            self._vocabulary = self._make()
            self._tokenizer = _tokenizer(llguidance, self._vocabulary)
        text = _source(llguidance, kind, form)
        found: list[Any] = []
        # In a thread of its own only to be able to give up on it: the library's own limits end it soon after.
        worker = threading.Thread(
            target=lambda: found.append(llguidance.LLMatcher(self._tokenizer, text, log_level=0)), name="grammar", daemon=True
        )
        worker.start()
        worker.join(COMPILE_S)
        if not found:
            raise InvalidGrammar(
                f"The {_WORD[kind]} takes more than {COMPILE_S:g} seconds to compile.", hint="Simplify it.", param=_PARAM[kind]
            )
        if found[0].is_error():
            raise _refused(kind, found[0].get_error())
        return found[0]


_WORD = {"grammar": "grammar", "json_schema": "JSON schema", "regex": "pattern"}


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BackendUnavailable(
            "Structured output needs the package llguidance, which this environment lacks.",
            hint="Install this backend again in the page's model menu.",
        ) from error
    return llguidance


def _source(llguidance: Any, kind: str, form: Any) -> str:
    """The form in llguidance's own language."""
    matcher = llguidance.LLMatcher
    if kind == "json_schema":
        options = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True}
        return str(matcher.grammar_from_json_schema(json.dumps(closed(form)), defaults=options))
    if kind == "regex":
        return str(matcher.grammar_from_regex(form))
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(matcher.grammar_from_lark(any_to_lark(form)))
    except Exception as error:  # its own error class, and whatever its parser trips over
        raise _refused(kind, str(error)) from error


def closed(schema: Any) -> Any:
    """The schema with every object that lists its properties, and does not say more, closed to others: what callers mean, what
    llama.cpp's own converter takes it for, and what keeps a weak model from inventing properties without end. The parts of an
    allOf stay open, or none could be met beside the others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            made[key] = {name: closed(item) for name, item in value.items()}
        elif key in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties"):
            made[key] = closed(value)
        else:  # values (enum, const, default), and the parts of allOf
            made[key] = value
    says = ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "$ref")
    if made.get("properties") and made.get("type", "object") == "object" and not any(key in made for key in says):
        made["additionalProperties"] = False
    return made


def _refused(kind: str, why: str) -> InvalidGrammar:
    return InvalidGrammar(f"The {_WORD[kind]} can't be used: {_first_line(why)}.", hint="Change it.", param=_PARAM[kind])


def _first_line(text: str) -> str:
    return " ".join(text.split("\n")[0].split())[:200].rstrip(".")


def _tokenizer(llguidance: Any, vocabulary: Vocabulary) -> Any:
    # A model without an end of text gets one beyond its vocabulary, which is never sampled.
    eos = sorted(i for i in vocabulary.eos_ids if i < vocabulary.size)
    if vocabulary.tokenizer_json is not None:
        return llguidance.LLTokenizer(
            vocabulary.tokenizer_json, n_vocab=vocabulary.size + (0 if eos else 1), eos_token=eos or [vocabulary.size]
        )
    tokens = [bytes(token) for token in vocabulary.tokens] + ([] if eos else [b"<end>"])
    special = sorted(vocabulary.special_ids | set(eos or [len(tokens) - 1]))
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Wrapped(tokens, eos or [len(tokens) - 1], special)),
        n_vocab=len(tokens),
        eos_token=eos or [len(tokens) - 1],
    )


class _Wrapped:
    """What llguidance wants to know of a tokenizer that is no tokenizer.json.

    Where the form leaves no choice it spells the forced text with these ids, so they must be its very bytes, and many
    tokenizers put a blank before the first word. The longest token first comes close to what any tokenizer does.
    """

    def __init__(self, tokens: list[bytes], eos: list[int], special: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.special_token_ids = special
        hidden = frozenset(special)
        self._ids = {token: index for index, token in enumerate(tokens) if token and index not in hidden}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        found: list[int] = []
        position = 0
        while position < len(text):
            for size in range(min(self._longest, len(text) - position), 0, -1):
                token = self._ids.get(text[position : position + size])
                if token is not None:
                    found.append(token)
                    position += size
                    break
            else:
                position += 1  # a byte that no token holds can't be written at all
        return found

"""Echo: answers with the user's own words, and every fault on request. The test bed of the whole product, and a demo.

A directive anywhere in the last user message steers it: [[echo tokens=500 rate=100 crash_at=20]]. The rest of the message is
the text to answer with.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from modules.assemble import TokenAssembler
from modules.detokenize import ByteDetokenizer
from modules.engine import CancelToken, Engine, Progress
from modules.errors import ContextLengthExceeded, CorruptModel, GenerationFailed, InvalidParameter
from modules.grammar import Constraint, Grammars, Vocabulary
from modules.plan.types import MIB, Machine, Memory, Setting, Shape
from modules.sampling import CLASSIC, split_supported
from modules.schema import (
    Done,
    Event,
    GenerationRequest,
    LoaderSpec,
    LoadProgress,
    ModelFiles,
    ModelInfo,
    OptionSpec,
    PrefillProgress,
    Timings,
    Usage,
)

SPEC = LoaderSpec(
    name="echo",
    title="Echo",
    engine="loaders.echo:EchoEngine",
    summary="Repeats your words: to try the page and the API without a model, and to test every fault.",
    formats={"echo": 1},
    samplers=CLASSIC,
    options=(
        OptionSpec(
            "context_length", "int", 8192, "Tokens that fit.", minimum=16, maximum=1_000_000, aliases=("ctx_size", "n_ctx")
        ),
        OptionSpec("load_seconds", "float", 0.0, "How long loading takes.", minimum=0, maximum=600),
        OptionSpec(
            "fault", "choice", "none", "A fault while loading.", choices=("none", "corrupt", "oom", "exit", "segfault", "hang")
        ),
        OptionSpec("slots", "int", 256, "Answers at once; the others wait.", minimum=1, maximum=256),
        OptionSpec("megabytes", "int", 0, "Memory to hold while loaded.", minimum=0, maximum=65_536),
    ),
    features=frozenset({"grammar", "json_schema", "regex"}),
    slots=256,
    builtin=(ModelFiles("echo", "echo", "echo", context_length=8192, has_chat_template=True, bundled=True),),
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_BASE = 45 * MIB
WORDS = (
    "the of and model token stream memory cache layer weight river light paper stone garden window number simple quick brown"
).split()
EOS = 256
FIRST_PIECE = 257
MAX_PIECES = 1_000_000
_PIECES = re.compile(rb" ?[!-~]{1,8}|[\x00-\x7f]|[\x80-\xff]")
_DIRECTIVE = re.compile(r"\[\[echo([^\]]*)\]\]")


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator."""
    return Memory(weights=int(options["megabytes"]) * MIB, base=_BASE)


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    return [Setting({})]


@dataclass
class Directive:
    """What one request asks for. `*_at` faults happen before the token of that index; -1 is never. `clock`: each word is the time
    at which it was made, in nanoseconds of the monotonic clock."""

    tokens: int = 0
    rate: float = 0.0
    delay: float = 0.0
    prefill: int = 0
    random: int = 0
    clock: int = 0
    crash_at: int = -1
    kill_at: int = -1
    exit_at: int = -1
    oom_at: int = -1
    error_at: int = -1
    raise_at: int = -1
    hang_at: int = -1
    freeze_at: int = -1
    garbage_at: int = -1
    printf_at: int = -1

    @classmethod
    def parse(cls, text: str) -> Directive:
        directive = cls()
        known = {f.name: f for f in fields(cls)}
        for pair in text.split():
            name, _, value = pair.partition("=")
            if name not in known:
                raise InvalidParameter(f"The echo directive has no {name!r}.", hint=f"It has {', '.join(known)}.")
            try:
                setattr(directive, name, float(value) if known[name].type == "float" else int(value))
            except ValueError:
                raise InvalidParameter(f"The echo directive's {name} must be a number.") from None
        return directive


class EchoEngine(Engine):
    spec = SPEC

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._context = 0
        self._ballast = b""
        # Its vocabulary grows with what it reads, so a form is kept to by the single bytes, which are always there.
        self._grammars = Grammars(
            lambda: Vocabulary(EOS + 1, frozenset({EOS}), tokens=[*(bytes([b]) for b in range(EOS)), b"<|end|>"])
        )

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"echo": "1"}

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        steps = 20 if options["load_seconds"] else 1
        for step in range(steps):
            progress(LoadProgress("Warming up the echo", step / steps))
            time.sleep(options["load_seconds"] / steps)
        _load_fault(options["fault"])
        self._ballast = b"\x01" * (options["megabytes"] << 20)
        self._context = options["context_length"]
        return ModelInfo(
            name="echo",
            path=path,
            loader=SPEC.name,
            format="echo",
            architecture="echo",
            context_length=self._context,
            vocab_size=FIRST_PIECE + MAX_PIECES,
            chat_template=CHAT_TEMPLATE,
            eos_token="<|end|>",
            eos_token_ids=(EOS,),
            device_map={"cpu": 1.0},
            engine="echo 1",
            slots=options["slots"],
        )

    def encode(self, text: str, add_special: bool) -> list[int]:
        return [self._intern(piece) for piece in _PIECES.findall(text.encode("utf-8", "replace"))]

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self._piece(i) for i in token_ids).decode("utf-8", "replace")

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        started = time.perf_counter()
        prompt = request.prompt if request.prompt is not None else self.decode(request.token_ids or ())
        prompt_ids = list(request.token_ids) if request.token_ids is not None else self.encode(prompt, request.add_special)
        if len(prompt_ids) >= self._context:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt_ids)} tokens; this model's context holds {self._context}.",
                hint="Shorten the prompt or load the model with a larger context.",
            )
        message = _last_user_message(prompt)
        found = _DIRECTIVE.search(message)
        directive = Directive.parse(found[1]) if found else Directive()
        applied, ignored = split_supported(request.sampling, SPEC.samplers, SPEC.title)
        seed = request.sampling.get("seed", -1)
        seed = random.randrange(2**31) if seed < 0 else seed
        constraint = self._grammars.constraint(request)
        text = _DIRECTIVE.sub("", message).strip() or prompt
        reply = self._reply(text, directive, request, seed) if constraint is None else _held_to(constraint, text, seed)

        yield from self._prefill(request.request_id, len(prompt_ids), directive, cancel)
        room = self._context - len(prompt_ids)
        assembler = TokenAssembler(request, ByteDetokenizer(self._piece), frozenset({EOS}), room, constraint)
        first: float | None = None
        begun = time.perf_counter()
        while assembler.finish_reason is None:
            if directive.rate and not cancel.cancelled and time.perf_counter() < begun + assembler.count / directive.rate:
                yield None
                continue
            if cancel.cancelled:
                event = assembler.cancel()
            else:
                _fault(directive, assembler.count)
                event = assembler.push(next(reply))
                first = first or time.perf_counter()
            if event is not None:
                yield event
        ended = time.perf_counter()
        first = first or ended
        yield Done(
            request.request_id,
            assembler.finish_reason,
            Usage(len(prompt_ids), assembler.count),
            Timings(first - started, ended - first),
            stop_match=assembler.stop_match,
            applied=applied,
            ignored=ignored,
            seed=seed,
        )

    def _prefill(self, request_id: str, total: int, directive: Directive, cancel: CancelToken) -> Iterator[Event | None]:
        steps = directive.prefill or 1
        for step in range(steps):
            due = time.perf_counter() + directive.delay / steps
            while time.perf_counter() < due and not cancel.cancelled:
                yield None
            yield PrefillProgress(request_id, total * (step + 1) // steps, total)

    def _reply(self, text: str, directive: Directive, request: GenerationRequest, seed: int) -> Iterator[int]:
        """Token ids without end: the text once and EOS, or as many words as asked, or the text for ever with ignore_eos."""
        ids = self.encode(text, add_special=False) or [ord(" ")]
        greedy = request.sampling.get("temperature", 1.0) == 0
        rng = random.Random(0 if greedy else seed)
        words = [self._intern(b" " + word.encode()) for word in WORDS]
        if directive.clock:
            for _ in range(directive.tokens):
                yield self._intern(b" %d" % time.perf_counter_ns())
        elif directive.random or directive.tokens:
            for _ in range(directive.tokens or len(ids)):
                yield rng.choice(words)
        else:
            yield from ids
        while not request.stop.ignore_eos:
            yield EOS if request.stop.min_tokens <= 0 else rng.choice([EOS, *ids])
        while True:
            yield from ids

    def _intern(self, piece: bytes) -> int:
        if len(piece) == 1:
            return piece[0]
        token = self._ids.get(piece)
        if token is None:
            if len(self._pieces) >= MAX_PIECES:
                raise GenerationFailed("The echo vocabulary is full.", hint="Reload the echo model.")
            token = self._ids[piece] = FIRST_PIECE + len(self._pieces)
            self._pieces.append(piece)
        return token

    def _piece(self, token_id: int) -> bytes:
        if 0 <= token_id < EOS:
            return bytes([token_id])
        if token_id == EOS:
            return b""
        try:
            return self._pieces[token_id - FIRST_PIECE]
        except IndexError:
            raise InvalidParameter(f"Token id {token_id} is outside the vocabulary.", param="token_ids") from None


def _held_to(constraint: Constraint, text: str, seed: int) -> Iterator[int]:
    """A text of the form asked for: the shortest way out of every part, the message's letters and digits where any will do."""
    rng = random.Random(seed)
    letters = iter(re.findall(rb"[a-z]", text.lower().encode())[:8])
    digits = iter(re.findall(rb"[0-9]", text.encode())[:3])
    while True:
        mask = constraint.allowed_mask()
        in_string = mask & _STRING == _STRING
        wanted = None
        if mask & _LETTERS == _LETTERS:
            wanted = next(letters, None)
        elif mask & _DIGITS and not mask & _QUOTE:
            wanted = next(digits, None)
        if wanted is not None and mask >> wanted[0] & 1:
            token = wanted[0]
        elif mask >> EOS & 1:
            token = EOS
        elif in_string:
            token = ord('"')
        else:
            choices = [t for t in b"}]" if mask >> t & 1] or [t for t in range(33, 127) if mask >> t & 1]
            token = (
                choices[0] if choices and choices[0] in b"}]" else rng.choice(choices or [t for t in range(EOS) if mask >> t & 1])
            )
        constraint.accept(token)
        yield token


_QUOTE = 1 << ord('"')
_LETTERS = sum(1 << letter for letter in b"abcdefghijklmnopqrstuvwxyz")
_DIGITS = sum(1 << digit for digit in b"0123456789")
_STRING = _QUOTE | _LETTERS | 1 << ord("}")  # where all of these may come, it is the inside of a JSON string


def _last_user_message(prompt: str) -> str:
    _, marker, rest = prompt.rpartition("<|user|>\n")
    return rest.rpartition("\n<|assistant|>")[0] if marker else prompt


def _load_fault(fault: str) -> None:
    if fault == "corrupt":
        raise CorruptModel("The echo model is corrupt, as asked.", hint="Load it with fault=none.")
    if fault == "oom":
        raise MemoryError
    if fault == "exit":
        os._exit(3)
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    while fault == "hang":
        time.sleep(1)


def _fault(directive: Directive, index: int) -> None:
    if index == directive.crash_at:
        print("echo: about to crash, as asked", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == directive.kill_at:
        os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    if index == directive.exit_at:
        os._exit(7)
    if index == directive.oom_at:
        raise MemoryError
    if index == directive.error_at:
        raise GenerationFailed("The echo failed, as asked.", hint="Try again.")
    if index == directive.raise_at:
        raise ValueError("an unexpected exception, as asked")
    if index == directive.hang_at:
        print("echo: about to hang, as asked", file=sys.stderr, flush=True)
        while True:
            time.sleep(1)
    if index == directive.freeze_at and hasattr(signal, "SIGSTOP"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if index == directive.garbage_at:
        os.write(int(os.environ["SWITCHYARD_FRAME_FD"]), b"\xff" * 64)
    if index == directive.printf_at:
        os.write(1, b"a line that a C library printed\n")

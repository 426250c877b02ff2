"""What comes back from one generation, free of any protocol: the parts of an answer and how they are read from its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.tools.reading import CallReader
from modules.tools.types import ToolCall, new_call_id

if TYPE_CHECKING:
    from modules.reasoning import ReasoningSplitter
    from modules.schema import TokenLogprob, Usage
    from modules.tools.dialects import Dialect


@dataclass(frozen=True, slots=True)
class Queued:
    """Not this request's turn yet. `position` 1 is next; `estimate_s` until then, where it is known."""

    position: int
    estimate_s: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The model has begun to work on it; the first event of an answer."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event: the whole answer."""

    outcome: Outcome


Part = Text | Reasoning | ToolCallStart | ToolCallArguments
AnswerEvent = Queued | Started | Part | Finish


@dataclass(slots=True)
class Outcome:
    """A whole answer. `finish_reason`: stop, length, tool_calls or cancelled. `raw` is the model's text as it was, `token_ids`
    are its tokens."""

    text: str
    reasoning: str
    tool_calls: list[ToolCall]
    logprobs: list[TokenLogprob]
    finish_reason: str
    stop_match: str | None
    usage: Usage
    receipt: dict[str, Any]
    raw: str
    token_ids: tuple[int, ...] = ()


@dataclass
class AnswerReader:
    """The text of an answer -> its parts, incrementally. `dialect` None reads no tool calls; `splitter` None no reasoning.

    `names` are the functions that may be called: what looks like a call of another one stays text.
    """

    dialect: Dialect | None = None
    splitter: ReasoningSplitter | None = None
    names: frozenset[str] | None = None
    call_open: str = ""
    parallel: bool = True
    calls: list[ToolCall] = field(default_factory=list)
    _reader: CallReader | None = None
    _arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.dialect is not None:
            self._reader = CallReader(self.dialect, names=self.names, begun_with=self.call_open)

    @property
    def plain(self) -> bool:
        """Whether every text is just text."""
        return self._reader is None and self.splitter is None

    def feed(self, text: str) -> list[Part]:
        return self._parts(self.splitter.feed(text) if self.splitter else [("text", text)])

    def finish(self) -> list[Part]:
        """What was held back."""
        parts = self._parts(self.splitter.finish()) if self.splitter else []
        if self._reader is not None:
            parts += self._calls(self._reader.finish())
        self._close_call()
        return parts

    def _parts(self, pieces: list[tuple[str, str]]) -> list[Part]:
        parts: list[Part] = []
        for kind, text in pieces:
            if not text:
                continue
            if kind == "reasoning":
                parts.append(Reasoning(text))
            elif self._reader is not None:
                parts += self._calls(self._reader.feed(text))
            else:
                parts.append(Text(text))
        return parts

    def _calls(self, items: list[tuple[str, str]]) -> list[Part]:
        parts: list[Part] = []
        for kind, value in items:
            if kind == "text":
                # Between and after calls there is only white space and end markers, which mean nothing.
                if value.strip() or not self.calls:
                    parts.append(Text(value))
            elif kind == "name":
                self._close_call()
                if self.calls and not self.parallel:
                    self._reader = None
                    break
                call = ToolCall(new_call_id(), value, "")
                self.calls.append(call)
                parts.append(ToolCallStart(len(self.calls) - 1, call.id, value))
            else:
                self._arguments.append(value)
                parts.append(ToolCallArguments(len(self.calls) - 1, value))
        return parts

    def _close_call(self) -> None:
        if self._arguments and self.calls:
            last = self.calls[-1]
            self.calls[-1] = ToolCall(last.id, last.name, "".join(self._arguments))
        self._arguments.clear()

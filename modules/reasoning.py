"""Thinking models: where their reasoning stands in the text, and how it is told apart from the answer.

A template or a model's text shows which marks it uses; the reasoning goes to a field of its own (`reasoning_content`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marks:
    """What opens and closes the reasoning. `special`: the tokenizer hides them unless asked to show special tokens."""

    open: str
    close: str
    special: bool = False
    both: bool = False  # the closing mark alone says nothing: others use it, too


THINK = Marks("<think>", "</think>")

# The first whose closing mark a template holds is the model's.
KNOWN = (
    THINK,  # DeepSeek R1, Qwen 3, GLM, MiniMax, SmolLM 3
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("[THINK]", "[/THINK]", special=True),  # Magistral
    Marks("<|START_THINKING|>", "<|END_THINKING|>", special=True),  # Command A Reasoning
    Marks("<|channel|>analysis<|message|>", "<|end|>", special=True, both=True),  # gpt-oss
    Marks("<thought>", "</thought>"),  # EXAONE Deep
    Marks("<reasoning>", "</reasoning>"),
)


def marks_of(template: str | None) -> Marks | None:
    """The marks a chat template knows, None for a model that does not think aloud."""
    text = template or ""
    return next((m for m in KNOWN if m.close in text and (m.open in text or not m.both)), None)


def begins_inside(prompt: str, marks: Marks) -> bool:
    """Whether the prompt's end has opened the reasoning already, as many templates do."""
    return prompt.rstrip().endswith(marks.open)


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = max((len(mark) for mark in marks), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks):
            return size
    return 0


class ReasoningSplitter:
    """Text -> ("reasoning" | "text", piece)*, incrementally. Marks and the white space around them belong to neither.

    Only the beginning of an answer is looked at for the opening mark: a model that writes about <think> later means it.
    """

    def __init__(self, marks: Marks, *, inside: bool = False) -> None:
        self._marks = marks
        self._state = "reasoning" if inside else "start"
        self._buffer = ""
        self._trim = inside  # drop white space at the beginning of the next piece

    def feed(self, text: str) -> list[tuple[str, str]]:
        self._buffer += text
        pieces: list[tuple[str, str]] = []
        if self._state == "start":
            ahead = self._buffer.lstrip()
            if self._marks.open.startswith(ahead[: len(self._marks.open)]) and len(ahead) < len(self._marks.open):
                return []  # empty, or the mark's beginning: not decided yet
            if ahead.startswith(self._marks.open):
                self._buffer = ahead[len(self._marks.open) :]
                self._state, self._trim = "reasoning", True
            else:
                self._state = "text"
        if self._state == "reasoning":
            before, mark, after = self._buffer.partition(self._marks.close)
            if mark:
                pieces.append(("reasoning", self._trimmed(before).rstrip()))
                self._buffer, self._state, self._trim = after, "text", True
            else:
                # White space before the closing mark belongs to the mark, so it waits with a possible mark.
                keep = held_back(self._buffer, (self._marks.close,))
                body = self._buffer[: len(self._buffer) - keep].rstrip()
                shown = self._trimmed(body)
                self._buffer = self._buffer[len(body) :]
                pieces.append(("reasoning", shown))
        if self._state == "text":
            shown = self._trimmed(self._buffer)
            self._buffer = ""
            pieces.append(("text", shown))
        return [piece for piece in pieces if piece[1]]

    def finish(self) -> list[tuple[str, str]]:
        """What was held back; an answer cut off inside its reasoning has no text."""
        rest, self._buffer = self._buffer, ""
        if not rest.strip() and self._state != "text":
            return []
        return [("reasoning" if self._state == "reasoning" else "text", rest)]

    def _trimmed(self, text: str) -> str:
        if not self._trim:
            return text
        text = text.lstrip()
        self._trim = not text
        return text

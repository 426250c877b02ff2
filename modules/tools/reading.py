"""Reads tool calls out of a model's text while it comes, the arguments piece by piece.

Items are ("text", piece), ("name", function), ("arguments", JSON piece). Text that only looked like a call comes back as text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from modules.reasoning import held_back

if TYPE_CHECKING:
    from modules.tools.dialects import Dialect

Item = tuple[str, str]
# A call whose name has not come within so many characters is none.
MAX_HEAD = 4096


class CallReader:
    """`names` are the functions there are (None: any). `begun_with` is what the prompt already wrote of the first call."""

    def __init__(self, dialect: Dialect, *, names: frozenset[str] | None = None, begun_with: str = "") -> None:
        self._dialect = dialect
        self._names = names
        self._buffer = ""
        self._held = ""  # text of a call not yet certain to be one
        self._body: _Body | None = None
        self._fresh = True  # nothing but white space so far
        self._closing = ""  # the mark that may still follow the call just read
        self._marks = (dialect.open, *dialect.noise)
        self._early: list[Item] = []
        if begun_with:
            self._early = self.feed(begun_with)

    def feed(self, text: str) -> list[Item]:
        self._buffer += text
        items, self._early = self._early, []
        while self._step(items):
            pass
        return items

    def finish(self) -> list[Item]:
        """What was held back. A call that never got its name is text again."""
        items: list[Item] = []
        if self._body is not None:
            self._held += self._buffer
            items += self._body.finish()
            if not self._body.named and self._held.strip():
                items.append(("text", self._held))
        elif self._buffer and not (self._closing and self._closing.startswith(self._buffer.lstrip())):
            items.append(("text", self._buffer))
        self._buffer, self._body = "", None
        return items

    def _step(self, items: list[Item]) -> bool:
        """One move; False when more text is needed."""
        if self._body is None:
            return self._outside(items)
        begun = self._body.named
        before = self._buffer
        found, self._buffer, done = self._body.feed(self._buffer)
        if not self._body.named and not begun:
            self._held += before[: len(before) - len(self._buffer)]
            wrong = done or self._body.wrong or len(self._held) > MAX_HEAD
        else:
            wrong = self._body.wrong
        items += found
        if wrong and not self._body.named:
            items.append(("text", self._held))
            self._held, self._body = "", None
            return bool(self._buffer)
        if done or wrong:
            self._held, self._body = "", None
            self._closing = self._dialect.close.lstrip()
            return bool(self._buffer)
        return False

    def _outside(self, items: list[Item]) -> bool:
        dialect = self._dialect
        if self._closing and not self._skip_close():
            return False
        if dialect.bare and self._fresh:
            ahead = self._buffer.lstrip()
            if not ahead:
                return False
            if ahead[0] in "{[":
                self._begin("", self._buffer)
                return True
        found = [(at, -len(mark), mark) for mark in self._marks if (at := self._buffer.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            before, after = self._buffer[:at], self._buffer[at + len(mark) :]
            # White space before a call is the call's, so it waits until it is certain to be one.
            space = before[len(before.rstrip()) :] if mark == dialect.open else ""
            shown = before[: len(before) - len(space)]
            if shown.strip() or (shown and not self._fresh):
                items.append(("text", shown))
                self._fresh = False
            if mark == dialect.open:
                self._begin(space + mark, after)
            else:
                self._buffer = after
            return True
        keep = held_back(self._buffer, self._marks)
        shown = self._buffer[: len(self._buffer) - keep]
        trailing = len(shown) - len(shown.rstrip())
        shown = shown[: len(shown) - trailing]
        if shown:
            self._fresh = False
            items.append(("text", shown))
            self._buffer = self._buffer[len(shown) :]
        return False

    def _begin(self, mark: str, rest: str) -> None:
        self._fresh = False
        self._held = mark
        self._buffer = rest
        kinds = {"object": _ObjectBody, "named": _NamedBody, "tags": _TagsBody}
        self._body = kinds[self._dialect.kind](self._dialect, self._names)

    def _skip_close(self) -> bool:
        """Drop the closing mark, which means nothing more. False while it may still be coming."""
        ahead = self._buffer.lstrip()
        if ahead.startswith(self._closing):
            self._buffer = ahead[len(self._closing) :]
        elif self._closing.startswith(ahead):
            return False
        self._closing = ""
        return True


class _Body:
    """The inside of one call (or a list of them). `feed` takes text and gives (items, what it left, whether it is over)."""

    def __init__(self, dialect: Dialect, names: frozenset[str] | None) -> None:
        self.dialect = dialect
        self.names = names
        self.named = False
        self.wrong = False

    def feed(self, text: str) -> tuple[list[Item], str, bool]:
        raise NotImplementedError

    def finish(self) -> list[Item]:
        return []

    def _known(self, name: str) -> bool:
        return bool(name) and (self.names is None or name in self.names)


class JsonSpan:
    """Finds the end of one JSON value, character by character."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False
        self.begun = False
        self.scalar = False

    def take(self, text: str) -> tuple[str, bool]:
        """(the part of `text` that belongs to the value, whether the value is complete)."""
        for index, character in enumerate(text):
            if self.in_string:
                if self.escaped:
                    self.escaped = False
                elif character == "\\":
                    self.escaped = True
                elif character == '"':
                    self.in_string = False
                    if self.depth == 0:
                        return text[: index + 1], True
                continue
            if not self.begun and character.isspace():
                continue
            if self.scalar and (character in ",}]" or character.isspace()):
                return text[:index], True
            if character == '"':
                self.begun = self.in_string = True
            elif character in "{[":
                self.begun = True
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return text[: index + 1], True
            elif not self.begun:
                self.begun = self.scalar = True
        return text, False


class _ObjectBody(_Body):
    """{"name": …, "arguments": …}, or a list of such objects."""

    _KEY = re.compile(r'\s*,?\s*"((?:[^"\\]|\\.)*)"\s*:\s*')

    def __init__(self, dialect: Dialect, names: frozenset[str] | None) -> None:
        super().__init__(dialect, names)
        self._listed: bool | None = None
        self._state = "before"
        self._value: JsonSpan | None = None
        self._key = ""
        self._text = ""
        self._name = ""
        self._early = ""  # arguments that came before the name
        self._sent = ""

    def feed(self, text: str) -> tuple[list[Item], str, bool]:
        items: list[Item] = []
        while text:
            if self._state == "before":
                stripped = text.lstrip()
                if not stripped:
                    return items, "", False
                first = stripped[0]
                if first == "[" and self._listed is None:
                    self._listed, text = True, stripped[1:]
                elif first == "{":
                    self._listed = bool(self._listed)
                    self._state, text = "keys", stripped[1:]
                    self._name = self._early = self._sent = ""
                elif first == "," and self._listed:
                    text = stripped[1:]
                elif first == "]" and self._listed:
                    return items, stripped[1:], True
                else:
                    self.wrong = True
                    return items, text, self.named
            elif self._state == "keys":
                stripped = text.lstrip()
                if stripped.startswith("}"):
                    items += self._end_object()
                    text, self._state = stripped[1:], "before"
                    if not self._listed:
                        return items, text, True
                    continue
                key = self._KEY.match(text)
                if key is None:
                    if not re.match(r'\s*,?\s*("([^"\\]|\\.)*("\s*:?)?)?\s*$', text):
                        self.wrong = True
                        return items, text, self.named
                    return items, text, False
                self._key, text = key[1], text[key.end() :]
                self._value, self._text, self._state = JsonSpan(), "", "value"
            else:
                assert self._value is not None
                part, complete = self._value.take(text)
                text = text[len(part) :]
                self._text += part
                items += self._value_part(part, complete)
                if self.wrong:
                    return items, text, self.named
                if complete:
                    self._state = "keys"
                else:
                    return items, text, False
        return items, text, False

    def _value_part(self, part: str, complete: bool) -> list[Item]:
        if self._key in (self.dialect.name_key, "name", "tool_name") and not self._name:
            if complete:
                self._name = _string(self._text)
                if not self._known(self._name):
                    self.wrong = True
                    return []
                self.named = True
                return [("name", self._name), *self._arguments(self._early)]
        elif self._key in (self.dialect.arguments_key, "arguments", "parameters"):
            if self._text.lstrip().startswith('"'):  # JSON inside a string: only whole
                return self._argument_text(_string(self._text)) if complete else []
            return self._argument_text(part)
        return []

    def _argument_text(self, part: str) -> list[Item]:
        if not self._name:
            self._early += part
            return []
        return self._arguments(part)

    def _arguments(self, part: str) -> list[Item]:
        if not self._sent:
            part = part.lstrip()
        self._sent += part
        return [("arguments", part)] if part else []

    def _end_object(self) -> list[Item]:
        return [] if self._sent or not self._name else self._arguments("{}")

    def finish(self) -> list[Item]:
        return [] if not self.named or self._sent else [("arguments", "{}")]


class _NamedBody(_Body):
    """NAME separator {…}"""

    def __init__(self, dialect: Dialect, names: frozenset[str] | None) -> None:
        super().__init__(dialect, names)
        self._span = JsonSpan()
        self._sent = False
        self._closing = False

    def feed(self, text: str) -> tuple[list[Item], str, bool]:
        items: list[Item] = []
        if not self.named:
            head, mark, rest = text.partition(self.dialect.separator)
            if not mark:
                return items, text, False
            found = re.fullmatch(self.dialect.name_pattern, head)
            if found is None or not self._known(found["name"]):
                self.wrong = True
                return items, text, False
            self.named, text = True, rest
            items.append(("name", found["name"]))
        part, complete = self._span.take(text)
        rest = text[len(part) :]
        shown = part if self._sent else part.lstrip()
        if shown:
            self._sent = True
            items.append(("arguments", shown))
        return items, rest, complete

    def finish(self) -> list[Item]:
        return [("arguments", "{}")] if self.named and not self._sent else []


class _TagsBody(_Body):
    """<function=NAME><parameter=KEY>value</parameter>…, or NAME<arg_key>KEY</arg_key><arg_value>value</arg_value>…"""

    _NAME = re.compile(r"\s*(?:<function=)?([\w.\-]+)(?:>|\s*\n|\s*(?=<))")
    _PAIR = re.compile(
        r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>|<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL
    )

    def __init__(self, dialect: Dialect, names: frozenset[str] | None) -> None:
        super().__init__(dialect, names)
        self._count = 0

    def feed(self, text: str) -> tuple[list[Item], str, bool]:
        items: list[Item] = []
        if not self.named:
            found = self._NAME.match(text)
            if found is None:
                self.wrong = len(text) > 256
                return items, text, False
            if not self._known(found[1]):
                self.wrong = True
                return items, text, False
            self.named = True
            items.append(("name", found[1]))
            text = text[found.end() :]
        while pair := self._PAIR.search(text):
            if self.dialect.close in text[: pair.start()]:
                break
            key = (pair[1] or pair[3]).strip()
            value = pair[2] if pair[1] else pair[4]
            items.append(("arguments", ("{" if self._count == 0 else ", ") + f"{json.dumps(key)}: {_as_json(value)}"))
            self._count += 1
            text = text[pair.end() :]
        before, mark, after = text.partition(self.dialect.close)
        if mark and "<parameter=" not in before and "<arg_key>" not in before:
            items.append(("arguments", "}" if self._count else "{}"))
            return items, after, True
        return items, text, False

    def finish(self) -> list[Item]:
        return [("arguments", "}" if self._count else "{}")] if self.named else []


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _as_json(value: str) -> str:
    """A tag's value as JSON: what reads as JSON is that, the rest is a string."""
    try:
        json.loads(value)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    return value.strip()

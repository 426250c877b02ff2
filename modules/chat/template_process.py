"""The helper process that renders chat templates: a model file's Jinja source is a stranger's program.

Run as a script with `python -I`, so it imports nothing of the product and only jinja2 besides the standard library.
Jinja's immutable sandbox stops the ways to Python objects; it does not stop `'x' * 10**9` or an endless loop, so this
process also lives under resource limits, and the parent (`modules.chat.templates`) kills it when a render takes too long.

Frames on stdin and stdout: 4-byte big-endian length + UTF-8 JSON.
    request   {"template", "variables", "continue_text": str | null}
    reply     {"text"} or {"error", "kind"}; the first frame is {"ready": true}
"""

from __future__ import annotations

import datetime
import json
import struct
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

HEADER = struct.Struct(">I")
MEMORY_BYTES = 256 * 1024 * 1024
CPU_SECONDS = 3
OUTPUT_CHARS = 4 * 1024 * 1024
# Marks the end of an unfinished assistant message in the rendered text; letters only, so no template changes it.
CONTINUE_MARK = "SWITCHYARDxCONTINUExHERE"


class OutputTooLarge(Exception):
    pass


class GenerationTag(jinja2.ext.Extension):  # type: ignore[misc] # jinja2 is opaque to mypy here
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> str:
    raise jinja2.TemplateError(str(message))


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not Jinja's own filter: that one escapes <, > and & for HTML, which models were not trained on."""
    separators = options.get("separators")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=tuple(separators) if separators else None,
        sort_keys=bool(options.get("sort_keys", False)),
    )


def strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment chat templates are written for: that of transformers' apply_chat_template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class Renderer:
    def __init__(self) -> None:
        self.environment = make_environment()
        self.compile: Callable[[str], jinja2.Template] = lru_cache(maxsize=16)(self.environment.from_string)

    def render(self, template: str, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self.compile(template).generate(**variables):
            size += len(piece)
            if size > OUTPUT_CHARS:
                raise OutputTooLarge
            pieces.append(piece)
        return "".join(pieces)

    def render_continued(self, template: str, variables: dict[str, Any], text: str) -> str:
        """The prompt up to and with `text`, an assistant message without its end-of-turn.

        The generation prompt plus the text is exactly what the model saw when it wrote the text. A template without a
        generation prompt renders the message itself and is cut after it.
        """
        before = {**variables, "add_generation_prompt": True}
        head = self.render(template, before)
        plain = self.render(template, {**before, "add_generation_prompt": False})
        if head != plain:
            return head + text
        messages = [*variables["messages"], {"role": "assistant", "content": text + CONTINUE_MARK}]
        whole = self.render(template, {**variables, "messages": messages, "add_generation_prompt": False})
        position = whole.rfind(CONTINUE_MARK)
        if position < 0:
            raise jinja2.TemplateError("The chat template does not show the last assistant message, so it can't be continued.")
        return whole[:position]


def answer(renderer: Renderer, request: dict[str, Any]) -> dict[str, Any]:
    template, variables, text = request["template"], request["variables"], request.get("continue_text")
    try:
        if text is None:
            return {"text": renderer.render(template, variables)}
        return {"text": renderer.render_continued(template, variables, text)}
    except OutputTooLarge:
        return {"kind": "size", "error": f"Its output is over {OUTPUT_CHARS // 2**20} MB."}
    except MemoryError:
        return {"kind": "memory", "error": "It needs too much memory."}
    except RecursionError:
        return {"kind": "recursion", "error": "It nests too deep."}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"Line {error.lineno}: {error.message}"}
    except Exception as error:  # a template can raise whatever Python can: TypeError, ZeroDivisionError, …
        return {"kind": type(error).__name__, "error": str(error)[:2000] or type(error).__name__}


def limit_resources() -> None:
    """Caps that hold even if the parent is gone. Windows has no such calls: there the parent's watch does it alone."""
    if sys.platform == "win32":
        return
    import resource

    for what, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 8)):
        resource.setrlimit(what, (limit, limit))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))


def limit_cpu() -> None:
    """A few more seconds of CPU time from now on."""
    if sys.platform == "win32":
        return
    import resource

    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    while data and len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            break
        data += more
    return data


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    # ASCII: a lone surrogate, which a template can make, still crosses.
    body = json.dumps(message, ensure_ascii=True).encode("ascii")
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def main() -> int:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    renderer = Renderer()
    renderer.render("{{ strftime_now('%Y') }}{{ [1] | tojson }}", {})  # imports and time zone files before the limits
    limit_resources()
    send(sink, {"ready": True})
    while True:
        header = read_exactly(source, HEADER.size)
        if len(header) < HEADER.size:
            return 0
        (length,) = HEADER.unpack(header)
        limit_cpu()
        try:
            reply = answer(renderer, json.loads(read_exactly(source, length)))
        except MemoryError:  # the request itself did not fit
            reply = {"kind": "memory", "error": "It needs too much memory."}
        send(sink, reply)
        if reply.get("kind") == "memory":
            return 3  # a fresh process has its whole allowance again


if __name__ == "__main__":
    sys.exit(main())

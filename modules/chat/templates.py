"""Chat templates, rendered in a process that can be killed.

A template comes out of a model file, so it is a stranger's program: it runs in `template_process` with 2 s of time,
256 MB of memory and 4 MB of output, and whatever it does beyond that becomes a TemplateError. A killed helper is
started again by the next render.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from modules.errors import InvalidParameter, TemplateError

_HEADER = struct.Struct(">I")
_SCRIPT = Path(__file__).with_name("template_process.py")
_RESERVED = frozenset({"template", "messages", "add_generation_prompt", "bos_token", "eos_token", "continue_final", "tokenize"})

# What a model without a template gets: plain names and line breaks, which base models have seen most.
FALLBACK_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content }}{{ '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ 'User: ' + message.content + '\\n' }}
{%- else -%}
{{ 'Assistant: ' + message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:' }}
{%- endif -%}"""
# A model that follows the fallback ends its turn by beginning the user's.
FALLBACK_STOP = ("\nUser:",)


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """`seconds` of wall time a render may take. A machine that is only busy is given up to `busy_seconds`, as long as
    the helper itself has not used `seconds` of CPU time."""

    seconds: float = 2.0
    busy_seconds: float = 10.0
    memory_bytes: int = 256 * 1024 * 1024
    template_chars: int = 1024 * 1024
    start_seconds: float = 30.0


def check_variables(variables: Mapping[str, Any], param: str = "chat_template_kwargs") -> dict[str, Any]:
    """A request's extra template variables, fit to be passed to `render`. Raises InvalidParameter for a reserved name."""
    for name in variables:
        if name in _RESERVED or not name.isidentifier():
            raise InvalidParameter(f"{name} can't be set as a template variable.", param=param)
    return dict(variables)


class TemplateRenderer:
    """One helper process, one render at a time. Safe to use from any task; `close()` ends the helper."""

    def __init__(self, python: str | None = None, limits: TemplateLimits | None = None) -> None:
        self._python = python or sys.executable
        self._limits = limits or TemplateLimits()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="templates")
        self._helper: _Helper | None = None

    async def render(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        continue_final: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for these messages. A missing template is the plain fallback.

        `continue_final` leaves the last message, an assistant's, open: the text ends with it and without its end-of-turn.
        Raises TemplateError with the template's own message when it refuses the messages, and for a template that is
        wrong, hostile or too slow.
        """
        template = template or FALLBACK_TEMPLATE
        if len(template) > self._limits.template_chars:
            raise TemplateError(f"The chat template has {len(template)} characters; the limit is {self._limits.template_chars}.")
        continue_text = None
        if continue_final:
            if not messages or messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
                raise TemplateError("Only a last message of the assistant can be continued.")
            continue_text = messages[-1]["content"]
            messages = messages[:-1]
        variables = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token or "",
            "eos_token": eos_token or "",
            "tools": None,  # there, as in transformers: templates ask `tools is not none`
            "documents": None,
            **kwargs,
        }
        body = json.dumps({"template": template, "variables": variables, "continue_text": continue_text}).encode("ascii")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, body)

    async def warm(self) -> None:
        """Start the helper now, so that the first chat does not wait for it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._ready_helper)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._stop)
        self._thread.shutdown(wait=False)

    @property
    def pid(self) -> int | None:
        return self._helper.pid if self._helper else None

    # -- in the renderer's thread

    def _ready_helper(self) -> _Helper:
        if self._helper is None or not self._helper.alive():
            self._stop()
            self._helper = _Helper(self._python, self._limits)
        return self._helper

    def _render(self, body: bytes) -> str:
        reply = self._ready_helper().ask(body)
        if reply.get("kind") == "ended":
            reply = self._ready_helper().ask(body)  # somebody else may have killed it; twice is the template's doing
        if reply.get("kind") == "memory":
            self._stop()  # it is ending itself, and would take the next render with it
        if "text" in reply:
            text = str(reply["text"])
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise TemplateError("The chat template made text that is no valid Unicode.") from None
            return text
        refused = reply.get("kind") == "TemplateError"  # raise_exception: the template's own words
        raise TemplateError(
            f"The model's chat template failed: {reply['error']}",
            hint="Check the order of the messages." if refused else "Use another copy of this model.",
            detail={"kind": reply.get("kind")},
        )

    def _stop(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None


class _Helper:
    """The child process. All calls come from one thread; a second one only watches and kills."""

    def __init__(self, python: str, limits: TemplateLimits) -> None:
        self._limits = limits
        keep = {key: os.environ[key] for key in ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH") if key in os.environ}
        self._process = subprocess.Popen(
            [python, "-I", "-B", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**keep, "PYTHONUTF8": "1"},
            **_own_group(),
        )
        if "ready" not in self._exchange(b"", limits.start_seconds, limits.start_seconds):
            raise TemplateError("The process that renders chat templates did not start.", hint="Run the doctor command.")

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, body: bytes) -> dict[str, Any]:
        return self._exchange(_HEADER.pack(len(body)) + body, self._limits.seconds, self._limits.busy_seconds)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # unsent bytes of a killed helper

    def _exchange(self, frame: bytes, seconds: float, busy_seconds: float) -> dict[str, Any]:
        watch = _Watch(self._process, self._limits.memory_bytes, seconds, busy_seconds)
        watch.start()
        try:
            reply = self._write_and_read(frame)
        finally:
            watch.finish()
        if reply is not None:
            return reply
        self.stop()
        if watch.verdict:
            return {"kind": "killed", "error": watch.verdict}
        return {"kind": "ended", "error": "it ended the process that renders it."}

    def _write_and_read(self, frame: bytes) -> dict[str, Any] | None:
        """None when the process ended first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
        except OSError:
            return None
        header = self._process.stdout.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack(header)
        body = self._process.stdout.read(length)
        if len(body) < length:
            return None
        reply = json.loads(body)
        return reply if isinstance(reply, dict) else None


class _Watch(threading.Thread):
    """Kills the helper when it runs too long or grows too big; `verdict` then says which."""

    def __init__(self, process: subprocess.Popen[bytes], memory_bytes: int, seconds: float, busy_seconds: float) -> None:
        super().__init__(name="template-watch", daemon=True)
        self._process, self._memory_bytes, self._seconds, self._busy_seconds = process, memory_bytes, seconds, busy_seconds
        self._done = threading.Event()
        self.verdict: str | None = None

    def finish(self) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        begin = time.monotonic()
        if self._done.wait(0.05):  # nearly every render ends here
            return
        try:
            child = psutil.Process(self._process.pid)
            cpu_begin = _cpu_seconds(child)
            while not self._done.wait(0.05):
                elapsed = time.monotonic() - begin
                busy = _cpu_seconds(child) - cpu_begin < self._seconds - 0.5
                if elapsed > (self._busy_seconds if busy else self._seconds):
                    self.verdict = f"it took longer than {self._seconds:g} seconds."
                elif child.memory_info().rss > self._memory_bytes + 64 * 1024 * 1024:
                    self.verdict = "it needs too much memory."
                if self.verdict:
                    self._process.kill()
                    return
        except psutil.NoSuchProcess:
            return  # it ended by itself: the reader sees the end of the pipe


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _own_group() -> dict[str, Any]:
    """Ctrl-C in the terminal is the server's to handle, not the helper's."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}

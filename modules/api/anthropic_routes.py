"""Anthropic's Messages API: /v1/messages, whole and streamed, and /v1/messages/count_tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules import caller
from modules.api import sse
from modules.api.anthropic_models import CountRequest, MessagesRequest, anthropic_turn
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.dialects import error_body
from modules.api.job import (
    Finish,
    Job,
    Queued,
    Reasoning,
    Started,
    Text,
    ToolCallArguments,
    ToolCallStart,
    count_prompt,
    prompt_tokens,
    respond,
)
from modules.api.openai_models import parse
from modules.errors import AppError
from modules.schema import Usage

if TYPE_CHECKING:
    from modules.api.job import Choice, Outcome
    from modules.services import Services

PATH = "/v1/messages"
# Anthropic's clients send a thinking block back with the signature it came with; ours are not signed.
SIGNATURE = "unsigned"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def build_router(services: Services) -> APIRouter:
    router = APIRouter(prefix=PATH, tags=["Anthropic"])
    strict = services.config.strict_parameters

    @router.post("", openapi_extra=body_schema(MessagesRequest))
    async def messages(request: Request) -> Response:
        """An answer to a conversation; streamed with `stream: true`."""
        body = parse(MessagesRequest, await read_object(request))
        turn = anthropic_turn(body, strict=strict)
        job = Job(services, [turn], model=body.model)
        stops = body.stop_sequences or []
        if not body.stream:
            return await respond(request, job, whole=lambda job: _whole(job, stops))
        return await respond(request, job, whole=lambda job: _whole(job, stops), stream=_Stream(services, stops))

    @router.post("/count_tokens", openapi_extra=body_schema(CountRequest))
    async def count_tokens(request: Request) -> JSONResponse:
        """How many tokens the prompt of such a request would have."""
        body = parse(CountRequest, await read_object(request))
        turn = anthropic_turn(body, strict=strict)
        return JSONResponse({"input_tokens": await count_prompt(services, turn, body.model)})

    return router


async def _whole(job: Job, stops: list[str]) -> dict[str, Any]:
    async for choice in job.choices():
        outcome = await choice.outcome()
        content: list[dict[str, Any]] = []
        if outcome.reasoning:
            content.append({"type": "thinking", "thinking": outcome.reasoning, "signature": SIGNATURE})
        if outcome.text.strip() or not outcome.tool_calls:
            content.append({"type": "text", "text": outcome.text})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)}
            for call in outcome.tool_calls
        ]
        reason, sequence = _ending(outcome, stops)
        return {
            **_head(job.model_id),
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(outcome.usage),
            **job.extension(),
        }
    raise AssertionError("a job has a choice")


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{caller.request_id()}", "type": "message", "role": "assistant", "model": model}


def _arguments(text: str) -> Any:
    """A call's input as an object. A model that wrote no JSON gets its words back under one name."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {"raw": text}
    return value if isinstance(value, dict) else {"raw": value}


def _ending(outcome: Outcome, stops: list[str]) -> tuple[str, str | None]:
    if outcome.tool_calls and outcome.finish_reason in ("tool_calls", "stop"):
        return "tool_use", None
    if outcome.finish_reason == "length":
        return "max_tokens", None
    if outcome.stop_match in stops:
        return "stop_sequence", outcome.stop_match
    return "end_turn", None


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts the tokens read from the cache apart."""
    return {
        "input_tokens": max(0, usage.prompt_tokens - usage.cached_tokens),
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }


class _Stream:
    """Events of one answer: blocks are opened and closed in turn, each delta belongs to the block that is open."""

    def __init__(self, services: Services, stops: list[str]) -> None:
        self._services = services
        self._stops = stops
        self._index = -1
        self._open = ""

    async def __call__(self, job: Job, write: sse.Writer) -> None:
        try:
            async for choice in job.choices():
                await self._choice(job, choice, write)
        except AppError as error:
            await write(_event("error", error_body(error, PATH)))

    async def _choice(self, job: Job, choice: Choice, write: sse.Writer) -> None:
        async for event in choice.events():
            if isinstance(event, Text):
                if event.text and (self._open == "text" or event.text.strip() or self._index < 0):
                    await self._to("text", {"type": "text", "text": ""}, write)
                    await self._delta({"type": "text_delta", "text": event.text}, write)
            elif isinstance(event, Reasoning):
                await self._to("thinking", {"type": "thinking", "thinking": "", "signature": ""}, write)
                await self._delta({"type": "thinking_delta", "thinking": event.text}, write)
            elif isinstance(event, ToolCallStart):
                await self._close(write)
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                await self._to("tool_use", block, write)
            elif isinstance(event, ToolCallArguments):
                await self._delta({"type": "input_json_delta", "partial_json": event.text}, write)
            elif isinstance(event, Started):
                usage = _usage(Usage(prompt_tokens=len(await prompt_tokens(self._services, choice))))
                message = {**_head(job.model_id), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                await write(_event("message_start", {"type": "message_start", "message": message}) + PING)
            elif isinstance(event, Queued):
                wait = "" if event.estimate_s is None else f", about {event.estimate_s:.0f} s"
                await write(sse.comment(f"position {event.position} in the queue{wait}"))
            elif isinstance(event, Finish):
                await self._finish(job, event.outcome, write)

    async def _finish(self, job: Job, outcome: Outcome, write: sse.Writer) -> None:
        if self._index < 0:
            await self._to("text", {"type": "text", "text": ""}, write)
        await self._close(write)
        reason, sequence = _ending(outcome, self._stops)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        end = {"type": "message_delta", "delta": delta, "usage": _usage(outcome.usage), **job.extension()}
        await write(_event("message_delta", end) + _event("message_stop", {"type": "message_stop"}))

    async def _to(self, kind: str, block: dict[str, Any], write: sse.Writer) -> None:
        """Be in an open block of this kind."""
        if self._open == kind:
            return
        await self._close(write)
        self._index += 1
        self._open = kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        await write(_event("content_block_start", start))

    async def _delta(self, delta: dict[str, Any], write: sse.Writer) -> None:
        await write(_event("content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta}))

    async def _close(self, write: sse.Writer) -> None:
        if not self._open:
            return
        if self._open == "thinking":
            await self._delta({"type": "signature_delta", "signature": SIGNATURE}, write)
        self._open = ""
        await write(_event("content_block_stop", {"type": "content_block_stop", "index": self._index}))


def _event(name: str, data: dict[str, Any]) -> bytes:
    return sse.event(dumps(data), name)

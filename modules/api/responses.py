"""OpenAI's Responses API: /v1/responses, whole and streamed, over the same seam as the other protocols."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api import sse
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.errors import body_of
from modules.api.job import Finish, Job, Queued, Reasoning, Started, Text, ToolCallArguments, ToolCallStart, respond
from modules.api.openai_answers import ChatForm, dumps
from modules.api.openai_models import parse
from modules.api.responses_models import ResponsesRequest, input_messages, response_turn
from modules.api.responses_store import ResponseStore
from modules.api.turn import tool_arguments
from modules.caller import current, request_id
from modules.errors import AppError, InvalidParameter, NotFound

if TYPE_CHECKING:
    from modules.api.answer import AnswerEvent, Outcome
    from modules.schema import TokenLogprob
    from modules.services import Services


def build_router(services: Services) -> APIRouter:
    """The routes over these services, and the store of their responses."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    store = ResponseStore()

    @router.post("/responses", openapi_extra=body_schema(ResponsesRequest))
    async def create(request: Request) -> Response:
        """An answer to text or items, after an earlier response where one is named; streamed with `stream: true`."""
        body = parse(ResponsesRequest, await read_object(request))
        earlier = _earlier(store, body, current().key)
        turn = response_turn(body, earlier, strict=services.config.strict_parameters)
        answer = _Answer(store, body, [*earlier, *input_messages(body.input)], current().key)
        job = Job(services, [turn], model=body.model)
        return await respond(request, job, whole=answer.whole, stream=answer.stream if body.stream else None)

    @router.get("/responses/{response_id}")
    async def retrieve(response_id: str) -> JSONResponse:
        """A stored response."""
        return JSONResponse(_stored(store, response_id, current().key).body)

    @router.get("/responses/{response_id}/input_items")
    async def input_items(response_id: str) -> JSONResponse:
        """What a stored response was asked with."""
        items = _stored(store, response_id, current().key).input_items
        ids = [item["id"] for item in items]
        bounds = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return JSONResponse({"object": "list", "data": items, **bounds, "has_more": False})

    @router.delete("/responses/{response_id}")
    async def delete(response_id: str) -> JSONResponse:
        """Forget a stored response."""
        if not store.delete(response_id, current().key):
            raise NotFound("There is no such response.", param="response_id")
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @router.post("/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> JSONResponse:
        """Only background responses can be cancelled, and there are none: close the connection instead."""
        _stored(store, response_id, current().key)
        raise InvalidParameter("This response is no background response.", hint="Close its connection.", param="response_id")

    return router


def _stored(store: ResponseStore, response_id: str, owner: str) -> Any:
    found = store.get(response_id, owner)
    if found is None:
        raise NotFound("There is no such response.", hint="Stored ones are kept in memory, up to 1000.", param="response_id")
    return found


def _earlier(store: ResponseStore, body: ResponsesRequest, owner: str) -> list[dict[str, Any]]:
    if body.previous_response_id is None:
        return []
    found = store.get(body.previous_response_id, owner)
    if found is None:
        raise InvalidParameter(
            "The previous response is not stored (any more).",
            hint="Send the whole conversation as input.",
            param="previous_response_id",
        )
    return list(found.messages)


class _Answer:
    """One response. `whole` and `stream` are what `respond` takes."""

    def __init__(self, store: ResponseStore, body: ResponsesRequest, messages: list[dict[str, Any]], owner: str) -> None:
        self._store = store
        self._body = body
        self._messages = messages
        self._owner = owner
        self._id = f"resp_{request_id()}"
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item being written
        self._calls: dict[int, dict[str, Any]] = {}
        self._number = 0

    # --- the object -------------------------------------------------------------------------------------------

    def _object(self, job: Job, status: str, outcome: Outcome | None = None, error: AppError | None = None) -> dict[str, Any]:
        body = self._body
        usage = None
        if outcome is not None:
            used = outcome.usage
            usage = {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            }
        applied = outcome.receipt.get("applied", {}) if outcome else {}
        text_format = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": job.created,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": job.model_id,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
            "temperature": applied.get("temperature", 1.0),
            "text": {"format": text_format or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": applied.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
            **(job.extension() if outcome is not None else {}),
        }

    def _final(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """The finished object, stored where that was not declined."""
        status = "incomplete" if outcome.finish_reason == "length" else "completed"
        final = self._object(job, status, outcome)
        if self._body.store is not False:
            answer: dict[str, Any] = {"role": "assistant", "content": outcome.text}
            if outcome.tool_calls:
                items = [item for item in self._output if item["type"] == "function_call"]
                answer["tool_calls"] = _as_calls(items)
            self._store.put([*self._messages, answer], final, self._input_items(), self._owner)
        return final

    def _input_items(self) -> list[dict[str, Any]]:
        given = self._body.input
        items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
        return [{**item, "id": item.get("id") or f"msg_{secrets.token_hex(12)}"} for item in items]

    # --- events -------------------------------------------------------------------------------------------------

    async def whole(self, job: Job) -> dict[str, Any]:
        async for choice in job.choices():
            async for event in choice.events():
                self._take(event)
                if isinstance(event, Finish):
                    return self._final(job, event.outcome)
        raise AssertionError("an answer ends with Finish")

    async def stream(self, job: Job, write: sse.Writer) -> None:
        async def send(name: str, fields: dict[str, Any]) -> None:
            data = {"type": name, "sequence_number": self._number, **fields}
            self._number += 1
            await write(sse.event(dumps(data), name))

        try:
            async for choice in job.choices():
                async for event in choice.events():
                    if isinstance(event, Queued):
                        await write(sse.comment(f"position {event.position} in the queue"))
                        continue
                    if isinstance(event, Started):
                        await send("response.created", {"response": self._object(job, "in_progress")})
                        await send("response.in_progress", {"response": self._object(job, "in_progress")})
                    for name, fields in self._take(event):
                        await send(name, fields)
                    if isinstance(event, Finish):
                        final = self._final(job, event.outcome)
                        await send(f"response.{final['status']}", {"response": final})
        except AppError as error:
            await send("response.failed", {"response": self._object(job, "failed", error=error)})
            await write(sse.event(dumps({"type": "error", "sequence_number": self._number, **body_of(error)["error"]}), "error"))

    def _take(self, event: AnswerEvent) -> list[tuple[str, dict[str, Any]]]:
        """The stream's events for one of ours; the output items grow on the way."""
        if isinstance(event, Text):
            return self._text(event) if event.text or event.logprobs else []
        if isinstance(event, Reasoning):
            return self._reasoning(event.text)
        if isinstance(event, ToolCallStart):
            call_item = {"name": event.name, "call_id": event.id, "arguments": ""}
            sent = [*self._close(), *self._begin("function_call", "fc", **call_item)]
            assert self._open is not None
            self._calls[event.index] = self._open
            return sent
        if isinstance(event, ToolCallArguments):
            call = self._calls[event.index]
            call["arguments"] += event.text
            return [("response.function_call_arguments.delta", {**self._where(call), "delta": event.text})]
        if isinstance(event, Finish):
            return [*([] if self._output or event.outcome.tool_calls else self._text(Text(""))), *self._close(event.outcome)]
        return []

    def _text(self, event: Text) -> list[tuple[str, dict[str, Any]]]:
        sent: list[tuple[str, dict[str, Any]]] = []
        if self._open is None or self._open["type"] != "message":
            sent += [*self._close(), *self._begin("message", "msg", role="assistant", content=[])]
            assert self._open is not None
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            sent.append(("response.content_part.added", {**self._where(self._open), "content_index": 0, "part": dict(part)}))
            self._open["content"].append(part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += event.text
        logprobs = _logprobs(event.logprobs)
        part["logprobs"] += logprobs
        fields = {**self._where(self._open), "content_index": 0, "delta": event.text, "logprobs": logprobs}
        return [*sent, ("response.output_text.delta", fields)]

    def _reasoning(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        sent: list[tuple[str, dict[str, Any]]] = []
        if self._open is None or self._open["type"] != "reasoning":
            sent += [*self._close(), *self._begin("reasoning", "rs", summary=[], content=[])]
            assert self._open is not None
            self._open["content"].append({"type": "reasoning_text", "text": ""})
        assert self._open is not None
        self._open["content"][0]["text"] += text
        return [*sent, ("response.reasoning_text.delta", {**self._where(self._open), "content_index": 0, "delta": text})]

    def _begin(self, kind: str, prefix: str, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        item = {"id": f"{prefix}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress", **fields}
        self._open = item
        self._output.append(item)
        shown = {**item, **({"content": []} if "content" in item else {})}
        return [("response.output_item.added", {"output_index": len(self._output) - 1, "item": shown})]

    def _close(self, outcome: Outcome | None = None) -> list[tuple[str, dict[str, Any]]]:
        item = self._open
        if item is None:
            return []
        self._open = None
        cut = outcome is not None and outcome.finish_reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        where = self._where(item)
        sent: list[tuple[str, dict[str, Any]]] = []
        if item["type"] == "message":
            part = item["content"][0]
            done = {**where, "content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            sent.append(("response.output_text.done", done))
            sent.append(("response.content_part.done", {**where, "content_index": 0, "part": part}))
        elif item["type"] == "reasoning":
            sent.append(("response.reasoning_text.done", {**where, "content_index": 0, "text": item["content"][0]["text"]}))
        else:
            done = {**where, "name": item["name"], "arguments": item["arguments"]}
            sent.append(("response.function_call_arguments.done", done))
        sent.append(("response.output_item.done", {"output_index": where["output_index"], "item": item}))
        return sent

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._output.index(item)}


def _as_calls(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": tool_arguments(item["arguments"], "input")},
        }
        for item in items
    ]


def _logprobs(items: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return list(ChatForm().logprobs(list(items), "", 0, prompt_first=False)["content"]) if items else []

"""Ollama's API under /api: tags, show, ps, version, chat, generate, embed, pull, delete. Streams are lines of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api import ollama_library, sse
from modules.api import ollama_models as models
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.dialects import error_body
from modules.api.embeddings import vectors_of
from modules.api.job import Finish, Job, Reasoning, StreamResponse, Text, ToolCallStart, prompt_tokens, render_prompt, respond
from modules.api.openai_models import parse
from modules.chat.vision import sees
from modules.errors import AppError, NotSupported, UnsupportedParameter
from modules.reasoning import marks_of
from modules.schema import features_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modules.api.job import Choice, Outcome
    from modules.api.turn import Turn
    from modules.residents import Resident
    from modules.schema import TokenLogprob
    from modules.services import Services

# The version whose API this is; clients ask before they use newer parts of it.
API_VERSION = "0.12.6"
NDJSON = "application/x-ndjson"
NOT_HERE = ("push", "create", "copy", "blobs/{digest}", "me", "signout")
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def build_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/api", tags=["Ollama"])
    strict = services.config.strict_parameters

    @router.get("/version")
    async def version() -> JSONResponse:
        """The version of Ollama's API that is spoken here."""
        return JSONResponse({"version": API_VERSION})

    @router.get("/tags")
    async def tags() -> JSONResponse:
        """Every local model."""
        listed = await asyncio.to_thread(lambda: [models.entry(m) for m in services.library.list() if not m.problem])
        return JSONResponse({"models": listed})

    @router.get("/ps")
    async def ps() -> JSONResponse:
        """The models in memory."""
        return JSONResponse({"models": [_running(services, r) for r in services.manager.residents() if r.state == "ready"]})

    @router.post("/show", openapi_extra=body_schema(models.ShowRequest, samplers=False))
    async def show(request: Request) -> JSONResponse:
        """What is known about one model."""
        body = parse(models.ShowRequest, await read_object(request))
        name = await asyncio.to_thread(models.find, services, body.model or body.name or "")
        return JSONResponse(await asyncio.to_thread(_shown, services, name))

    @router.post("/chat", openapi_extra=body_schema(models.ChatRequest, samplers=False))
    async def chat(request: Request) -> Response:
        """An answer to a conversation, streamed unless `stream` is false. Without messages, the model is only loaded."""
        body = parse(models.ChatRequest, await read_object(request))
        keep = models.seconds_of(body.keep_alive)
        turn = models.chat_turn(body, strict=strict)
        name = await asyncio.to_thread(models.find, services, body.model)
        if not body.messages:
            return await _only_load(services, name, keep, {"message": {"role": "assistant", "content": ""}})
        return await _answer(services, request, turn, _Answer(services, body.model, name, keep, chat=True), body.stream)

    @router.post("/generate", openapi_extra=body_schema(models.GenerateRequest, samplers=False))
    async def generate(request: Request) -> Response:
        """An answer to one prompt, in the model's template unless `raw`. Streamed unless `stream` is false."""
        body = parse(models.GenerateRequest, await read_object(request))
        keep = models.seconds_of(body.keep_alive)
        turn = models.generate_turn(body, strict=strict)
        name = await asyncio.to_thread(models.find, services, body.model)
        if not body.prompt and not body.suffix:
            return await _only_load(services, name, keep, {"response": ""})
        if body.context and turn.messages is not None:
            await _go_on(services, turn, name, body.context)
        return await _answer(services, request, turn, _Answer(services, body.model, name, keep, chat=False), body.stream)

    @router.post("/embed", openapi_extra=body_schema(models.EmbedRequest, samplers=False))
    async def embed(request: Request) -> JSONResponse:
        """One vector for each text."""
        body = parse(models.EmbedRequest, await read_object(request))
        began, keep = time.perf_counter_ns(), models.seconds_of(body.keep_alive)
        name = await asyncio.to_thread(models.find, services, body.model)
        texts: list[str | list[int]] = [body.input] if isinstance(body.input, str) else list(body.input)
        made = await vectors_of(services, name, texts, dimensions=body.dimensions)
        _keep(services, name, keep)
        took = time.perf_counter_ns() - began
        answer = {"model": body.model, "embeddings": made.vectors, "total_duration": took, "load_duration": 0}
        return JSONResponse({**answer, "prompt_eval_count": made.tokens})

    @router.post("/embeddings", openapi_extra=body_schema(models.OldEmbedRequest, samplers=False))
    async def embeddings(request: Request) -> JSONResponse:
        """One vector of one text; the older form of /api/embed."""
        body = parse(models.OldEmbedRequest, await read_object(request))
        keep = models.seconds_of(body.keep_alive)
        name = await asyncio.to_thread(models.find, services, body.model)
        made = await vectors_of(services, name, [body.prompt])
        _keep(services, name, keep)
        return JSONResponse({"embedding": made.vectors[0]})

    @router.post("/pull", openapi_extra=body_schema(models.PullRequest, samplers=False))
    async def pull(request: Request) -> Response:
        """Fetch a model of the hub, named OWNER/NAME or OWNER/NAME:Q4_K_M, with its progress: an admin's right."""
        body = parse(models.PullRequest, await read_object(request))
        lines = await ollama_library.pull(services, body.model or body.name or "")
        if body.stream is False:
            return JSONResponse([line async for line in lines][-1])
        return StreamResponse(sse.EventStream(lambda write: _write_lines(write, lines), content_type=NDJSON))

    @router.delete("/delete", openapi_extra=body_schema(models.ShowRequest, samplers=False))
    async def delete(request: Request) -> Response:
        """Put a model into the trash of the Models page: an admin's right."""
        body = parse(models.ShowRequest, await read_object(request))
        await ollama_library.delete(services, body.model or body.name or "")
        return Response()

    for path in NOT_HERE:
        router.add_api_route(f"/{path}", _not_here, methods=["POST", "DELETE", "HEAD"], include_in_schema=False)
    return router


async def _not_here() -> Response:
    raise NotSupported("Models are not made or copied through this API.", hint="Use the page, or server.py.")


async def _write_lines(write: sse.Writer, lines: AsyncIterator[dict[str, Any]]) -> None:
    """Until there are no more, or nobody reads them."""
    try:
        async for line in lines:
            if write.gone:
                return
            await write(f"{dumps(line)}\n".encode())
    except AppError as error:
        await write(f"{dumps(error_body(error, '/api/pull'))}\n".encode())


# --- answers -------------------------------------------------------------------------------------------------------


async def _answer(services: Services, request: Request, turn: Turn, answer: _Answer, stream: bool | None) -> Response:
    job = Job(services, [turn], model=answer.name)
    if stream is False:
        return await respond(request, job, whole=answer.whole)
    return await respond(request, job, whole=answer.whole, stream=answer.stream, content_type=NDJSON)


async def _go_on(services: Services, turn: Turn, name: str, context: list[int]) -> None:
    """`context`: the tokens of the conversation so far, which the new question follows."""
    prompt = await render_prompt(services, turn, name)
    resident = await services.manager.resolve(name)
    ids = await services.manager.client(resident.id).encode(prompt, False)
    turn.messages, turn.token_ids = None, (*context, *ids)


class _Answer:
    """One answer in Ollama's words. `model` is the name as it was asked for, `name` the model's own."""

    def __init__(self, services: Services, model: str, name: str, keep: float | None, *, chat: bool) -> None:
        self.name = name
        self._services = services
        self._model = model
        self._keep = keep
        self._chat = chat
        self._began = time.perf_counter_ns()

    async def whole(self, job: Job) -> dict[str, Any]:
        async for choice in job.choices():
            outcome = await choice.outcome()
            calls = [_call(call.name, call.arguments) for call in outcome.tool_calls]
            message = self._piece(outcome.text, outcome.reasoning, calls, outcome.logprobs)
            return {**self._head(), **message, **await self._end(job, choice, outcome)}
        raise AssertionError("a job has a choice")

    async def stream(self, job: Job, write: sse.Writer) -> None:
        try:
            async for choice in job.choices():
                async for event in choice.events():
                    if isinstance(event, Text) and event.text:
                        await self._line(write, self._piece(event.text, "", [], event.logprobs))
                    elif isinstance(event, Reasoning):
                        await self._line(write, self._piece("", event.text, [], ()))
                    elif isinstance(event, Finish):
                        outcome = event.outcome
                        if outcome.tool_calls:  # Ollama sends a call when it is whole
                            calls = [_call(call.name, call.arguments) for call in outcome.tool_calls]
                            await self._line(write, self._piece("", "", calls, ()))
                        await self._line(write, {**self._piece("", "", [], ()), **await self._end(job, choice, outcome)})
                    elif isinstance(event, ToolCallStart):
                        continue
        except AppError as error:
            await write(f"{dumps(error_body(error, '/api/chat'))}\n".encode())

    async def _line(self, write: sse.Writer, fields: dict[str, Any]) -> None:
        await write(f"{dumps({**self._head(), 'done': False, **fields})}\n".encode())

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": models.stamp(time.time())}

    def _piece(
        self, text: str, thinking: str, calls: list[dict[str, Any]], logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]
    ) -> dict[str, Any]:
        fields: dict[str, Any]
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if thinking:
                message["thinking"] = thinking
            if calls:
                message["tool_calls"] = calls
            fields = {"message": message}
        else:
            fields = {"response": text}
            if thinking:
                fields["thinking"] = thinking
        if logprobs:
            fields["logprobs"] = [_logprob(item) for item in logprobs]
        return fields

    async def _end(self, job: Job, choice: Choice, outcome: Outcome) -> dict[str, Any]:
        run = choice.run
        assert run is not None
        end = {
            "done": True,
            "done_reason": "length" if outcome.finish_reason == "length" else "stop",
            "total_duration": time.perf_counter_ns() - self._began,
            "load_duration": 0,
            "prompt_eval_count": outcome.usage.prompt_tokens,
            "prompt_eval_duration": int(run.timings.prefill_s * 1e9),
            "eval_count": outcome.usage.completion_tokens,
            "eval_duration": int(run.timings.decode_s * 1e9),
            **job.extension(),
        }
        if not self._chat and run.resident is not None and run.resident.info is not None:
            client = self._services.manager.client(run.resident.id)
            with contextlib.suppress(UnsupportedParameter):  # a remote server may not tell its tokens: then there is no context
                end["context"] = [*await prompt_tokens(self._services, choice), *await client.encode(outcome.raw, False)]
        _keep(self._services, self.name, self._keep)
        return end


def _call(name: str, arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        value = {"raw": arguments}
    return {"function": {"name": name, "arguments": value if isinstance(value, dict) else {"raw": value}}}


def _logprob(item: TokenLogprob) -> dict[str, Any]:
    def one(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

    return {**one(item.text, item.logprob), "top_logprobs": [one(text, value) for _, text, value in item.top]}


# --- models --------------------------------------------------------------------------------------------------------


async def _only_load(services: Services, name: str, keep: float | None, empty: dict[str, Any]) -> JSONResponse:
    """A request without a question loads the model, or with keep_alive 0 unloads it."""
    reason = "load"
    if keep == 0:
        reason = "unload"
        for resident in services.manager.residents():
            if resident.model.id == name and resident.state == "ready":
                await services.manager.unload(resident.id)
    else:
        await services.manager.resolve(name)
        _keep(services, name, keep)
    return JSONResponse({"model": name, "created_at": models.stamp(time.time()), **empty, "done": True, "done_reason": reason})


def _keep(services: Services, name: str, seconds: float | None) -> None:
    """How long the model stays after this request, where the client said so."""
    if seconds is None:
        return
    for resident in services.manager.residents():
        if resident.model.id == name and resident.state == "ready":
            services.manager.idle.keep_alive(resident.id, seconds)


def _running(services: Services, resident: Resident) -> dict[str, Any]:
    until = services.manager.idle.due(resident.id)
    far = time.time() + 100 * 365 * 86400.0
    info = resident.info
    on_cpu = info is None or not any(device.startswith(("cuda", "gpu")) for device in map(str.lower, info.device_map))
    return {
        **models.entry(resident.model),
        "size": resident.memory_bytes or resident.model.size_bytes,
        "size_vram": 0 if on_cpu else resident.memory_bytes or 0,
        "expires_at": models.stamp(until if math.isfinite(until) else far),
        "context_length": info.context_length if info else resident.model.context_length or 0,
        "loader": resident.loader,
    }


def _shown(services: Services, name: str) -> dict[str, Any]:
    model = services.library.find(name)
    resident = next((r for r in services.manager.residents() if r.model.id == name and r.state == "ready"), None)
    template = services.chat_template(resident) if resident is not None else None
    # Tools are shown as text to models whose template has no place for them, so every model takes them.
    capabilities = ["completion", "tools"]
    if marks_of(template) is not None:
        capabilities.append("thinking")
    if resident is not None and "embeddings" in features_of(services.specs[resident.loader], resident.info):
        capabilities.append("embedding")
    if sees(model, resident):
        capabilities.append("vision")
    return {
        "modelfile": f"# This model is kept by Switchyard, not by a Modelfile.\nFROM {name}\n",
        "parameters": "",
        "template": template or "",
        "license": model.license or "",
        "details": models.details(model),
        "model_info": models.model_info(model, resident),
        "capabilities": capabilities,
        "modified_at": models.entry(model)["modified_at"],
    }

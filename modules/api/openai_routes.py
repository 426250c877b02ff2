"""OpenAI's endpoints: /v1/models, /v1/chat/completions, /v1/completions.

A request is checked in full, its model resolved and its prompt counted before the first byte of the answer, so that what can
be refused is refused with a status; after that a failure is an error object in the stream. Every generation is a Run, the
same as the page's.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api import sse
from modules.api.body import read_object
from modules.api.errors import body_of
from modules.api.openai_models import ChatRequest, Common, CompletionRequest, parse, schema_of
from modules.api.openai_prepare import Plan, plan_chat, plan_completions
from modules.errors import AppError, Conflict, ModelNotFound, NoModelLoaded
from modules.generation import Delta, Run, Status

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.residents import Resident
    from modules.schema import GenerationRequest, ModelFiles, TokenLogprob
    from modules.services import Services

MAX_MODEL_NAME = 512
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def build_router(services: Services) -> APIRouter:
    """The routes over these services."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def list_models() -> JSONResponse:
        """Every local model with its state and capabilities."""
        models = await asyncio.to_thread(services.library.list)
        return JSONResponse({"object": "list", "data": [_model_entry(services, model) for model in models]})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        """One local model."""
        model = await asyncio.to_thread(services.library.find, _model_name(name))
        return JSONResponse(_model_entry(services, model))

    @router.post("/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat(request: Request) -> Response:
        """An answer to a conversation; streamed with `stream: true`."""
        body = parse(ChatRequest, await read_object(request))
        plan = plan_chat(body, strict=services.config.strict_parameters)
        return await _answer(services, request, body, [plan], _Chat())

    @router.post("/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """The continuation of a text, of several texts, or of token ids."""
        body = parse(CompletionRequest, await read_object(request))
        plans = plan_completions(body, strict=services.config.strict_parameters)
        return await _answer(services, request, body, plans, _Completion())

    return router


# --- one request ---------------------------------------------------------------------------------------------------


class _Format:
    """What differs between the two endpoints' answers."""

    prefix: str
    name: str
    chunk_name: str

    def opening(self) -> str | None:
        """The JSON of the first delta of a choice, where there is one."""
        return None

    def delta(self, text_json: str) -> str:
        raise NotImplementedError

    def choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_Format):
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self) -> str | None:
        return '"delta":{"role":"assistant","content":""}'

    def delta(self, text_json: str) -> str:
        return f'"delta":{{"content":{text_json}}}' if text_json else '"delta":{}'

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        content = [
            {**entry(item.text, item.logprob), "top_logprobs": [entry(text, value) for _, text, value in item.top]}
            for item in items
        ]
        return {"content": content, "refusal": None}


class _Completion(_Format):
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def delta(self, text_json: str) -> str:
        return f'"text":{text_json}' if text_json else '"text":""'

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        """With `prompt_first`, the first item is the prompt's first token, which has nothing before it to be likely after."""
        offsets = []
        at = 0
        for item in items:
            offsets.append(offset + at)
            if text.startswith(item.text, at):  # a special token such as BOS is no part of the text
                at += len(item.text)
        values: list[float | None] = [item.logprob for item in items]
        # The chosen token is always among them, in addition to the likeliest ones.
        tops: list[dict[str, float] | None] = [{**{t: v for _, t, v in item.top}, item.text: item.logprob} for item in items]
        if prompt_first and items:
            values[0] = tops[0] = None
        return {
            "tokens": [item.text for item in items],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class _Job:
    """One request's runs: `plans` × n, one after the other, all stopped when the client leaves."""

    def __init__(self, services: Services, body: Common, plans: list[Plan]) -> None:
        self._services = services
        self._model = _model_name(body.model) if body.model is not None else None
        self._plans = plans
        self._n = body.n or 1
        self._first: tuple[str, GenerationRequest] | None = None
        self._run: Run | None = None
        self._left = False
        self.model_id = ""
        self.runs: list[Run] = []

    async def check(self) -> None:
        """Everything that can be refused before the answer begins."""
        manager = self._services.manager
        resident = await manager.resolve(self._model)
        self.model_id = resident.model.id
        client = manager.client(resident.id)
        request = await self._plans[0].prepare(self._services, resident, client)
        self._first = (resident.id, request)
        for plan in self._plans[1:]:
            await plan.prepare(self._services, resident, client)

    async def choices(self) -> AsyncIterator[tuple[int, Plan, Run]]:
        """(index, plan, run started) for each choice."""
        for number, plan in enumerate(self._plans):
            for copy in range(self._n):
                if self._left:
                    return
                own = plan.for_choice(copy)
                run = self._services.runs.start(
                    self._preparer(own, first=number == copy == 0), self._model, warnings=list(plan.warnings), keep=False
                )
                self._run = run
                self.runs.append(run)
                yield number * self._n + copy, own, run

    def _preparer(self, plan: Plan, *, first: bool) -> Callable[[Resident, EngineClient], Any]:
        async def prepare(resident: Resident, client: EngineClient) -> GenerationRequest:
            self.model_id = resident.model.id
            if first and self._first is not None and self._first[0] == resident.id:
                return self._first[1]
            return await plan.prepare(self._services, resident, client)

        return prepare

    def leave(self) -> None:
        """The client has gone: nobody wants the rest."""
        self._left = True
        if self._run is not None:
            self._run.stop()

    def usage(self) -> dict[str, Any]:
        # The prompt counts once for its n choices, as OpenAI counts it.
        prompt = sum(run.usage.prompt_tokens for run in self.runs[:: self._n])
        completion = sum(run.usage.completion_tokens for run in self.runs)
        cached = sum(run.usage.cached_tokens for run in self.runs[:: self._n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def extension(self) -> dict[str, Any]:
        """Our own fields of the answer: what was applied, what was not."""
        receipts = [run.receipt for run in self.runs]
        warnings = list(dict.fromkeys(w for r in receipts if r for w in r["warnings"]))
        fields: dict[str, Any] = {"warnings": warnings, "receipt": receipts[0] if receipts else None}
        if len(receipts) > 1:
            fields["receipts"] = receipts
        return fields


async def _answer(services: Services, request: Request, body: Common, plans: list[Plan], form: _Format) -> Response:
    job = _Job(services, body, plans)
    # Loading a model for the request may take minutes: a client that gives up meanwhile must not hold its place.
    gone = asyncio.ensure_future(sse.until_disconnect(request.receive))
    checking = asyncio.ensure_future(job.check())
    try:
        await asyncio.wait([gone, checking], return_when=asyncio.FIRST_COMPLETED)
        if not checking.done():
            checking.cancel()
            await asyncio.wait([checking])
            return Response(status_code=499)
        checking.result()
        if body.stream:
            return _streamed(body, form, job)
        return await _whole(form, job, gone)
    finally:
        gone.cancel()


async def _whole(form: _Format, job: _Job, gone: asyncio.Future[None]) -> Response:
    gone.add_done_callback(lambda future: None if future.cancelled() else job.leave())
    choices = []
    async for index, plan, run in job.choices():
        items: list[TokenLogprob] = []
        if plan.logprobs is None:
            await run.wait()
        else:
            async for item in run.follow(coalesce_s=0):
                if type(item) is Delta:
                    items.extend(item.logprobs)
        _raise_failure(run)
        choice = {"index": index, **form.choice(plan.echo_text + run.text)}
        given = plan.logprobs is not None
        choice["logprobs"] = form.logprobs(items, run.text, 0, prompt_first=plan.echo) if given else None
        choice["finish_reason"] = run.finish_reason
        choices.append(choice)
    return JSONResponse(
        {
            "id": form.prefix + secrets.token_hex(12),
            "object": form.name,
            "created": int(time.time()),
            "model": job.model_id,
            "choices": choices,
            "usage": job.usage(),
            **job.extension(),
        }
    )


def _streamed(body: Common, form: _Format, job: _Job) -> Response:
    include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def produce(write: sse.Writer) -> None:
        begin = f'data: {{"id":"{form.prefix}{secrets.token_hex(12)}","object":"{form.chunk_name}","created":{int(time.time())},'

        def head() -> str:
            """Up to the choices. The model is known for certain once it was this request's turn."""
            return f'{begin}"model":{dumps(job.model_id)},"choices":['

        try:
            async for index, plan, run in job.choices():
                await _stream_choice(write, form, head, index, plan, run, include_usage=include_usage)
        except AppError as error:
            await write(sse.event(dumps(body_of(error))))
            return
        if include_usage:  # a last chunk without choices; clients that did not ask for it get none
            await write(f'{head()}],"usage":{dumps(job.usage())}}}\n\n'.encode())
        await write(sse.DONE)

    return _Stream(sse.EventStream(produce, on_disconnect=job.leave))


class _Stream(Response):
    """Lets FastAPI return an ASGI response that is no starlette Response."""

    def __init__(self, stream: sse.EventStream) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._stream(scope, receive, send)


async def _stream_choice(
    write: sse.Writer, form: _Format, head: Callable[[], str], index: int, plan: Plan, run: Run, *, include_usage: bool
) -> None:
    begin = ""
    nothing = ',"usage":null' if include_usage else ""
    end = f',"logprobs":null,"finish_reason":null}}]{nothing}}}\n\n'
    offset = 0
    async for item in run.follow(coalesce_s=0):
        if not begin and run.state != "queued" and run.error is None:
            begin = f'{head()}{{"index":{index},'
            opening = form.opening()
            if opening is not None:
                await write(f"{begin}{opening}{end}".encode())
            if plan.echo_text:
                await write(f"{begin}{form.delta(dumps(plan.echo_text))}{end}".encode())
        if type(item) is Delta:
            if item.logprobs:
                items, first = list(item.logprobs), plan.echo and offset == 0
                logprobs = dumps(form.logprobs(items, item.text, offset, prompt_first=first))
                offset += len(item.text)
                close = f',"logprobs":{logprobs},"finish_reason":null}}]{nothing}}}\n\n'
                await write(f"{begin}{form.delta(dumps(item.text))}{close}".encode())
            else:
                await write(f"{begin}{form.delta(dumps(item.text))}{end}".encode())
        elif type(item) is Status and item.state == "queued" and item.position:
            wait = "" if item.estimate_s is None else f", about {item.estimate_s:.0f} s"
            await write(sse.comment(f"position {item.position} in the queue{wait}"))
    _raise_failure(run)
    extension = f',"warnings":{dumps(run.receipt["warnings"])},"receipt":{dumps(run.receipt)}' if run.receipt else ""
    finish = f'{form.delta("")},"logprobs":null,"finish_reason":{dumps(run.finish_reason)}}}]{nothing}{extension}}}\n\n'
    await write(f"{begin}{finish}".encode())


def _raise_failure(run: Run) -> None:
    if run.error is not None:
        raise run.error
    if run.cancelled_by == "switch":
        raise Conflict("The model was taken out of service while it answered.", hint="Send the request again.")
    if run.cancelled_by == "shutdown":
        raise NoModelLoaded("The server was stopped while it answered.")


# --- models --------------------------------------------------------------------------------------------------------


def _model_name(name: str) -> str:
    if not name or len(name) > MAX_MODEL_NAME:
        raise ModelNotFound("There is no such model.", hint="GET /v1/models lists them.", param="model")
    return name


def _model_entry(services: Services, model: ModelFiles) -> dict[str, Any]:
    residents = [r for r in services.manager.residents() if r.model.id == model.id]
    resident = residents[-1] if residents else None
    spec = services.specs[resident.loader] if resident else None
    context = resident.info.context_length if resident and resident.info else model.context_length
    return {
        "id": model.id,
        "object": "model",
        "created": int(resident.loaded_at) if resident and resident.loaded_at else 0,
        "owned_by": "local",
        "state": resident.state if resident else ("unusable" if model.problem else "available"),
        "loader": resident.loader if resident else None,
        "format": model.format,
        "architecture": model.architecture,
        "quantization": model.quantization.method if model.quantization else None,
        "size_bytes": model.size_bytes,
        "context_length": context,
        "capabilities": sorted(spec.features) if spec else [],
    }


def _body_schema(model: Any) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(model)}}}}

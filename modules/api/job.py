"""One request's generations, free of any protocol: Turns in, answer events out.

A request is checked in full, its model resolved and its prompts prepared before the first byte of the answer, so that what can be
refused is refused with a status. Every generation is a Run, the same as the page's. A client that leaves stops its runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from modules.api import sse
from modules.api.answer import (
    AnswerEvent,
    AnswerReader,
    Finish,
    Outcome,
    Part,
    Queued,
    Reasoning,
    Started,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from modules.chat.turns import plain_text
from modules.errors import Conflict, ModelNotFound, NoModelLoaded, UnsupportedParameter
from modules.generation import Delta, Run, Status
from modules.schema import Usage

if TYPE_CHECKING:
    from starlette.requests import Request

    from modules.api.turn import Prepared, Turn
    from modules.engine_client import EngineClient
    from modules.residents import Resident
    from modules.schema import GenerationRequest, TokenLogprob
    from modules.services import Services

__all__ = [
    "Choice",
    "Finish",
    "Job",
    "Outcome",
    "Queued",
    "Reasoning",
    "Started",
    "Text",
    "ToolCallArguments",
    "ToolCallStart",
    "count_prompt",
    "meant",
    "prompt_tokens",
    "render_prompt",
    "respond",
]

MAX_MODEL_NAME = 512
# Choices that may run ahead of the one being sent, on a worker that has the slots.
AHEAD = 8


class Choice:
    """One answer of a request. Read it once, by `events` or by `outcome`."""

    def __init__(self, index: int, turn: Turn, model: str | None) -> None:
        self.index = index
        self.turn = turn
        self.model_id = model or ""
        self.prepared: Prepared | None = None
        self.run: Run | None = None

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """Queued*, Started, parts*, Finish. Raises AppError when the generation failed or its model was taken away."""
        run = self.run
        assert run is not None, "the job starts it"
        reader = AnswerReader()
        started = False
        texts: list[str] = []
        thoughts: list[str] = []
        logprobs: list[TokenLogprob] = []
        token_ids: list[int] = []
        waiting: tuple[TokenLogprob, ...] = ()
        async for item in run.follow(coalesce_s=0):
            if not started and run.state != "queued" and run.error is None:
                started = True
                yield Started()
                if self.prepared is not None:
                    reader = self.prepared.reader()
                    if self.prepared.echo_text:
                        texts.append(self.prepared.echo_text)
                        yield Text(self.prepared.echo_text)
            if type(item) is Delta:
                token_ids.extend(item.token_ids)
                if reader.plain:
                    if not (item.text or item.logprobs or self.turn.return_token_ids):
                        continue
                    texts.append(item.text)
                    logprobs.extend(item.logprobs)
                    yield Text(item.text, item.logprobs, item.token_ids)
                    continue
                waiting += item.logprobs
                for part in reader.feed(item.text):
                    if type(part) is Text and waiting:
                        logprobs.extend(waiting)
                        part, waiting = Text(part.text, waiting), ()
                    _collect(part, texts, thoughts)
                    yield part
            elif type(item) is Status and item.state == "queued" and item.position:
                yield Queued(item.position, item.estimate_s)
        _raise_failure(run)
        for part in reader.finish():
            _collect(part, texts, thoughts)
            yield part
        reason = run.finish_reason or "stop"
        if reader.calls and reason == "stop":
            reason = "tool_calls"
        yield Finish(
            Outcome(
                text="".join(texts),
                reasoning="".join(thoughts),
                tool_calls=list(reader.calls),
                logprobs=logprobs,
                finish_reason=reason,
                stop_match=run.stop_match,
                usage=run.usage,
                receipt=run.receipt or {},
                raw=run.text,
                token_ids=tuple(token_ids),
            )
        )

    async def outcome(self) -> Outcome:
        """The whole answer."""
        async for event in self.events():
            if type(event) is Finish:
                return event.outcome
        raise AssertionError("an answer ends with Finish")


def _collect(part: Part, texts: list[str], thoughts: list[str]) -> None:
    if type(part) is Text:
        texts.append(part.text)
    elif type(part) is Reasoning:
        thoughts.append(part.text)


class Job:
    """A request's choices: `turns` × n. Those of one request run in order, several at once where the worker has slots."""

    def __init__(self, services: Services, turns: Sequence[Turn], *, model: str | None = None, n: int = 1) -> None:
        self._services = services
        self._model = model_name(model) if model is not None else None
        self._turns = list(turns)
        self._n = n
        self._first: tuple[str, Prepared] | None = None
        self._started: list[Choice] = []
        self._ahead = 1
        self._left = False
        self.model_id = ""
        self.created = int(time.time())
        self.outcomes: list[Outcome] = []

    @property
    def runs(self) -> list[Run]:
        return [choice.run for choice in self._started if choice.run is not None]

    async def check(self) -> None:
        """Everything that can be refused before the answer begins."""
        manager = self._services.manager
        resident = await manager.resolve(self._model)
        self.model_id = resident.model.id
        self._ahead = max(1, min(self._services.specs[resident.loader].slots, AHEAD))
        client = manager.client(resident.id)
        prepared = await self._turns[0].prepare(self._services, resident, client)
        self._first = (resident.id, prepared)
        for turn in self._turns[1:]:
            await turn.prepare(self._services, resident, client)

    async def choices(self) -> AsyncIterator[Choice]:
        """Each choice, its run started."""
        todo = [(index, turn) for index, turn in enumerate(t for t in self._turns for _ in range(self._n))]
        waiting: list[Choice] = []
        while (todo or waiting) and not self._left:
            while todo and len(waiting) < self._ahead:
                index, turn = todo.pop(0)
                waiting.append(self._start(index, turn))
            yield waiting.pop(0)

    def _start(self, index: int, turn: Turn) -> Choice:
        choice = Choice(index, turn.for_choice(index % self._n), self._model)
        choice.run = self._services.runs.start(
            self._preparer(choice), self._model, warnings=list(choice.turn.warnings), keep=False
        )
        self._started.append(choice)
        return choice

    def _preparer(self, choice: Choice) -> Callable[[Resident, EngineClient], Awaitable[GenerationRequest]]:
        async def prepare(resident: Resident, client: EngineClient) -> GenerationRequest:
            self.model_id = choice.model_id = resident.model.id
            if choice.index == 0 and self._first is not None and self._first[0] == resident.id:
                choice.prepared = self._first[1]
            else:
                choice.prepared = await choice.turn.prepare(self._services, resident, client)
            if choice.run is not None:
                choice.run.warnings.extend(choice.prepared.warnings)
            return choice.prepared.request

        return prepare

    def leave(self) -> None:
        """The client has gone: nobody wants the rest."""
        self._left = True
        for run in self.runs:
            run.stop()

    def usage(self) -> Usage:
        """Over all choices. A prompt counts once for its n choices, as OpenAI counts it."""
        runs = self.runs
        return Usage(
            sum(run.usage.prompt_tokens for run in runs[:: self._n]),
            sum(run.usage.completion_tokens for run in runs),
            sum(run.usage.cached_tokens for run in runs[:: self._n]),
        )

    def extension(self) -> dict[str, Any]:
        """Our own fields of an answer: what was applied, what was not."""
        receipts = [run.receipt for run in self.runs]
        warnings = list(dict.fromkeys(w for r in receipts if r for w in r["warnings"]))
        fields: dict[str, Any] = {"warnings": warnings, "receipt": receipts[0] if receipts else None}
        if len(receipts) > 1:
            fields["receipts"] = receipts
        return fields


Whole = Callable[[Job], Awaitable["dict[str, Any] | Response"]]
Stream = Callable[[Job, sse.Writer], Awaitable[None]]


async def respond(request: Request, job: Job, *, whole: Whole, stream: Stream | None = None, content_type: str = "") -> Response:
    """Check the job, then answer in one piece by `whole`, or by `stream` where that is given. A client that leaves at any time
    ends the job. What fails inside `stream` after its first byte is for it to tell in its protocol's way."""
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
        if stream is not None:
            produce = stream
            return StreamResponse(
                sse.EventStream(lambda write: produce(job, write), on_disconnect=job.leave, content_type=content_type)
            )
        gone.add_done_callback(lambda future: None if future.cancelled() else job.leave())
        answer = await whole(job)
        return answer if isinstance(answer, Response) else JSONResponse(answer)
    finally:
        gone.cancel()


class StreamResponse(Response):
    """Lets FastAPI return an ASGI response that is no starlette Response."""

    def __init__(self, stream: sse.EventStream) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._stream(scope, receive, send)


async def meant(services: Services, model: str | None) -> Resident:
    """The model a request names, loaded if need be, else the active one. Raises ModelNotFound, NoModelLoaded."""
    return await services.manager.resolve(model_name(model) if model is not None else None)


async def _prepared(services: Services, turn: Turn, model: str | None) -> tuple[Prepared, EngineClient]:
    resident = await meant(services, model)
    client = services.manager.client(resident.id)
    return await turn.prepare(services, resident, client), client


async def count_prompt(services: Services, turn: Turn, model: str | None) -> int:
    """How many tokens this turn's prompt has; close to it where a remote server renders the messages itself."""
    prepared, client = await _prepared(services, turn, model)
    if prepared.token_ids is not None:
        return len(prepared.token_ids)
    if prepared.chat is not None:
        try:
            return await client.count(await client.render(prepared.chat))
        except UnsupportedParameter:
            return await client.count(plain_text(prepared.chat.messages))
    images = len(prepared.images) * (client.info.image_tokens if client.info is not None else 0)
    return images + await client.count(prepared.prompt or "", turn.add_special and turn.messages is None)


async def prompt_tokens(services: Services, choice: Choice) -> list[int]:
    """The tokens of a started answer's prompt, before the worker has counted them."""
    made, run = choice.prepared, choice.run
    if made is None or run is None or run.resident is None:
        return []
    if made.chat is not None:
        client = services.manager.client(run.resident.id)
        return await client.encode(await client.render(made.chat), False)
    if made.token_ids is not None:
        return list(made.token_ids)
    add_special = made.turn.add_special and made.turn.messages is None
    return await services.manager.client(run.resident.id).encode(made.prompt or "", add_special)


async def render_prompt(services: Services, turn: Turn, model: str | None) -> str:
    """The text that the model would be given for this turn."""
    prepared, client = await _prepared(services, turn, model)
    if prepared.chat is not None:
        return await client.render(prepared.chat)
    return prepared.prompt if prepared.prompt is not None else await client.decode(prepared.token_ids or (), False)


def model_name(name: str) -> str:
    """A name fit to be looked for. Raises ModelNotFound."""
    if not name or len(name) > MAX_MODEL_NAME:
        raise ModelNotFound("There is no such model.", hint="GET /v1/models lists them.", param="model")
    return name


def _raise_failure(run: Run) -> None:
    if run.error is not None:
        raise run.error
    if run.cancelled_by == "switch":
        raise Conflict("The model was taken out of service while it answered.", hint="Send the request again.")
    if run.cancelled_by == "shutdown":
        raise NoModelLoaded("The server was stopped while it answered.")

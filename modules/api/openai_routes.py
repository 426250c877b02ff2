"""OpenAI's endpoints: models, chat completions, completions. Responses and embeddings have files of their own."""

from __future__ import annotations

import asyncio
import functools
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.job import Job, model_name, respond
from modules.api.openai_answers import ChatForm, CompletionForm, Form, Streamer, whole
from modules.api.openai_models import ChatRequest, Common, CompletionRequest, parse
from modules.api.openai_turns import chat_turn, completion_turns
from modules.chat.vision import sees
from modules.errors import NotSupported, UnsupportedParameter
from modules.schema import features_of

if TYPE_CHECKING:
    from modules.api.turn import Turn
    from modules.residents import Resident
    from modules.schema import ModelFiles
    from modules.services import Services

# What OpenAI has and a text generation server does not: clients get a typed answer instead of "not found".
_NOT_HERE = {
    "/audio/speech": "Speech",
    "/audio/transcriptions": "Transcription",
    "/audio/translations": "Translation of speech",
    "/images/generations": "Making images",
    "/images/edits": "Editing images",
    "/images/variations": "Making images",
    "/moderations": "Moderation",
}


def build_router(services: Services) -> APIRouter:
    """The routes over these services."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    strict = services.config.strict_parameters

    @router.get("/models")
    async def list_models() -> JSONResponse:
        """Every local model with its state and capabilities."""
        models = await asyncio.to_thread(services.library.list)
        data = [model_entry(services, model) for model in models]
        # The last three are Anthropic's: its clients ask the same address.
        ends = {"has_more": False, "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        """One local model."""
        model = await asyncio.to_thread(services.library.find, model_name(name))
        return JSONResponse(model_entry(services, model))

    @router.post("/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat(request: Request) -> Response:
        """An answer to a conversation; streamed with `stream: true`."""
        body = parse(ChatRequest, await read_object(request))
        return await _answer(services, request, body, [chat_turn(body, strict=strict)], ChatForm())

    @router.post("/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        """The continuation of a text, of several texts, or of token ids."""
        body = parse(CompletionRequest, await read_object(request))
        turns = completion_turns(body, strict=strict)
        n, best_of = body.n or 1, body.best_of or 1
        if best_of <= n:
            return await _answer(services, request, body, turns, CompletionForm())
        if body.echo or body.logprobs is not None:
            raise UnsupportedParameter("best_of above n can't be used with echo or logprobs.", param="best_of")
        for turn in turns:
            turn.logprobs = 0  # they tell which answer is the best
        job = Job(services, turns, model=body.model, n=best_of)
        return await respond(request, job, whole=functools.partial(whole, form=CompletionForm(), best=(n, best_of)))

    def refuse(path: str, what: str) -> None:
        async def refused(request: Request) -> Response:
            raise NotSupported(f"{what} is not supported: this server makes text.")

        router.add_api_route(path, refused, methods=["POST"], name=f"refuse {path}", summary=f"Not supported: {what}.")

    for path, what in _NOT_HERE.items():
        refuse(path, what)
    return router


async def _answer(services: Services, request: Request, body: Common, turns: list[Turn], form: Form) -> Response:
    job = Job(services, turns, model=body.model, n=body.n or 1)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    stream = Streamer(form, include_usage=include_usage) if body.stream else None
    return await respond(request, job, whole=functools.partial(whole, form=form), stream=stream)


def model_entry(services: Services, model: ModelFiles) -> dict[str, Any]:
    """A model as /v1/models lists it: OpenAI's fields, Anthropic's, ours. Capabilities are the loader's that has it, or would."""
    residents = [r for r in services.manager.residents() if r.model.id == model.id]
    resident = residents[-1] if residents else None
    spec = services.specs[resident.loader] if resident else _usual_spec(services, model)
    context = resident.info.context_length if resident and resident.info else model.context_length
    created = int(resident.loaded_at) if resident and resident.loaded_at else 0
    return {
        "id": model.id,
        "object": "model",
        "created": created,
        "owned_by": "local",
        "type": "model",
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(created, timezone.utc).isoformat().replace("+00:00", "Z"),
        "state": resident.state if resident else ("unusable" if model.problem else "available"),
        "loader": resident.loader if resident else None,
        "format": model.format,
        "architecture": model.architecture,
        "quantization": model.quantization.method if model.quantization else None,
        "size_bytes": model.size_bytes,
        "context_length": context,
        "capabilities": capabilities(spec, model, resident),
        "vocab_size": resident.info.vocab_size if resident and resident.info else model.vocab_size,
        "eos_token_ids": resident.info.eos_token_ids if resident and resident.info else (),
    }


def capabilities(spec: Any, model: ModelFiles, resident: Resident | None) -> list[str]:
    """The loader's features; vision only of a model that sees."""
    features = set(features_of(spec, resident.info if resident else None)) if spec else set()
    return sorted(features if sees(model, resident) else features - {"vision"})


def _usual_spec(services: Services, model: ModelFiles) -> Any:
    """The loader that would take it: the one it was last used with, else the first for its format."""
    usual = services.model_settings.loader(model.id)
    if usual in services.specs:
        return services.specs[usual]
    able = [spec for spec in services.specs.values() if model.format in spec.formats]
    return max(able, key=lambda spec: spec.formats[model.format], default=None)

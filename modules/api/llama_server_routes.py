"""llama-server's own addresses: /props, /slots, /tokenize, /detokenize, /apply-template, /completion, /infill, /embedding.

/health and /metrics are this server's, readable by llama-server's clients too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules.api import llama_server_models as models
from modules.api import sse
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.dialects import error_body
from modules.api.embeddings import vectors_of
from modules.api.job import Finish, Job, Queued, Text, meant, render_prompt, respond
from modules.api.openai_models import ChatRequest, parse
from modules.api.openai_turns import chat_turn
from modules.errors import AppError, InvalidParameter, NoModelLoaded, NotSupported
from modules.sampling import neutral_values

if TYPE_CHECKING:
    from modules.api.job import Choice, Outcome
    from modules.residents import Resident
    from modules.services import Services

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def build_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["llama-server"])
    _add_information(router, services)
    _add_text(router, services)
    strict = services.config.strict_parameters

    @router.post("/completion", openapi_extra=body_schema(models.CompletionRequest))
    @router.post("/completions", include_in_schema=False)
    async def completion(request: Request) -> Response:
        """The continuation of a prompt, of several, or of token ids."""
        body = parse(models.CompletionRequest, await read_object(request))
        turns = models.completion_turns(body, strict=strict)
        if body.stream and len(turns) > 1:
            raise InvalidParameter("Several prompts can't be streamed at once.", param="stream")
        several = isinstance(body.prompt, list) and len(turns) > 1
        return await _answer(services, request, Job(services, turns, model=body.model), body, several=several)

    @router.post("/infill", openapi_extra=body_schema(models.InfillRequest))
    async def infill(request: Request) -> Response:
        """What belongs between `input_prefix` and `input_suffix`, by a model that was trained for it."""
        body = parse(models.InfillRequest, await read_object(request))
        job = Job(services, [models.infill_turn(body, strict=strict)], model=body.model)
        return await _answer(services, request, job, body, several=False)

    @router.post("/embedding", openapi_extra=body_schema(models.EmbeddingRequest, samplers=False))
    @router.post("/embeddings", include_in_schema=False)
    async def embedding(request: Request) -> JSONResponse:
        """One vector for each text."""
        body = parse(models.EmbeddingRequest, await read_object(request))
        given = body.content if body.content is not None else body.input
        if given is None:
            raise InvalidParameter("content is missing.", param="content")
        made = await vectors_of(services, body.model, [given] if isinstance(given, str) else list(given))
        return JSONResponse([{"index": index, "embedding": [vector]} for index, vector in enumerate(made.vectors)])

    @router.post("/rerank", include_in_schema=False)
    @router.post("/reranking", include_in_schema=False)
    async def rerank() -> Response:
        raise NotSupported("No backend here ranks documents.")

    return router


async def _answer(services: Services, request: Request, job: Job, body: models.CompletionRequest, *, several: bool) -> Response:
    async def whole(job: Job) -> Response:
        results = [_result(job, choice, await choice.outcome(), body) async for choice in job.choices()]
        return JSONResponse(results if several else results[0])

    async def stream(job: Job, write: sse.Writer) -> None:
        try:
            async for choice in job.choices():
                await _stream(job, choice, body, write)
        except AppError as error:
            await write(sse.event(dumps(error_body(error, "/completion"))))

    return await respond(request, job, whole=whole, stream=stream if body.stream else None)


def _result(
    job: Job, choice: Choice, outcome: Outcome, body: models.CompletionRequest, *, text: str | None = None
) -> dict[str, Any]:
    run = choice.run
    assert run is not None
    usage = outcome.usage
    result: dict[str, Any] = {
        "index": choice.index,
        "content": outcome.text if text is None else text,
        "tokens": [item.token_id for item in outcome.logprobs] if body.return_tokens else [],
        "id_slot": 0,
        "stop": True,
        "model": job.model_id,
        "tokens_predicted": usage.completion_tokens,
        "tokens_evaluated": usage.prompt_tokens,
        "tokens_cached": usage.prompt_tokens + usage.completion_tokens,
        "generation_settings": {**outcome.receipt.get("applied", {}), "seed": outcome.receipt.get("seed")},
        "prompt": choice.turn.prompt or "",
        "has_new_line": "\n" in outcome.text,
        "truncated": False,
        **models.ending(outcome),
        "timings": models.timings_of(run),
        **job.extension(),
    }
    if outcome.logprobs:
        result["completion_probabilities"] = models.probabilities(outcome.logprobs)
    return result


async def _stream(job: Job, choice: Choice, body: models.CompletionRequest, write: sse.Writer) -> None:
    run = choice.run
    assert run is not None
    async for event in choice.events():
        if isinstance(event, Text) and (event.text or event.logprobs):
            piece: dict[str, Any] = {"index": choice.index, "content": event.text, "tokens": [], "stop": False, "id_slot": 0}
            piece["tokens_predicted"] = run.completion_tokens
            piece["tokens_evaluated"] = run.prefill[1] if run.prefill else 0
            if event.logprobs:
                piece["completion_probabilities"] = models.probabilities(event.logprobs)
            await write(sse.event(dumps(piece)))
        elif isinstance(event, Queued):
            await write(sse.comment(f"position {event.position} in the queue"))
        elif isinstance(event, Finish):
            end = _result(job, choice, event.outcome, body, text="")
            end.pop("completion_probabilities", None)
            await write(sse.event(dumps(end)))


# --- what is there -------------------------------------------------------------------------------------------------


def _active(services: Services) -> Resident:
    active = services.manager.active()
    if active is None or active.info is None:
        raise NoModelLoaded("No model is loaded.", hint="Load one in the web page's model menu.")
    return active


def _add_information(router: APIRouter, services: Services) -> None:
    @router.get("/props")
    async def props() -> JSONResponse:
        """The loaded model and its chat template."""
        active = _active(services)
        info = active.info
        assert info is not None
        defaults = {**neutral_values(), **models.DEFAULTS}
        return JSONResponse(
            {
                "default_generation_settings": {"id": 0, "n_ctx": info.context_length, "params": defaults},
                "total_slots": services.specs[active.loader].slots,
                "model_alias": active.model.id,
                "model_path": active.model.id,
                "modalities": {"vision": info.image_token is not None, "audio": False},
                "chat_template": services.chat_template(active) or "",
                "bos_token": info.bos_token or "",
                "eos_token": info.eos_token or "",
                "build_info": f"Switchyard, {info.engine or active.loader}",
            }
        )

    @router.post("/props", include_in_schema=False)
    async def set_props() -> Response:
        raise NotSupported("Properties are set where the model is loaded.")

    @router.get("/slots")
    async def slots() -> JSONResponse:
        """Each place of the loaded model for a generation, and whether it is taken. Prompts are not shown."""
        active = _active(services)
        context = active.info.context_length if active.info else 0
        count = services.specs[active.loader].slots
        rows = [
            {"id": n, "n_ctx": context, "speculative": False, "is_processing": n < active.active_requests} for n in range(count)
        ]
        return JSONResponse(rows)

    @router.get("/lora-adapters", include_in_schema=False)
    async def adapters() -> JSONResponse:
        active = _active(services)
        return JSONResponse(
            [{"id": n, "path": _last(path), "scale": 1.0} for n, path in enumerate(active.options.get("lora") or ())]
        )


def _last(path: str) -> str:
    return str(path).replace("\\", "/").rpartition("/")[2]


def _add_text(router: APIRouter, services: Services) -> None:
    @router.post("/tokenize", openapi_extra=body_schema(models.TokenizeRequest, samplers=False))
    async def tokenize(request: Request) -> JSONResponse:
        """The token ids of a text, with their pieces if wanted; by the model named, else the active one."""
        body = parse(models.TokenizeRequest, await read_object(request))
        client = services.manager.client((await meant(services, body.model)).id)
        ids = await client.encode(body.content, body.add_special)
        if not body.with_pieces:
            return JSONResponse({"tokens": ids})
        if len(ids) > 4096:
            raise InvalidParameter("Pieces are given for at most 4096 tokens.", param="with_pieces")
        return JSONResponse({"tokens": [{"id": token, "piece": await client.decode([token], False)} for token in ids]})

    @router.post("/detokenize", openapi_extra=body_schema(models.DetokenizeRequest, samplers=False))
    async def detokenize(request: Request) -> JSONResponse:
        """The text of token ids."""
        body = parse(models.DetokenizeRequest, await read_object(request))
        active = await meant(services, body.model)
        vocabulary = (active.info.vocab_size if active.info else 0) or 2**31
        if any(not 0 <= token < vocabulary for token in body.tokens):
            raise InvalidParameter("A token id is outside the model's vocabulary.", param="tokens")
        return JSONResponse({"content": await services.manager.client(active.id).decode(body.tokens, False)})

    @router.post("/apply-template", openapi_extra=body_schema(ChatRequest))
    async def apply_template(request: Request) -> JSONResponse:
        """The prompt that the model would be given for these messages."""
        body = parse(ChatRequest, await read_object(request))
        turn = chat_turn(body, strict=services.config.strict_parameters)
        return JSONResponse({"prompt": await render_prompt(services, turn, body.model)})

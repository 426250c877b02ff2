"""text-generation-webui's own addresses under /v1/internal, with its bodies, and the queue.

Where it says "OK", so do we. Unlike there, stop-generation stops one request, or the caller's own, never everybody's.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from modules import caller
from modules.api import internal_models as models
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.internal_downloads import add_downloads
from modules.api.job import Job, meant, render_prompt, respond
from modules.api.model_view import model_views
from modules.api.openai_models import ChatRequest, parse
from modules.api.openai_turns import chat_turn
from modules.api.turn import Turn, split_extras
from modules.errors import InvalidParameter, NoModelLoaded, UnsupportedParameter
from modules.plan.service import answer_plan
from modules.schema import StopParams

if TYPE_CHECKING:
    from modules.engine_client import EngineClient
    from modules.generation import Run
    from modules.residents import Resident
    from modules.services import Services

OK = "OK"
WARNINGS = "X-Switchyard-Warnings"


def build_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/internal", tags=["Internal"])
    _add_text(router, services)
    _add_generation(router, services)
    _add_models(router, services)
    add_downloads(router, services)
    _add_loras(router, services)
    return router


def _active(services: Services) -> tuple[Resident, EngineClient]:
    active = services.manager.active()
    if active is None:
        raise NoModelLoaded("No model is loaded.", hint="Load one in the web page's model menu.")
    return active, services.manager.client(active.id)


def _add_text(router: APIRouter, services: Services) -> None:
    @router.post("/encode", openapi_extra=body_schema(models.TextRequest, samplers=False))
    async def encode(request: Request) -> JSONResponse:
        """The token ids of a text, as a prompt has them (with BOS where the model has one)."""
        body = parse(models.TextRequest, await read_object(request))
        ids = await services.manager.client((await meant(services, body.model)).id).encode(body.text, True)
        return JSONResponse({"tokens": ids, "length": len(ids)})

    @router.post("/decode", openapi_extra=body_schema(models.TokensRequest, samplers=False))
    async def decode(request: Request) -> JSONResponse:
        """The text of token ids."""
        body = parse(models.TokensRequest, await read_object(request))
        resident = await meant(services, body.model)
        client = services.manager.client(resident.id)
        vocabulary = (resident.info.vocab_size if resident.info else 0) or 2**31
        if any(not 0 <= token < vocabulary for token in body.tokens):
            raise InvalidParameter("A token id is outside the model's vocabulary.", param="tokens")
        return JSONResponse({"text": await client.decode(body.tokens)})

    @router.post("/token-count", openapi_extra=body_schema(models.TextRequest, samplers=False))
    async def token_count(request: Request) -> JSONResponse:
        """How many tokens a text has."""
        body = parse(models.TextRequest, await read_object(request))
        resident = await meant(services, body.model)
        return JSONResponse({"length": await services.manager.client(resident.id).count(body.text, True)})

    @router.post("/chat-prompt", openapi_extra=body_schema(ChatRequest))
    async def chat_prompt(request: Request) -> JSONResponse:
        """The prompt that the model would be given for a chat request."""
        body = parse(ChatRequest, await read_object(request))
        turn = chat_turn(body, strict=services.config.strict_parameters)
        return JSONResponse({"prompt": await render_prompt(services, turn, body.model)})


def _add_generation(router: APIRouter, services: Services) -> None:
    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether the server answers; /health says whether a model does."""
        return JSONResponse({"status": "ok"})

    @router.post("/logits", openapi_extra=body_schema(models.LogitsRequest))
    async def logits(request: Request) -> Response:
        """The likeliest next tokens of a prompt and their probabilities, before any sampler."""
        body = parse(models.LogitsRequest, await read_object(request))
        if body.use_samplers:
            raise UnsupportedParameter(
                "The probabilities after samplers are not given.", hint="Leave use_samplers out.", param="use_samplers"
            )
        split_extras(body.model_extra or {})
        turn = Turn({}, StopParams(max_tokens=1), prompt=body.prompt, logprobs=body.top_logits or 50)

        async def whole(job: Job) -> dict[str, Any]:
            async for choice in job.choices():
                outcome = await choice.outcome()
                top = outcome.logprobs[0].top if outcome.logprobs else ()
                return {"logits": {text: math.exp(value) for _, text, value in top}}
            return {"logits": {}}

        return await respond(request, Job(services, [turn]), whole=whole)

    @router.post("/stop-generation", openapi_extra=body_schema(models.StopRequest, samplers=False, required=False))
    async def stop_generation(request: Request) -> JSONResponse:
        """Stop the request with this `id`; without one, all that the same program (address, key, User-Agent) has running."""
        body = parse(models.StopRequest, await read_object(request)) if await request.body() else None
        asking = caller.current()
        for run in services.runs.running():
            if _meant(run, body.id if body else None, asking):
                run.stop()
        return JSONResponse(OK)

    @router.get("/queue")
    async def queue() -> JSONResponse:
        """Who waits and who runs: model, place in the queue (1 is next), estimate in seconds, tokens so far."""
        return JSONResponse(
            {
                "running": [_entry(run) for run in services.runs.running() if run.state != "queued"],
                "queued": [_entry(run) for run in services.runs.running() if run.state == "queued"],
                "models": [
                    {"model": r.model.id, "state": r.state, "active": r.active_requests, "queued": r.queued}
                    for r in services.manager.residents()
                ],
            }
        )


def _meant(run: Run, wanted: str | None, asking: caller.Caller) -> bool:
    """A key stops what was asked with it, whichever id is guessed."""
    if run.caller.key != asking.key:
        return False
    if wanted is None:
        return run.caller.same_program(asking)
    return wanted == run.id or wanted.rpartition("-")[2].rpartition("_")[2] == run.caller.request_id


def _entry(run: Run) -> dict[str, Any]:
    return {
        "id": run.caller.request_id,
        "model": run.resident.model.id if run.resident is not None else run.model_id,
        "state": run.state,
        "position": run.position,
        "estimate_s": run.estimate_s,
        "prompt_tokens": run.prefill[1] if run.prefill else None,
        "completion_tokens": run.completion_tokens,
        "created_at": run.created_at,
    }


# --- models --------------------------------------------------------------------------------------------------------


def _add_models(router: APIRouter, services: Services) -> None:
    manager = services.manager

    @router.get("/model/info")
    async def info() -> JSONResponse:
        """The active model."""
        active = manager.active()
        if active is None:
            return JSONResponse({"model_name": "None", "lora_names": [], "loader": None})
        loras = [_last(path) for path in active.options.get("lora") or ()]
        return JSONResponse({"model_name": active.model.id, "lora_names": loras, "loader": active.loader})

    @router.get("/model/list")
    async def list_models() -> JSONResponse:
        """Every local model: `models` with format, size, quantization, context, licence, chat template, and for each backend
        whether it takes the model and why not; `model_names` are those that can be loaded. Needs an admin key if there are any.
        """
        found = await asyncio.to_thread(model_views, services)
        return JSONResponse({"model_names": [model["id"] for model in found if not model["problem"]], "models": found})

    @router.get("/model/plan")
    async def plan(model: str) -> JSONResponse:
        """What fits on this machine for one local model: backend, quantisation, context, cache, memory, speed, ready options; the
        best first. Read from headers; nothing is loaded."""
        return JSONResponse(await answer_plan(services, model))

    @router.post("/model/load", openapi_extra=body_schema(models.LoadRequest, samplers=False))
    async def load(request: Request) -> JSONResponse:
        """Load a model and wait until it is ready. Options that a request leaves out come from the saved settings."""
        body = parse(models.LoadRequest, await read_object(request))
        args = dict(body.args or {})
        loader = models.loader_of(args.pop("loader", None), services.specs)
        options: dict[str, Any] | None = None
        warnings: list[str] = []
        if args:
            if loader is None:
                loader = await asyncio.to_thread(_usual_loader, services, body.model_name)
            options, warnings = models.options_of(args, services.specs[loader])
        for name in ("settings", "instruction_template", "instruction_template_str"):
            if getattr(body, name):
                warnings.append(f"{name} has no effect: generation parameters belong to each request.")
        await manager.load(body.model_name, loader, options, anyway=body.anyway)
        return JSONResponse(OK, headers={WARNINGS: " ".join(warnings).encode("ascii", "replace").decode()} if warnings else None)

    @router.post("/model/unload")
    async def unload() -> JSONResponse:
        """Unload the active model and wait until its process is gone."""
        if manager.residents():
            await manager.unload()
        return JSONResponse(OK)


def _usual_loader(services: Services, model: str) -> str:
    """The loader whose options the request means: the remembered one, else the best."""
    from modules.registry import select

    files = services.library.find(model)
    usual = services.model_settings.loader(files.id)
    if usual is not None and usual in services.specs:
        return usual
    return select(files, services.specs.values(), services.overlays).name


def _last(path: str) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]


# --- LoRA ----------------------------------------------------------------------------------------------------------


def _add_loras(router: APIRouter, services: Services) -> None:
    folder = services.config.lora_dir

    async def apply(names: list[str]) -> JSONResponse:
        """The model is loaded again with these adapters and no others."""
        active, _ = _active(services)
        models.require_lora(services.specs[active.loader])
        paths = await asyncio.to_thread(models.lora_paths, names, folder)
        await services.manager.load(active.model.id, active.loader, {**active.options, "lora": paths})
        return JSONResponse(OK)

    @router.get("/lora/list")
    async def list_loras() -> JSONResponse:
        """The adapters under --lora-dir."""
        found = await asyncio.to_thread(_loras, folder)
        return JSONResponse({"lora_names": found})

    @router.post("/lora/load", openapi_extra=body_schema(models.LoraRequest, samplers=False))
    async def load(request: Request) -> JSONResponse:
        """Apply these adapters, and no others, to the active model, which is loaded again for it."""
        return await apply(parse(models.LoraRequest, await read_object(request)).lora_names)

    @router.post("/lora/unload")
    async def unload() -> JSONResponse:
        """Take every adapter off the active model."""
        return await apply([])


def _loras(folder: Any) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        item.name for item in folder.iterdir() if not item.name.startswith(".") and (item.is_dir() or item.suffix == ".gguf")
    )

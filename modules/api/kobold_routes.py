"""KoboldAI's API as KoboldCpp extends it: /api/v1 and /api/extra. Prompts are raw text; the client applies any template."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from modules import caller
from modules.api import sse
from modules.api.body import read_object
from modules.api.body_schema import body_schema
from modules.api.dialects import error_body
from modules.api.foreign_fields import llama_sampling
from modules.api.job import Finish, Job, Queued, Text, respond
from modules.api.openai_models import check_stops, parse
from modules.api.turn import Turn
from modules.errors import AppError, InvalidParameter, NoModelLoaded, UnsupportedParameter
from modules.schema import StopParams, features_of
from modules.structured import check_gbnf

if TYPE_CHECKING:
    from modules.api.job import Outcome
    from modules.generation import Run
    from modules.residents import Resident
    from modules.services import Services

API_VERSION = "1.2.5"  # KoboldAI's
CPP_VERSION = "1.86"  # the KoboldCpp whose API this is
DEFAULT_LENGTH = 512
# KoboldCpp's own defaults of what its clients leave out.
DEFAULTS = {"temperature": 0.75, "top_k": 100, "top_p": 0.92}
NO_EFFECT = {
    "max_context_length": "",
    "rep_pen_slope": "has no effect here.",
    "grammar_retain_state": "",
    "quiet": "",
    "use_default_badwordsids": "",
    "use_story": "",
    "use_memory": "",
    "use_authors_note": "",
    "use_world_info": "",
    "use_userscripts": "",
    "soft_prompt": "",
    "disable_input_formatting": "",
    "disable_output_formatting": "",
    "frmttriminc": "",
    "frmtrmblln": "",
    "frmtrmspch": "",
    "frmtadsnsp": "",
    "singleline": "",
    "bypass_eos": "",
    "render_special": "",
    "sampler_full_determinism": "",
    "using_openai_tools": "",
    "replace_instruct_placeholders": "",
    "model": "",
    "banned_tokens": "has no effect here; use logit_bias.",
    "banned_strings": "has no effect here; use stop_sequence.",
}
MAX_KEYS = 256  # generations that can still be asked for by their key


class GenerateRequest(BaseModel):
    """Sampling parameters come beside these, under KoboldAI's names or any other of ours."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    prompt: str
    memory: str | None = None
    max_length: int | None = Field(None, ge=1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=8)
    stop_sequence: Any = None
    trim_stop: bool | None = None
    grammar: str | None = None
    genkey: str | None = Field(None, max_length=200)
    logprobs: bool | None = None
    images: list[str] | None = None


class KeyRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    genkey: str | None = Field(None, max_length=200)


class CountRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str
    special: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    ids: list[int] = Field(max_length=1_000_000)


class Sessions:
    """Which generation a client means by its `genkey`. Without a key, a program means its own latest one."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], Job] = {}
        self.last: Run | None = None
        self.total = 0

    def begin(self, key: str | None, job: Job) -> None:
        if len(self._by_key) >= MAX_KEYS:
            self._by_key.pop(next(iter(self._by_key)))
        self._by_key[self._name(key)] = job
        self.total += 1

    def find(self, key: str | None) -> Run | None:
        job = self._by_key.get(self._name(key))
        return job.runs[-1] if job is not None and job.runs else None

    def stop(self, key: str | None) -> bool:
        """Whether there was something to stop."""
        job = self._by_key.get(self._name(key))
        if job is None or all(run.done for run in job.runs):
            return False
        job.leave()
        return True

    @staticmethod
    def _name(key: str | None) -> tuple[str, str]:
        if key:
            return (caller.current().key, key)
        now = caller.current()
        return (now.key, f"\0{now.client}\0{now.agent}")


def build_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/api", tags=["KoboldAI"])
    sessions = Sessions()
    _add_information(router, services)
    _add_counting(router, services)
    _add_control(router, services, sessions)

    @router.post("/v1/generate", openapi_extra=body_schema(GenerateRequest))
    async def generate(request: Request) -> Response:
        """The continuation of a prompt, in one piece."""
        body = parse(GenerateRequest, await read_object(request))
        job = Job(services, [_turn(body, services)], n=body.n or 1)
        sessions.begin(body.genkey, job)
        return await respond(request, job, whole=lambda job: _whole(job, body, sessions))

    @router.post("/extra/generate/stream", openapi_extra=body_schema(GenerateRequest))
    async def stream(request: Request) -> Response:
        """The continuation of a prompt as server-sent events."""
        body = parse(GenerateRequest, await read_object(request))
        job = Job(services, [_turn(body, services)])
        sessions.begin(body.genkey, job)

        async def produce(job: Job, write: sse.Writer) -> None:
            await _stream(job, write, body, sessions)

        return await respond(request, job, whole=lambda job: _whole(job, body, sessions), stream=produce)

    return router


def _turn(body: GenerateRequest, services: Services) -> Turn:
    if body.images:
        raise UnsupportedParameter("Images can't be read by this model.", param="images")
    values, warnings = llama_sampling({**DEFAULTS, **(body.model_extra or {})}, NO_EFFECT)
    stops = check_stops(body.stop_sequence or None, "stop_sequence")
    limit = body.max_length or DEFAULT_LENGTH
    stop = StopParams(max_tokens=limit, stop=stops, ignore_eos=bool(values.get("ban_eos_token")))
    turn = Turn(values, stop, warnings, services.config.strict_parameters, prompt=(body.memory or "") + body.prompt)
    turn.grammar = check_gbnf(body.grammar) if body.grammar else None
    turn.logprobs = 5 if body.logprobs else None
    return turn


def _text(outcome: Outcome, body: GenerateRequest) -> str:
    """KoboldCpp leaves the stop sequence in the text unless it is told to trim it."""
    return outcome.text + (outcome.stop_match or "" if body.trim_stop is False else "")


def _logprobs(outcome: Outcome) -> dict[str, Any] | None:
    if not outcome.logprobs:
        return None
    content = [
        {"token": item.text, "logprob": item.logprob, "top_logprobs": [{"token": t, "logprob": v} for _, t, v in item.top]}
        for item in outcome.logprobs
    ]
    return {"content": content}


async def _whole(job: Job, body: GenerateRequest, sessions: Sessions) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    async for choice in job.choices():
        outcome = await choice.outcome()
        sessions.last = choice.run
        results.append(
            {
                "text": _text(outcome, body),
                "tool_calls": [],
                "finish_reason": "length" if outcome.finish_reason == "length" else "stop",
                "logprobs": _logprobs(outcome),
                "prompt_tokens": outcome.usage.prompt_tokens,
                "completion_tokens": outcome.usage.completion_tokens,
            }
        )
    return {"results": results, **job.extension()}


async def _stream(job: Job, write: sse.Writer, body: GenerateRequest, sessions: Sessions) -> None:
    def event(token: str, reason: str | None, **more: Any) -> bytes:
        return sse.event(json.dumps({"token": token, "finish_reason": reason, **more}, ensure_ascii=False), "message")

    try:
        async for choice in job.choices():
            async for item in choice.events():
                if isinstance(item, Text) and item.text:
                    await write(event(item.text, None))
                elif isinstance(item, Queued):
                    await write(sse.comment(f"position {item.position} in the queue"))
                elif isinstance(item, Finish):
                    sessions.last = choice.run
                    reason = "length" if item.outcome.finish_reason == "length" else "stop"
                    rest = _text(item.outcome, body)[len(item.outcome.text) :]
                    await write(event(rest, reason, **job.extension()))
    except AppError as error:
        await write(sse.event(json.dumps(error_body(error, "/api/extra/generate/stream")), "error"))


# --- what is there -------------------------------------------------------------------------------------------------


def _active(services: Services) -> Resident:
    active = services.manager.active()
    if active is None or active.info is None:
        raise NoModelLoaded("No model is loaded.", hint="Load one in the web page's model menu.")
    return active


def _context(services: Services) -> int:
    active = services.manager.active()
    return active.info.context_length if active is not None and active.info is not None else 0


def _add_information(router: APIRouter, services: Services) -> None:
    @router.get("/v1/model")
    async def model() -> JSONResponse:
        """The model that answers."""
        active = services.manager.active()
        return JSONResponse({"result": f"koboldcpp/{active.model.id}" if active is not None else "inactive"})

    @router.get("/v1/info/version")
    @router.get("/latest/info/version", include_in_schema=False)
    async def version() -> JSONResponse:
        """The version of KoboldAI's API that is spoken here."""
        return JSONResponse({"result": API_VERSION})

    @router.get("/v1/config/max_length")
    async def max_length() -> JSONResponse:
        """How many tokens an answer has at most where the request does not say."""
        return JSONResponse({"value": DEFAULT_LENGTH})

    @router.get("/v1/config/max_context_length")
    @router.get("/extra/true_max_context_length")
    async def max_context_length() -> JSONResponse:
        """How many tokens the loaded model's context holds."""
        return JSONResponse({"value": _context(services)})

    @router.get("/v1/config/soft_prompt", include_in_schema=False)
    async def soft_prompt() -> JSONResponse:
        return JSONResponse({"value": ""})

    @router.get("/v1/config/soft_prompts_list", include_in_schema=False)
    async def soft_prompts() -> JSONResponse:
        return JSONResponse({"values": []})

    @router.get("/extra/version")
    async def cpp_version() -> JSONResponse:
        """What KoboldCpp's clients ask to know which parts of its API are there."""
        active = services.manager.active()
        features = features_of(services.specs[active.loader], active.info) if active is not None else frozenset()
        parts = ("protected", "txt2img", "vision", "audio", "transcribe", "multiplayer", "websearch", "tts", "savedata")
        absent: dict[str, Any] = dict.fromkeys(parts, False)
        return JSONResponse(
            {"result": "KoboldCpp", "version": CPP_VERSION, **absent, "embeddings": "embeddings" in features, "admin": 0}
        )


def _add_counting(router: APIRouter, services: Services) -> None:
    @router.post("/extra/tokencount", openapi_extra=body_schema(CountRequest, samplers=False))
    async def token_count(request: Request) -> JSONResponse:
        """How many tokens a text has, and which."""
        body = parse(CountRequest, await read_object(request))
        client = services.manager.client(_active(services).id)
        ids = await client.encode(body.prompt, body.special is not False)
        return JSONResponse({"value": len(ids), "ids": ids})

    @router.post("/extra/detokenize", openapi_extra=body_schema(DetokenizeRequest, samplers=False))
    async def detokenize(request: Request) -> JSONResponse:
        """The text of token ids."""
        body = parse(DetokenizeRequest, await read_object(request))
        active = _active(services)
        vocabulary = (active.info.vocab_size if active.info else 0) or 2**31
        if any(not 0 <= token < vocabulary for token in body.ids):
            raise InvalidParameter("A token id is outside the model's vocabulary.", param="ids")
        text = await services.manager.client(active.id).decode(body.ids, False)
        return JSONResponse({"result": text, "success": True})


def _add_control(router: APIRouter, services: Services, sessions: Sessions) -> None:
    began = time.monotonic()

    async def key_of(request: Request) -> str | None:
        if request.method == "GET" or not await request.body():
            return None
        return parse(KeyRequest, await read_object(request)).genkey

    @router.get("/extra/generate/check")
    @router.post("/extra/generate/check", openapi_extra=body_schema(KeyRequest, samplers=False, required=False))
    async def check(request: Request) -> JSONResponse:
        """The text so far of the generation with this `genkey`; without one, of the caller's latest."""
        run = sessions.find(await key_of(request))
        return JSONResponse({"results": [{"text": run.text if run is not None else ""}]})

    @router.post("/extra/abort", openapi_extra=body_schema(KeyRequest, samplers=False, required=False))
    async def abort(request: Request) -> JSONResponse:
        """Stop the generation with this `genkey`; without one, the caller's latest. Nobody else's."""
        stopped = sessions.stop(await key_of(request))
        return JSONResponse({"success": "true" if stopped else "false", "done": "true"})

    @router.get("/extra/perf")
    async def perf() -> JSONResponse:
        """Figures of the latest generation, and how busy the server is."""
        run, running = sessions.last, services.runs.running()
        usage, timings = (run.usage, run.timings) if run is not None else (None, None)
        seed = (run.receipt or {}).get("seed") if run is not None else None
        return JSONResponse(
            {
                "last_process": timings.prefill_s if timings else 0,
                "last_eval": timings.decode_s if timings else 0,
                "last_token_count": usage.completion_tokens if usage else 0,
                "last_input_count": usage.prompt_tokens if usage else 0,
                "last_process_speed": (timings.prefill_rate(usage) or 0) if timings and usage else 0,
                "last_eval_speed": (timings.decode_rate(usage) or 0) if timings and usage else 0,
                "last_seed": seed if seed is not None else -1,
                "total_gens": sessions.total,
                "stop_reason": {"length": 0, "stop": 1}.get(run.finish_reason or "", -1) if run is not None else -1,
                "queue": sum(r.state == "queued" for r in running),
                "idle": 0 if running else 1,
                "uptime": int(time.monotonic() - began),
            }
        )

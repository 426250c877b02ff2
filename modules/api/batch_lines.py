"""One line of a batch through the API's own path: the same checks, the same runs, the same bodies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from modules.api.embeddings import EmbeddingsRequest, vectors_body
from modules.api.job import Job
from modules.api.openai_answers import ChatForm, CompletionForm, Form, whole
from modules.api.openai_models import ChatRequest, Common, CompletionRequest, parse
from modules.api.openai_turns import chat_turn, completion_turns
from modules.errors import InvalidParameter, UnsupportedParameter

if TYPE_CHECKING:
    from modules.api.turn import Turn
    from modules.services import Services


async def answer_line(services: Services, url: str, body: dict[str, Any], model: str | None) -> tuple[int, dict[str, Any]]:
    """(status, body) of a request. `model` is the batch's own and takes the place of the line's. Raises AppError."""
    body = {name: value for name, value in body.items() if name != "model"} if model is not None else body
    strict = services.config.strict_parameters
    if url == "/v1/embeddings":
        return 200, await vectors_body(services, parse(EmbeddingsRequest, body), model)
    if url == "/v1/chat/completions":
        chat = parse(ChatRequest, body)
        return 200, await _generate(services, chat, [chat_turn(chat, strict=strict)], ChatForm(), model)
    if url == "/v1/completions":
        completion = parse(CompletionRequest, body)
        if (completion.best_of or 1) > (completion.n or 1):
            raise UnsupportedParameter("best_of above n is not supported in a batch.", hint="Leave it out.", param="best_of")
        turns = completion_turns(completion, strict=strict)
        return 200, await _generate(services, completion, turns, CompletionForm(), model)
    raise InvalidParameter("There is no such url for a batch.", param="url")


async def _generate(services: Services, body: Common, turns: list[Turn], form: Form, model: str | None) -> dict[str, Any]:
    job = Job(services, turns, model=model or body.model, n=body.n or 1)
    try:
        await job.check()
        return await whole(job, form)
    except asyncio.CancelledError:
        job.leave()  # runs belong to no task: nobody wants them any more
        raise

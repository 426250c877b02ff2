"""/v1/embeddings: vectors of texts or token ids, by any loader that makes them."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from modules.api.body import read_object
from modules.api.job import model_name
from modules.api.openai_models import parse
from modules.api.turn import split_extras
from modules.errors import ContextLengthExceeded, InvalidParameter, UnsupportedParameter
from modules.schema import features_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modules.residents import Lease
    from modules.services import Services

MAX_INPUTS = 2048


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    input: Any = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=1_000_000)

    def inputs(self) -> list[str | list[int]]:
        """One or several, as text or token ids. Raises InvalidParameter."""
        given = self.input
        if isinstance(given, str) or (isinstance(given, list) and given and all(_is_token(item) for item in given)):
            given = [given]
        if not isinstance(given, list) or not 0 < len(given) <= MAX_INPUTS:
            raise InvalidParameter(f"input must be a text, token ids, or a list of 1 to {MAX_INPUTS} of either.", param="input")
        for index, item in enumerate(given):
            if not (isinstance(item, str) or (isinstance(item, list) and item and all(_is_token(t) for t in item))):
                raise InvalidParameter("An input must be a text or a list of token ids.", param=f"input.{index}")
            if item == "":
                raise InvalidParameter("An input is empty.", param=f"input.{index}")
        return list(given)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def build_router(services: Services) -> APIRouter:
    """The route over these services."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        """One vector of length 1 for each input."""
        body = parse(EmbeddingsRequest, await read_object(request))
        return JSONResponse(await vectors_body(services, body, body.model))

    return router


async def vectors_body(services: Services, body: EmbeddingsRequest, model: str | None) -> dict[str, Any]:
    """The answer to a checked body, by `model`."""
    _, warnings = split_extras(body.model_extra or {})
    made = await vectors_of(services, model, body.inputs(), dimensions=body.dimensions)
    return {
        "object": "list",
        "model": made.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(made.vectors)
        ],
        "usage": {"prompt_tokens": made.tokens, "total_tokens": made.tokens},
        "warnings": warnings,
    }


@dataclass(frozen=True, slots=True)
class Vectors:
    """One vector for each input, the tokens they had together, and the model that made them."""

    vectors: list[list[float]]
    tokens: int
    model: str


async def vectors_of(
    services: Services, model: str | None, inputs: Sequence[str | list[int]], *, dimensions: int | None = None
) -> Vectors:
    """Texts or token ids -> vectors, by the model named or the active one. Raises UnsupportedParameter where its backend makes
    none, ContextLengthExceeded and InvalidParameter with the input's index."""
    async with services.manager.lease(model_name(model) if model is not None else None) as lease:
        _check(services, lease)
        vectors: list[list[float]] = []
        tokens = 0
        for index, item in enumerate(inputs):
            ids = item if isinstance(item, list) else await lease.client.encode(item, True)
            _check_ids(ids, lease, index)
            vectors.append(await lease.client.embed(ids))
            tokens += len(ids)
            if dimensions not in (None, len(vectors[0])):
                raise UnsupportedParameter(
                    f"This model's vectors have {len(vectors[0])} dimensions and can't be cut.", param="dimensions"
                )
        return Vectors(vectors, tokens, lease.resident.model.id)


def _check(services: Services, lease: Lease) -> None:
    spec = services.specs[lease.resident.loader]
    if "embeddings" not in features_of(spec, lease.resident.info):
        raise UnsupportedParameter(
            f"{spec.title} makes no embeddings.", hint="Load the model with another backend.", param="model"
        )


def _check_ids(ids: list[int], lease: Lease, index: int) -> None:
    info = lease.resident.info
    if info is None:
        return
    if any(token >= (info.vocab_size or 2**31) for token in ids):
        raise InvalidParameter("A token id is outside the model's vocabulary.", param=f"input.{index}")
    if info.context_length and len(ids) > info.context_length:
        raise ContextLengthExceeded(
            f"Input {index} has {len(ids)} tokens; this model's context holds {info.context_length}.",
            hint="Split it.",
            param=f"input.{index}",
        )


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    """base64 is little-endian 32-bit floats, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if form == "base64" else vector

"""Which protocol an address speaks, and what an error looks like in it. OpenAI's is everybody's default.

    /v1/messages…               Anthropic     {"type": "error", "error": {"type", "message"}}
    /api/v1/…, /api/extra/…     KoboldAI      {"detail": {"type", "msg"}}
    /api/…                      Ollama        {"error": "message"}
    /completion, /props, …      llama-server  {"error": {"code": 400, "type", "message"}}

Each body also carries our own `code` and `param` where it has room, so that a program need not read the message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from modules import caller
from modules.errors import Conflict

if TYPE_CHECKING:
    from starlette.requests import Request

    from modules.errors import AppError

Dialect = Literal["openai", "anthropic", "kobold", "ollama", "llama_server"]

LLAMA_SERVER_PATHS = frozenset(
    "/completion /completions /chat/completions /tokenize /detokenize /apply-template /props /slots /infill /embedding "
    "/embeddings /rerank /reranking /lora-adapters".split()
)
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    507: "overloaded_error",
}


def path_of(request: Request) -> str:
    """The request's address as routes know it: without the prefix of a reverse proxy."""
    return str(request.scope["path"]).removeprefix(request.scope.get("root_path", ""))


def dialect_of(path: str) -> Dialect:
    """The protocol of an address (without the reverse proxy's prefix)."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/api/"):
        return "kobold" if path.startswith(("/api/v1/", "/api/extra/")) else "ollama"
    return "llama_server" if path in LLAMA_SERVER_PATHS else "openai"


def error_body(error: AppError, path: str = "") -> dict[str, Any]:
    """The error as the address's clients read it. A conflict in our own API also carries what is current, to be merged."""
    dialect = dialect_of(path)
    message = str(error)
    if dialect == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.http_status, "api_error")
        inner = {"type": kind, "message": message, "code": error.code, "param": error.param}
        return {"type": "error", "error": inner, "request_id": f"req_{caller.request_id()}"}
    if dialect == "kobold":
        return {"detail": {"type": error.code, "msg": message, "param": error.param}}
    if dialect == "ollama":
        return {"error": message, "code": error.code}
    if dialect == "llama_server":
        named: dict[str, Any] = {"code": error.http_status, "type": error.openai_type, "message": message}
        return {"error": {**named, "name": error.code, "param": error.param}}
    body = error.openai_body()
    if isinstance(error, Conflict) and error.detail:
        body["error"]["detail"] = error.detail
    return body

"""Every failure the product can name.

    AppError
     ├ ConfigError
     ├ RequestError
     │  ├ InvalidParameter · UnsupportedParameter · NotSupported · InvalidJson · InvalidUnicode · InvalidGrammar · InvalidImage
     │  ├ ContextLengthExceeded · ModelNotFound · NoModelLoaded · TemplateError · NotFound · MethodNotAllowed
     │  └ BodyTooLarge · UnsupportedMediaType · Unauthorized · Forbidden · Conflict · TooManyRequests
     │  · RequestTimeout · Overloaded
     ├ LoadError
     │  └ UnknownFormat · BackendUnavailable · IncompatibleModel · CorruptModel · UnsafeModel · InstallFailed
     │  · LoadOutOfMemory (CannotFit: known before the load)
     ├ EngineError
     │  ├ GenerationFailed · GenerateOutOfMemory · EngineTimeout · ProtocolError · EngineDead
     │  └ RemoteError
     │     └ RemoteBusy
     ├ DownloadError
     └ StorageError
        └ StorageFull · StorageReadOnly · StorageUnreachable · StoreLocked · StoreCorrupt

A class carries its code, HTTP status and OpenAI error type; an instance adds a message for a person and a hint that says
what to do. Codes cross the worker's pipe as strings (`to_wire`, `error_from_wire`). Cancelling is an outcome, not an error.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

# How Python, torch, CUDA, Rust's and C++'s libraries word it.
_OUT_OF_MEMORY = (
    "MemoryError",  # and torch's OutOfMemoryError
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class AppError(Exception):
    """`message` says what happened, `hint` what to do about it; `detail` is for logs and the crash card only."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, detail: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.detail = detail or {}

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def openai_body(self) -> dict[str, Any]:
        """The body every OpenAI client parses: {"error": {"message", "type", "param", "code"}}."""
        return {"error": {"message": str(self), "type": self.openai_type, "param": self.param, "code": self.code}}

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "hint": self.hint, "param": self.param, "detail": self.detail}


class ConfigError(AppError):
    code = "invalid_configuration"


class RequestError(AppError):
    code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"


class InvalidParameter(RequestError):
    code = "invalid_parameter"


class UnsupportedParameter(RequestError):
    code = "unsupported_parameter"


class NotSupported(RequestError):
    """An address that clients know and this product has nothing for."""

    code = "not_supported"


class InvalidJson(RequestError):
    code = "invalid_json"


class InvalidUnicode(RequestError):
    code = "invalid_unicode"


class InvalidGrammar(RequestError):
    code = "invalid_grammar"


class InvalidImage(RequestError):
    """`detail["reason"]`: broken, type, bytes, pixels, animated, count or url."""

    code = "invalid_image"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    code = "model_not_found"
    http_status = 404


class NotFound(RequestError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    http_status = 405


class Conflict(RequestError):
    """It does not go with how things stand now. Of a write that was based on an old revision `detail` carries the current one."""

    code = "conflict"
    http_status = 409


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    http_status = 415


class TemplateError(RequestError):
    code = "template_error"


class Unauthorized(RequestError):
    code = "invalid_api_key"
    http_status = 401
    openai_type = "authentication_error"


class Forbidden(RequestError):
    code = "forbidden"
    http_status = 403
    openai_type = "permission_error"


class TooManyRequests(RequestError):
    code = "rate_limited"
    http_status = 429
    openai_type = "rate_limit_error"


class NoModelLoaded(RequestError):
    code = "no_model_loaded"
    http_status = 503
    openai_type = "server_error"


class RequestTimeout(RequestError):
    """The request's body did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class Overloaded(RequestError):
    """More requests at once than the server takes."""

    code = "overloaded"
    http_status = 503
    openai_type = "server_error"


class LoadError(AppError):
    code = "load_failed"
    http_status = 422


class UnknownFormat(LoadError):
    code = "unknown_format"


class BackendUnavailable(LoadError):
    """The backend is not installed or its device is missing; `hint` is the exact fix."""

    code = "backend_unavailable"
    http_status = 503


class IncompatibleModel(LoadError):
    code = "incompatible_model"


class CorruptModel(LoadError):
    code = "corrupt_model"


class UnsafeModel(LoadError):
    """The model could run code (pickle, remote code keys)."""

    code = "unsafe_model"


class LoadOutOfMemory(LoadError):
    code = "out_of_memory_load"
    http_status = 507


class CannotFit(LoadOutOfMemory):
    """The planner's answer before a load; `detail` carries the nearest setting that fits, as `nearest`."""

    code = "cannot_fit"


class InstallFailed(LoadError):
    code = "install_failed"
    http_status = 500


class EngineError(AppError):
    code = "engine_error"


class GenerationFailed(EngineError):
    """This request failed; the engine is good for the next one."""

    code = "generation_failed"


class GenerateOutOfMemory(EngineError):
    code = "out_of_memory_generate"
    http_status = 507


class EngineTimeout(EngineError):
    code = "engine_timeout"
    http_status = 504


class ProtocolError(EngineError):
    code = "protocol_error"


class EngineDead(EngineError):
    """The worker process ended. `detail`: exit_code, signal, stderr (its last 8 KiB)."""

    code = "worker_crashed"
    http_status = 502


class RemoteError(EngineError):
    """A remote server did not do its part: out of reach, refused the key, or answered what no such server should."""

    code = "remote_error"
    http_status = 502


class RemoteBusy(RemoteError):
    """A remote server asks to come back later. `detail`: retry_after, in seconds, where it said so."""

    code = "remote_busy"
    http_status = 503


class DownloadError(AppError):
    code = "download_failed"
    http_status = 502


class StorageError(AppError):
    code = "storage_error"


class StorageFull(StorageError):
    code = "storage_full"
    http_status = 507


class StorageReadOnly(StorageError):
    code = "storage_read_only"
    http_status = 507


class StorageUnreachable(StorageError):
    """The database does not answer (now); nothing is lost by trying again."""

    code = "storage_unreachable"
    http_status = 503


class StoreLocked(StorageError):
    code = "store_locked"
    http_status = 423


class StoreCorrupt(StorageError):
    code = "store_corrupt"


def error_classes() -> tuple[type[AppError], ...]:
    """AppError and every subclass, parents first."""
    found: list[type[AppError]] = [AppError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return tuple(found)


def error_from_wire(data: dict[str, Any]) -> AppError:
    """The error a worker sent, as the class its code names; an unknown code is an EngineError."""
    by_code = {cls.code: cls for cls in reversed(error_classes())}
    cls = by_code.get(str(data.get("code")), EngineError)
    return cls(
        str(data.get("message", "")), hint=str(data.get("hint", "")), param=data.get("param"), detail=data.get("detail") or {}
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA, a native library or Python itself ran out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or says_out_of_memory(f"{type(error).__name__}: {error}")


def says_out_of_memory(text: str) -> bool:
    """Whether a message or a log tells of memory that ran out."""
    return any(words in text for words in _OUT_OF_MEMORY)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length, without the full stop at its end."""
    return (" ".join(str(error).split()) or type(error).__name__)[:400].rstrip(".")

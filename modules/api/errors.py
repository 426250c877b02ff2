"""Every failure as its protocol's error body, on every path. Nothing of the input, no path and no traceback goes out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from modules.api.dialects import error_body, path_of
from modules.errors import AppError, InvalidParameter, MethodNotAllowed, NotFound, RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

log = logging.getLogger(__name__)


def body_of(error: AppError, path: str = "") -> dict[str, Any]:
    """The body for an address; OpenAI's without one."""
    return error_body(error, path)


def response_of(error: AppError, path: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    retry = {"Retry-After": "2"} if error.http_status in (429, 503) else {}
    return JSONResponse(error_body(error, path), status_code=error.http_status, headers={**retry, **(headers or {})})


async def _app_error(request: Request, error: AppError) -> JSONResponse:
    if error.http_status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    return response_of(error, path_of(request))


def _framework_failure(status: int, message: str) -> RequestError:
    """A failure whose status the framework chose."""
    failure = RequestError(message)
    failure.http_status = status  # type: ignore[misc]  # the class keeps its own
    return failure


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    known: dict[int, RequestError] = {
        404: NotFound("There is nothing at this address.", hint="/docs lists the API."),
        405: MethodNotAllowed(f"This address does not take {request.method}."),
    }
    failure = known.get(error.status_code) or _framework_failure(error.status_code, str(error.detail))
    headers = {k: v for k, v in (error.headers or {}).items() if error.status_code not in known or k.lower() == "allow"}
    return response_of(failure, path_of(request), headers)


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])[:64] or None
    return response_of(InvalidParameter(f"{param or 'The request'}: {first['msg']}.", param=param), path_of(request))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return response_of(AppError("The server failed at this request.", hint="Its log says why."), path_of(request))


async def _left(request: Request, error: Exception) -> Response:
    """The client went away while it sent its body: an ordinary end, and nobody reads this."""
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Register the handlers."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(AppError, _app_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unexpected)

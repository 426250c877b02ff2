"""One line of a batch file in and out, in OpenAI's format.

In:  {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}
Out: {"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": {…}} or null,
      "error": {"code": …, "message": …} or null}

Our own field in an output line: `line`, the number of the input line it answers, from 1. Source: OpenAI's batch guide.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from modules.errors import AppError, InvalidJson, InvalidParameter, UnsupportedParameter

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINE_BYTES = 8 << 20
MAX_CUSTOM_ID = 512
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Line:
    """A request of the file. `number` counts the file's lines from 1; `error` is what makes it none."""

    number: int
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] | None = None
    error: AppError | None = None


def parse_line(raw: bytes, number: int) -> Line:
    """The request on one line. Never raises: what is wrong is in `error`, beside the custom_id where that can be read."""
    custom_id: str | None = None
    try:
        value = _object(raw, number)
        given = value.get("custom_id")
        if not isinstance(given, str) or not 0 < len(given) <= MAX_CUSTOM_ID:
            raise InvalidParameter(f"custom_id must be text of 1 to {MAX_CUSTOM_ID} characters.", param="custom_id")
        custom_id = given
        if value.get("method", "POST") != "POST":
            raise InvalidParameter("method must be POST.", param="method")
        url = value.get("url")
        if url not in URLS:
            raise InvalidParameter(f"url must be one of {', '.join(URLS)}.", param="url")
        body = value.get("body")
        if not isinstance(body, dict):
            raise InvalidParameter("body must be an object.", param="body")
        if body.get("stream"):
            raise UnsupportedParameter("A batch does not stream.", hint="Leave stream out.", param="stream")
    except AppError as error:
        return Line(number, custom_id, error=error)
    return Line(number, custom_id, url, body)


def _object(raw: bytes, number: int) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise InvalidJson(f"Line {number} is longer than {MAX_LINE_BYTES >> 20} MiB.")
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidJson(f"Line {number} is no UTF-8 text.") from None
    except (ValueError, RecursionError) as error:
        where = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidJson(f"Line {number} is no valid JSON{where}.") from None
    if not isinstance(value, dict):
        raise InvalidJson(f"Line {number} is no JSON object.")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def answered(line: Line, status: int, body: dict[str, Any], request_id: str) -> dict[str, Any]:
    """The output line of a request that got an answer, which may be an error body with its status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": _id(), "custom_id": line.custom_id, "response": response, "error": None, "line": line.number}


def refused(line: Line, error: AppError) -> dict[str, Any]:
    """The output line of what never became a request, or never got an answer."""
    described = {"code": error.code, "message": str(error)}
    return {"id": _id(), "custom_id": line.custom_id, "response": None, "error": described, "line": line.number}


def failed(record: dict[str, Any]) -> bool:
    """Whether an output line tells of an error."""
    response = record.get("response")
    return record.get("error") is not None or not isinstance(response, dict) or int(response.get("status_code", 500)) >= 400


def tokens_of(record: dict[str, Any]) -> tuple[int, int]:
    """(prompt, completion) tokens of an output line."""
    response = record.get("response") or {}
    usage = (response.get("body") or {}).get("usage") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"

"""How a probe talks to the server: one HTTP client, answers checked, streams read to their end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 300.0  # a large model on a slow machine


class Failed(Exception):
    """The probe's claim does not hold; the message says why."""


class Unsupported(Exception):
    """The server says itself that this loader does not have it."""


def expect(condition: object, why: str) -> None:
    """Raises Failed."""
    if not condition:
        raise Failed(why)


@dataclass
class Api:
    """One model of one server. `model` goes into every body that names one."""

    http: httpx.AsyncClient
    model: str

    async def get(self, path: str) -> Any:
        return _checked(await self.http.get(path))

    async def post(self, path: str, **body: Any) -> Any:
        """The JSON answer. Raises Unsupported for a typed refusal, Failed for any other status than 200."""
        return _checked(await self.http.post(path, json=body))

    async def refused(self, path: str, **body: Any) -> Any:
        """The error body of a request that must be refused with 400."""
        answer = await self.http.post(path, json=body)
        expect(answer.status_code == 400, f"status {answer.status_code} where 400 was due")
        return answer.json()

    async def events(self, path: str, **body: Any) -> list[tuple[str, Any]]:
        """(event name, data) of a stream; data is JSON, or the word [DONE]. Lines of JSON count as events without a name."""
        found: list[tuple[str, Any]] = []
        name = ""
        async with self.http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                _checked(answer)
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    found.append((name, line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])))
                    name = ""
                elif line.startswith("{"):
                    found.append(("", json.loads(line)))
        return found

    async def chat(self, text: str, **fields: Any) -> Any:
        return await self.post("/v1/chat/completions", **self.body(text, **fields))

    def body(self, text: str, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 12, **fields}


def _checked(answer: httpx.Response) -> Any:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.status_code == 200:
        return body
    words, code = _error(body)
    if code in ("unsupported_parameter", "not_supported") or "makes no embeddings" in words:
        raise Unsupported(words)
    raise Failed(f"status {answer.status_code}: {words}")


def _error(body: Any) -> tuple[str, str]:
    """(message, code) of any protocol's error body."""
    if not isinstance(body, dict):
        return "no JSON", ""
    error = body.get("error", body.get("detail", ""))
    if isinstance(error, dict):
        code = error.get("code") if isinstance(error.get("code"), str) else error.get("name") or error.get("type")
        return str(error.get("message") or error.get("msg") or ""), str(code or "")
    return str(error), str(body.get("code") or "")

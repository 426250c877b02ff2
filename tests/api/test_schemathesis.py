"""Requests made from our own OpenAPI document: no 5xx, no undocumented kind of error body, and the server well afterwards."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from modules.api.dialects import dialect_of
from modules.api.examples import EXAMPLES, NEEDS_A_MODEL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    schemathesis = pytest.importorskip("schemathesis")

if TYPE_CHECKING:
    from tests.api.conftest import Server

# Those that load, unload or run for seconds have tests of their own.
LEFT_OUT = (
    "/v1/internal/model/load",
    "/v1/internal/model/unload",
    "/v1/internal/model/download",
    "/v1/internal/lora/",
    "/v1/internal/conformance",
    "/ui-api/",
)
MAX_EXAMPLES = 6
LIMITS = {
    "/chat/completions": "max_tokens",
    "/completions": "max_tokens",
    "/responses": "max_output_tokens",
    "/messages": "max_tokens",
    "/v1/generate": "max_length",
    "/extra/generate/stream": "max_length",
    "/api/chat": "num_predict",
    "/api/generate": "num_predict",
    "/completion": "n_predict",
    "/infill": "n_predict",
}


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def test_the_document_is_a_valid_openapi_of_every_protocol(document: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(document).validate()
    tags = {operation["tags"][0] for methods in document["paths"].values() for operation in methods.values()}
    assert {"OpenAI", "Anthropic", "Ollama", "KoboldAI", "llama-server", "Internal"} <= tags
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description") or operation.get("summary"), f"{method} {path} is not described"


def well_formed(path: str, body: Any) -> bool:
    """Whether an error body is that of its protocol."""
    dialect = dialect_of(path)
    if dialect == "anthropic":
        return body["type"] == "error" and {"type", "message"} <= body["error"].keys()
    if dialect == "kobold":
        return {"type", "msg"} <= body["detail"].keys()
    if dialect == "ollama":
        return isinstance(body["error"], str) and bool(body["error"])
    return {"message", "type", "code", "param"} <= body["error"].keys()


@pytest.mark.parametrize("path", [path for path in (*EXAMPLES, *NEEDS_A_MODEL) if not path.startswith(LEFT_OUT)])
def test_no_body_made_from_it_breaks_the_server(server: Server, document: dict[str, Any], path: str) -> None:
    with requests.Session() as session:
        _probe(server, schemathesis.openapi.from_dict(document)[path]["POST"], session)
    assert server.http.get("/health").status_code == 200


def test_every_address_without_a_body_answers(server: Server, document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method in methods.keys() & {"get", "head", "delete"}:
            for name in ("x", "%2e%2e", "é", "a/b") if "{" in path else ("",):
                answer = server.http.request(method, path.partition("{")[0] + name)
                assert answer.status_code < 500, f"{method} {path}"
                if answer.status_code >= 400:
                    assert well_formed(path, answer.json()), f"{method} {path}: {answer.text}"
    server.oracle()


def _probe(server: Server, operation: Any, session: requests.Session) -> None:
    """Bodies as the document describes them, and bodies that break its rules."""
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = [operation.as_strategy(generation_mode=mode) for mode in modes]

    @seed(20261122)
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(cases))
    def check(case: Any) -> None:
        _shorten(case)
        answer = case.call(base_url=server.url, session=session, timeout=60)
        shown = f"{case.method} {case.path} {case.body!r}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500, shown
        if answer.status_code >= 400:
            assert well_formed(case.path, answer.json()), shown
        elif answer.status_code == 200:
            case.validate_response(answer, checks=[schemathesis.checks.response_schema_conformance])

    check()


def _shorten(case: Any) -> None:
    """The same request without a long answer: a limit becomes a small one, and there is one where there was none."""
    field = next((name for path, name in LIMITS.items() if case.path.endswith(path)), None)
    if not isinstance(case.body, dict) or field is None:
        return
    holder = case.body
    if case.path.startswith("/api/") and field == "num_predict":
        options = case.body.setdefault("options", {})
        if not isinstance(options, dict):
            return
        holder = options
    if field not in holder or (isinstance(holder[field], int) and holder[field] > 8):
        holder[field] = 8
    for name in ("n", "best_of"):
        if isinstance(case.body.get(name), int) and case.body[name] > 2:
            case.body[name] = 2

"""The examples of /docs and docs/api.md run as they stand, and so does the Python of docs/clients."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modules.api.examples import EXAMPLES, NEEDS_A_MODEL

if TYPE_CHECKING:
    from tests.api.conftest import Server

CLIENTS = Path(__file__).resolve().parent.parent.parent / "docs" / "clients"
PROGRAMS = {
    "openai.md": "openai",
    "anthropic.md": "anthropic",
    "ollama.md": "ollama",
    "langchain.md": "langchain_openai",
    "litellm.md": "litellm",
}


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example(server: Server, path: str) -> None:
    if path == "/v1/internal/model/load":
        pytest.skip("would replace the model that the other tests use; test_internal has it")
    answer = server.http.post(path, json=EXAMPLES[path][1])
    assert answer.status_code == 200, answer.text


def test_every_endpoint_with_a_body_has_one(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is not None:
            assert path in EXAMPLES or path in NEEDS_A_MODEL, path
            assert "example" in body["content"]["application/json"], path


def test_the_pages(server: Server) -> None:
    for path in ("/docs", "/conformance"):
        page = server.http.get(path)
        assert page.status_code == 200 and "<script src" not in page.text and "//cdn" not in page.text


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_of_a_clients_page(server: Server, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(PROGRAMS[page])
    text = (CLIENTS / page).read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "http://127.0.0.1:7860" in code
    names: dict[str, object] = {}
    exec(compile(code.replace("http://127.0.0.1:7860", server.url), page, "exec"), names)
    close = getattr(names.get("client"), "close", None)
    if close is not None:
        close()
    assert "Hello" in capsys.readouterr().out


def test_json_in_the_pages_is_json() -> None:
    for path in CLIENTS.glob("*.md"):
        for block in re.findall(r"```json\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            json.loads(block)


def test_a_browser_finds_an_icon(server: Server) -> None:
    icon = server.http.get("/favicon.ico")
    assert icon.status_code == 200 and icon.headers["content-type"].startswith("image/svg")

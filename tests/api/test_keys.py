"""Named keys: the subcommand, the file, a server that runs meanwhile, and each protocol's own refusal."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import openai
import pytest

from modules.api.access import AccessControl
from modules.errors import ConfigError, Conflict, InvalidParameter, NotFound, Unauthorized
from modules.keys import FILE, KeyStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Server

ROOT = Path(__file__).resolve().parent.parent.parent


def keys(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "server.py", "keys", *words, "--user-data-dir", str(data)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False)


def test_the_subcommand(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "laptop", "--scope", "admin")
    secret = made.stdout.strip()
    assert made.returncode == 0 and len(secret) > 40 and secret not in (tmp_path / FILE).read_text(encoding="utf-8")
    listed = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert [(key["name"], key["scope"], key["hint"]) for key in listed] == [("laptop", "admin", secret[-4:])]
    assert "Revoke it first" in keys(tmp_path, "create", "laptop").stderr
    assert keys(tmp_path, "revoke", "laptop").returncode == 0
    assert keys(tmp_path, "revoke", "laptop").returncode == 1
    assert keys(tmp_path, "create").returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.create("a")
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_the_store(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    first, second = store.create("a"), store.create("b", "admin")
    made = store.keys()
    assert first != second and [key.scope for key in made] == ["user", "admin"]
    with pytest.raises(Conflict):
        store.create("a")
    for name in ("", " a", "a\n", "x" * 65, "../a"):
        with pytest.raises(InvalidParameter):
            store.create(name)
    with pytest.raises(NotFound):
        store.revoke("c")
    again = KeyStore(tmp_path).keys()
    assert [key.name for key in again] == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name":"a","scope":"root","sha256":"","hint":"","created_at":1}]}'],
)
def test_a_damaged_file_opens_nothing(tmp_path: Path, content: str) -> None:
    store = KeyStore(tmp_path)
    access = AccessControl({}, store=store)
    headers = [(b"x-api-key", store.create("a").encode())]
    access.check("GET", "/v1/models", headers, "1.2.3.4")
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        KeyStore(tmp_path).keys()
    store._looked_at = float("-inf")
    access.check("GET", "/v1/models", headers, "1.2.3.4")  # what was read before stays in force
    with pytest.raises(Unauthorized):
        access.check("GET", "/v1/models", [], "1.2.3.4")


def test_beyond_this_machine_a_key_is_required_even_when_none_is_left(tmp_path: Path) -> None:
    access = AccessControl({}, store=KeyStore(tmp_path), required=True)
    with pytest.raises(Unauthorized):
        access.check("GET", "/v1/models", [], "1.2.3.4")
    access.check("GET", "/health", [], "1.2.3.4")


def test_a_running_server_takes_changes(launch: Callable[..., Server], tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = launch(data=data).wait_ready()
    get = server.http.get
    assert get("/v1/models").status_code == 200  # no key yet, so none is needed
    names = (("user", "user"), ("boss", "admin"), ("other", "user"))
    user, admin, other = (KeyStore(data).create(name, scope) for name, scope in names)
    server.until(lambda: get("/v1/models").status_code == 401, "locked")
    assert get("/v1/models", headers={"x-api-key": user}).status_code == 200
    answers = {
        (name, path): server.http.get(path, headers={"Authorization": f"Bearer {key}"}).status_code
        for name, key in (("user", user), ("admin", admin))
        for path in ("/v1/internal/model/list", "/v1/internal/model/info", "/v1/internal/queue", "/metrics")
    }
    assert {pair for pair, status in answers.items() if status != 200} == {("user", "/v1/internal/model/list")}
    _each_protocol(server, user)
    _login_ends_with_its_key(server, data, user)
    _a_stream_ends_with_its_key(server, data, admin, other)


def _each_protocol(server: Server, key: str) -> None:
    """Every client's own way to send a key works, and every refusal is in its protocol's words."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        assert client.models.retrieve("echo").id == "echo"
    say: Any = [{"role": "user", "content": "hi"}]
    with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as good:
        assert good.messages.create(model="echo", max_tokens=5, messages=say).stop_reason
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as bad,
        pytest.raises(anthropic.AuthenticationError),
    ):
        bad.messages.create(model="echo", max_tokens=5, messages=say)
    assert server.http.get("/api/tags").json()["code"] == "invalid_api_key"
    assert server.http.get("/api/v1/model").json()["detail"]["type"] == "invalid_api_key"
    assert server.http.get("/props").json()["error"]["code"] == 401
    assert server.http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"


def _login_ends_with_its_key(server: Server, data: Path, key: str) -> None:
    with httpx.Client(base_url=server.url, follow_redirects=False) as browser:
        assert browser.post("/login", data={"key": f" {key} "}).status_code == 303
        assert browser.get("/v1/models").status_code == 200
        KeyStore(data).revoke("user")
        server.until(lambda: browser.get("/v1/models").status_code == 401, "logged out")


def _a_stream_ends_with_its_key(server: Server, data: Path, key: str, other: str) -> None:
    ended = threading.Event()

    def follow() -> None:
        body = {"messages": [{"role": "user", "content": "[[echo tokens=3000 rate=50]]"}], "stream": True}
        with pytest.raises(httpx.RemoteProtocolError):  # cut off, not finished
            httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=60)
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    headers = {"x-api-key": other}
    server.until(lambda: bool(server.http.get("/v1/internal/queue", headers=headers).json().get("running")), "running")
    KeyStore(data).revoke("boss")
    assert ended.wait(30)
    thread.join()
    server.until(lambda: not server.http.get("/v1/internal/queue", headers=headers).json()["running"], "stopped")

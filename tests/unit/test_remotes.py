"""Saved servers: what may be saved, who may read it, where a name may lead, and what is known of each."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules import reach
from modules.command_line import parse
from modules.errors import ConfigError, Conflict, InvalidParameter, ModelNotFound, NotFound, RemoteError
from modules.library import LocalLibrary
from modules.remotes import cli
from modules.remotes.address import check_url, resolve
from modules.remotes.connection import Connection
from modules.remotes.listing import entries
from modules.remotes.store import RemoteStore, Server, model_path, split_path
from modules.remotes.watch import Remotes, look
from tests.unit.far_server import FarServer, far_server

if TYPE_CHECKING:
    from argparse import Namespace

    from modules.config import Config

KEY = "sk-a-secret-key"


@pytest.fixture
def far() -> Iterator[FarServer]:
    with far_server() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> RemoteStore:
    return RemoteStore(tmp_path / "data")


# --- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://Box:8000", "http://box:8000/v1"),
        ("https://api.example.com:443/openai/v1/", "https://api.example.com/openai/v1"),
        (" http://[::1]:80/v1 ", "http://[::1]/v1"),
    ],
)
def test_addresses_become_canonical(given: str, meant: str) -> None:
    assert check_url(given) == meant == check_url(meant)


@pytest.mark.parametrize(
    "url",
    [
        "", "box:8000", "ftp://box/", "file:///etc/passwd", "http://", "http://u:p@box/v1", "http://u@box/", "http://box/?q=1",
        "http://box/v1#x", "http://box:99999/", "http://box:x/", "http://b ox/", "http://box/\r\nHost: x", "http://box\\@evil/",
        "http://[::1/", "javascript:alert(1)", "http://" + "a" * 600,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_url(url)
    assert caught.value.param == "url" and caught.value.hint


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.0.1", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200", "168.63.129.16", "192.0.0.192",
        "0.0.0.0", "[::]", "224.0.0.1", "[ff02::1]", "[::ffff:169.254.169.254]", "[2002:a9fe:a9fe::]",
    ],
)  # fmt: skip
def test_metadata_and_other_odd_addresses_are_never_used(host: str, store: RemoteStore) -> None:
    with pytest.raises(InvalidParameter, match="no such server can be"):
        store.add("x", f"http://{host}:80/v1")
    assert not store.path.exists()


def test_reach() -> None:
    expected = {
        "8.8.8.8": reach.PUBLIC, "2606:4700::1": reach.PUBLIC, "10.0.0.1": reach.PRIVATE, "192.168.1.1": reach.PRIVATE,
        "fd00::1": reach.PRIVATE, "127.0.0.9": reach.LOOPBACK, "::1": reach.LOOPBACK, "::ffff:127.0.0.1": reach.LOOPBACK,
        "0.0.0.0": reach.LOOPBACK, "169.254.1.1": reach.LINK_LOCAL,
    }  # fmt: skip
    import ipaddress

    assert {text: reach.reach_of(ipaddress.ip_address(text)) for text in expected} == expected


def test_a_name_that_comes_to_lead_inside_is_refused(far: FarServer, monkeypatch: pytest.MonkeyPatch, store: RemoteStore) -> None:
    """DNS rebinding: public when it was saved, this machine when it is used."""
    answers = ["93.184.216.34", "127.0.0.1"]

    def lookup(host: str, port: int, **_: Any) -> Any:
        assert host == "models.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    server = store.add("far", f"http://models.example:{far.server_port}")
    assert server.reach == reach.PUBLIC

    async def use() -> None:
        connection = Connection(server)
        try:
            await connection.get("/models")
        finally:
            await connection.close()

    with pytest.raises(RemoteError, match="leads into this computer"):
        asyncio.run(use())
    assert far.requests == [] and answers == []


def test_a_name_is_looked_up_once_for_a_connection(far: FarServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def lookup(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def use() -> None:
        connection = Connection(Server("far", f"http://models.example:{far.server_port}/v1", reach=reach.LOOPBACK))
        try:
            for _ in range(3):
                await connection.get("/models")
        finally:
            await connection.close()

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lookup)
        asyncio.run(use())
    assert asked.count("models.example") == 1
    assert {headers["Host"] for _, _, headers in far.requests} == {f"models.example:{far.server_port}"}


# --- the store ------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_and_never_shown(store: RemoteStore) -> None:
    server = store.add("box", "http://127.0.0.1:9", KEY, "vllm")
    if sys.platform != "win32":
        assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert KEY not in repr(server) and KEY not in json.dumps(server.public())
    assert RemoteStore(store.path.parent).get("box").key == KEY, "another process reads it"
    assert KEY not in json.dumps(Remotes(store).snapshot())
    store.remove("box")
    assert KEY not in store.path.read_text(encoding="utf-8")


def test_names_and_keys_are_checked(store: RemoteStore) -> None:
    for name in ("", "-x", "a/b", "a b", "..", "x" * 41, "é", "a\n"):
        with pytest.raises(InvalidParameter):
            store.add(name, "http://127.0.0.1:9")
    for key in ("two words", "línea", "a\r\nX-Evil: 1", "x" * 5000):
        with pytest.raises(InvalidParameter, match="key"):
            store.add("x", "http://127.0.0.1:9", key)
    with pytest.raises(InvalidParameter, match="kind"):
        store.add("x", "http://127.0.0.1:9", kind="skynet")
    assert store.add("x", "http://127.0.0.1:9", "\n").key is None
    with pytest.raises(Conflict):
        store.add("X", "http://127.0.0.1:10")
    with pytest.raises(NotFound):
        store.remove("y")


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"servers": 3}', '{"servers": [{"name": "a"}]}', '{"servers": [{"name": "../a", "url": "http://b/v1"}]}',
        '{"servers": [{"name": "a", "url": "file:///etc/passwd"}]}',
        '{"servers": [{"name": "a", "url": "http://b/v1", "key": "a b"}]}',
    ],
)  # fmt: skip
def test_a_damaged_file_says_so_and_lists_nothing(store: RemoteStore, text: str) -> None:
    store.path.parent.mkdir()
    store.path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="damaged"):
        store.servers()
    assert Remotes(store).models() == []


def test_paths_of_models_name_server_and_model(tmp_path: Path) -> None:
    file = tmp_path / "remotes.json"
    assert split_path(model_path(file, "box", "meta/Llama#1")) == (file, "box", "meta/Llama#1")
    assert split_path(str(tmp_path / "x.gguf")) is None and split_path(f"{file}#box/") is None


# --- what is known of them ------------------------------------------------------------------------------------------


def test_a_list_of_models_is_read_with_care() -> None:
    assert [e["id"] for e in entries({"data": [{"id": "a"}, {"id": "a"}, {"id": ""}, {"id": 3}, "b", None, {"id": "x\ny"}]})] == [
        "a",
        "b",
    ]
    assert entries({"models": [{"name": "c"}]}) == [{"name": "c", "id": "c"}]
    assert entries([{"id": "own"}, {"id": "remote/x/y", "format": "remote"}]) == [{"id": "own"}], "no list of lists"
    assert len(entries([str(n) for n in range(5000)])) == 1000
    for value in (None, "x", {}, {"data": {}}):
        with pytest.raises(RemoteError):
            entries(value)


def test_the_library_lists_and_finds_what_servers_have(far: FarServer, store: RemoteStore) -> None:
    far.models = ["meta/llama", "two"]
    far.routes["/v1/models"] = lambda h: h.send_json(
        {"data": [{"id": name, "max_model_len": 4096, "context_length": True} for name in far.models]}
    )
    remotes = Remotes(store)
    library = LocalLibrary([], [], remotes)
    server = store.add("far", far.url, KEY)
    assert library.list() == [], "a list waits for nobody"
    found = library.find("remote/far/meta/llama")
    assert (found.format, found.context_length, found.id) == ("remote", 4096, "remote/far/meta/llama")
    assert [model.id for model in library.list()] == ["remote/far/meta/llama", "remote/far/two"]
    assert KEY not in repr(library.list())
    far.models = ["two", "three"]
    asyncio.run(remotes.check(server))
    assert [model.id for model in library.list()] == ["remote/far/two", "remote/far/three"]
    with pytest.raises(ModelNotFound):
        library.find("remote/far/meta/llama")
    with pytest.raises(ModelNotFound, match="no server"):
        library.find("remote/other/x")
    far.routes["/v1/models"] = lambda h: h.send_bytes(b"<html>", "text/html")
    health = asyncio.run(remotes.check(server))
    assert not health.ok and health.error is not None and "text/html" in health.error
    assert library.find("remote/far/two").id, "what it had stays while it fails"
    assert remotes.snapshot()[0]["state"] == "failed"
    store.remove("far")
    assert library.list() == [] and remotes.snapshot() == []


async def test_the_watch_follows_the_file(far: FarServer, store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.remotes.watch.FILE_EVERY_S", 0.01)
    remotes = Remotes(store)

    async def until(condition: Any) -> None:
        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(poll(), 60)

    watching = asyncio.create_task(remotes.watch())
    try:
        await asyncio.to_thread(store.add, "far", far.url)
        await until(lambda: [model.id for model in remotes.models()] == ["remote/far/m"])
        await asyncio.to_thread(store.remove, "far")
        await until(lambda: remotes._known == {})
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_server_that_hangs_costs_only_its_own_time(far: FarServer) -> None:
    far.routes["/v1/models"] = lambda h: (far.release.wait(60), None)[1]
    health = await look(Server("far", far.url, reach=reach.LOOPBACK), seconds=0.2)
    assert not health.ok and health.error and health.latency_ms is None


def test_localhost_resolves_to_this_computer() -> None:
    addresses, innermost = resolve("http://localhost:1/v1")
    assert innermost == reach.LOOPBACK and set(addresses) <= {"127.0.0.1", "::1"}


# --- server.py remote -----------------------------------------------------------------------------------------------


def command(data: Path, *words: str) -> tuple[Namespace, Config]:
    config = parse(["remote", *words, "--user-data-dir", str(data)], environ={})
    assert config.arguments is not None
    return config.arguments, config


def test_the_command_line(
    far: FarServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.KEY_VARIABLE, raising=False)
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    assert cli.run(*command(tmp_path, "list")) == 0
    assert "no servers" in capsys.readouterr().out
    assert cli.run(*command(tmp_path, "add", "far", far.url, "--key-file", str(tmp_path / "key"))) == 0
    shown = capsys.readouterr()
    assert "remote/far/m" in shown.out and KEY not in shown.out + shown.err
    assert far.requests[-1][2]["Authorization"] == f"Bearer {KEY}"
    assert cli.run(*command(tmp_path, "list", "--json")) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["ok"] and row["models"] == ["remote/far/m"] and row["has_key"] and "key" not in row
    assert cli.run(*command(tmp_path, "add", "far", far.url)) == 1
    assert "already" in capsys.readouterr().err
    monkeypatch.setenv(cli.KEY_VARIABLE, "from-the-environment")
    far.routes["/v1/models"] = lambda h: h.send_json({"error": "no"}, 401)
    assert cli.run(*command(tmp_path, "add", "second", far.url)) == 1, "it does not answer, but is saved"
    assert RemoteStore(tmp_path).get("second").key == "from-the-environment"
    assert cli.run(*command(tmp_path, "test", "second")) == 1
    assert "refused its key" in capsys.readouterr().out
    assert cli.run(*command(tmp_path, "remove", "second")) == 0
    assert cli.run(*command(tmp_path, "remove", "second")) == 1
    for words in (["add", "x"], ["remove"], ["list", "x", far.url], ["test", "far", "--key"], ["add", "x", "nonsense"]):
        assert cli.run(*command(tmp_path, *words)) == 1, words


def test_a_name_that_nobody_knows(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(InvalidParameter, match="can't be found"):
        store.add("x", "http://models.example/")

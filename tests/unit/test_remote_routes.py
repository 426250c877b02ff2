"""The way to a remote server: certificates of one's own, proxies, and the rules that hold on every way. All servers are real."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules import reach
from modules.command_line import parse
from modules.errors import ConfigError, InvalidParameter, RemoteError
from modules.remotes import cli
from modules.remotes.address import check_proxy, without_password
from modules.remotes.connection import Connection
from modules.remotes.route import check_ca
from modules.remotes.store import RemoteStore, Server
from modules.remotes.watch import look
from tests.certificates import Authority
from tests.unit.far_server import FarServer, far_server
from tests.unit.proxy_server import ProxyServer, proxy_server

if TYPE_CHECKING:
    import ssl

    from modules.remotes.watch import Health

USER = "me:p%40ss-wörd".replace("ö", "o")  # p@ss-word
PASSWORD = "p@ss-word"
NAME = "models.example"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def greeted() -> list[str | None]:
    """The names that clients greeted the far server by (SNI)."""
    return []


@pytest.fixture
def far(authority: Authority, tmp_path: Path, greeted: list[str | None]) -> Iterator[FarServer]:
    """An https server of the test's own authority."""
    context = authority.server(tmp_path, NAME, "127.0.0.1")

    def seen(_: Any, name: str | None, __: ssl.SSLContext) -> None:
        greeted.append(name)

    context.sni_callback = seen
    with far_server(context) as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[ProxyServer]:
    with proxy_server() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> RemoteStore:
    return RemoteStore(tmp_path / "data")


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let names mean these addresses; gives the list of the names that were looked up. Several addresses: one at each time."""

    def use(**answers: str | list[str]) -> list[str]:
        asked: list[str] = []
        real = socket.getaddrinfo

        def lookup(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
            asked.append(host)
            found = answers.get(str(host).partition(".")[0])
            if found is None:
                return real(host, port, *rest, **more)
            address = found.pop(0) if isinstance(found, list) else found
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        return asked

    return use


def health(server: Server) -> Health:
    return asyncio.run(look(server))


# --- certificates ----------------------------------------------------------------------------------------------------


def test_a_certificate_counts_where_its_authority_was_saved(far: FarServer, store: RemoteStore, authority: Authority) -> None:
    found = health(store.add("plain", far.url))
    assert not found.ok and "--ca FILE" in str(found.error) and far.requests == []
    found = health(store.add("with", far.url, ca=authority.pem))
    assert found.ok and [m["id"] for m in found.models] == ["m"]
    found = health(store.add("other", far.url, ca=Authority("Another").pem))
    assert not found.ok and "none of the authorities" in str(found.error)


def test_the_name_is_checked_though_the_address_is_connected_to(
    far: FarServer, store: RemoteStore, authority: Authority, greeted: list[str | None], lookups: Callable[..., list[str]]
) -> None:
    lookups(models="127.0.0.1", wrong="127.0.0.1")
    assert health(store.add("a", f"https://{NAME}:{far.server_port}", ca=authority.pem)).ok
    assert greeted == [NAME] and far.requests[-1][2]["Host"] == f"{NAME}:{far.server_port}"
    found = health(store.add("b", f"https://wrong.example:{far.server_port}", ca=authority.pem))
    assert not found.ok and "the certificate names" in str(found.error)


def test_certificates_are_checked_before_they_are_saved(store: RemoteStore, authority: Authority) -> None:
    words = f"Our own\r\nsubject=/CN=Käse\r\n{authority.pem}\nthe end"
    assert check_ca(words) == authority.pem == check_ca(authority.pem) and check_ca(" \n") is None
    both = check_ca(authority.pem + Authority("Second").pem)
    assert both is not None and both.count("BEGIN CERTIFICATE") == 2
    key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"
    broken = authority.pem.replace("M", "N")
    for text in (
        "hello",
        key,
        authority.pem + key,
        broken,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
        "x" * 300_000,
    ):
        with pytest.raises(InvalidParameter) as caught:
            store.add("x", "https://127.0.0.1:9", ca=text)
        assert caught.value.param == "ca" and caught.value.hint
    with pytest.raises(InvalidParameter, match="https"):
        store.add("x", "http://127.0.0.1:9", ca=authority.pem)


# --- proxies ---------------------------------------------------------------------------------------------------------


def test_https_through_a_tunnel_with_a_password(
    far: FarServer, proxy: ProxyServer, store: RemoteStore, authority: Authority, greeted: list[str | None],
    lookups: Callable[..., list[str]],
) -> None:  # fmt: skip
    lookups(models="127.0.0.1")
    proxy.user = f"me:{PASSWORD}"
    server = store.add("far", f"https://{NAME}:{far.server_port}", ca=authority.pem, proxy=proxy.url(USER))
    assert health(server).ok
    assert set(proxy.asked) == {("CONNECT", f"127.0.0.1:{far.server_port}")}, "the address that was checked, not the name"
    assert greeted == [NAME] and far.requests[-1][2]["Host"] == f"{NAME}:{far.server_port}"
    assert "Proxy-Authorization" not in far.requests[-1][2]
    found = health(store.add("wrong", far.url, ca=authority.pem, proxy=proxy.url("me:another-s3cret")))
    assert not found.ok and "407" in str(found.error) and "name and a password" in str(found.error)
    assert "s3cret" not in str(found.error)


def test_http_is_forwarded(proxy: ProxyServer, store: RemoteStore) -> None:
    proxy.user = f"me:{PASSWORD}"
    with far_server() as far:
        far.routes["/v1/chat/completions"] = lambda h: (h.begin(), h.piece(delta={"content": "hi"}), h.data(b"[DONE]"))[0]
        server = store.add("far", far.url, "a-key", proxy=proxy.url(USER))

        async def use() -> list[dict[str, Any]]:
            connection = Connection(server)
            try:
                await connection.get("/models")
                return [event async for event in connection.events("/chat/completions", {"model": "m"})]
            finally:
                await connection.close()

        assert asyncio.run(use())[0]["choices"][0]["delta"] == {"content": "hi"}
        assert [method for method, _ in proxy.asked] == ["GET", "POST"]
        assert far.requests[-1][2]["Authorization"] == "Bearer a-key"
        proxy.user = "changed"
        found = health(server)
        assert not found.ok and "refused to connect: 407" in str(found.error) and PASSWORD not in str(found.error)


def test_a_proxy_that_repeats_the_password_or_is_not_there(proxy: ProxyServer, store: RemoteStore, authority: Authority) -> None:
    """The reason phrase of the proxy's refusal holds what we sent."""
    proxy.user = PASSWORD
    found = health(store.add("far", "https://127.0.0.1:9", proxy=proxy.url(USER)))
    assert not found.ok and "***" in str(found.error) and PASSWORD not in str(found.error)
    proxy.user = None
    found = health(store.add("closed", "https://127.0.0.1:9", proxy=proxy.url(USER)))
    assert not found.ok and "502" in str(found.error)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = health(store.add("gone", "https://127.0.0.1:9", proxy=f"http://{USER}@127.0.0.1:{unused.getsockname()[1]}"))
    assert not found.ok and "can't be reached through http://127.0.0.1:" in str(found.error) and PASSWORD not in str(found.error)


def test_a_name_that_only_the_proxy_knows(
    far: FarServer, proxy: ProxyServer, store: RemoteStore, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        if host == NAME:
            raise socket.gaierror("not known here")
        return real(host, *rest, **more)

    proxy.names[NAME] = "127.0.0.1"
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lookup)
        url = f"https://{NAME}:{far.server_port}"
        with pytest.raises(InvalidParameter, match="can't be found") as caught:
            store.add("far", url, ca=authority.pem, proxy=proxy.url())
        assert "--proxy-resolves" in caught.value.hint
        server = store.add("far", url, ca=authority.pem, proxy=proxy.url(), proxy_resolves=True)
        assert health(server).ok
    assert set(proxy.asked) == {("CONNECT", f"{NAME}:{far.server_port}")}


# --- the rules hold --------------------------------------------------------------------------------------------------


def test_a_name_that_comes_to_lead_inside_is_refused_before_the_proxy_is_asked(
    proxy: ProxyServer, store: RemoteStore, lookups: Callable[..., list[str]]
) -> None:
    lookups(models=["93.184.216.34", "127.0.0.1"])
    server = store.add("far", f"https://{NAME}", proxy=proxy.url())
    found = health(server)
    assert not found.ok and "leads into this computer" in str(found.error) and proxy.asked == []


def test_a_proxy_that_comes_to_lead_inside_is_refused(
    proxy: ProxyServer, store: RemoteStore, lookups: Callable[..., list[str]]
) -> None:
    lookups(proxy=["93.184.216.34", "127.0.0.1"])
    server = store.add("far", "https://10.0.0.9", proxy=f"http://proxy.example:{proxy.server_port}")
    assert (server.reach, server.proxy_reach) == (reach.PRIVATE, reach.PUBLIC)
    found = health(server)
    assert not found.ok and "the proxy of far now leads into this computer" in str(found.error) and proxy.asked == []


def test_metadata_addresses_are_refused_on_every_way(proxy: ProxyServer, store: RemoteStore) -> None:
    for resolves in (False, True):
        with pytest.raises(InvalidParameter, match="no such server can be"):
            store.add("x", "http://169.254.169.254/v1", proxy=proxy.url(), proxy_resolves=resolves)
    with pytest.raises(InvalidParameter, match="no such server can be") as caught:
        store.add("x", "http://127.0.0.1:9", proxy="http://169.254.169.254:80")
    assert caught.value.param == "proxy" and proxy.asked == [] and not store.path.exists()


def test_the_environments_proxies_are_not_used(far: FarServer, proxy: ProxyServer, store: RemoteStore, authority: Authority,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy.url())
    assert health(store.add("far", far.url, ca=authority.pem)).ok and proxy.asked == []


@pytest.mark.parametrize(
    "url",
    ["", " ", "proxy", "socks5://p:1080", "ftp://p:1", "http://", "http://p:99999", "http://p:1/path", "http://p:1?q", "http://p:1#f",
     "http://u:s3cret@", "http://u:s3c ret@p:1", "http://u:s3cret@p:1\r\nX: y", "http://u:s3cret@pé:1", 
     "http://u:s3cret@" + "p" * 600],
)  # fmt: skip
def test_what_is_no_proxy_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_proxy(url)
    assert caught.value.param == "proxy" and "s3c" not in f"{caught.value}{caught.value.hint}".replace("user:password", "")


def test_proxies_become_canonical() -> None:
    assert check_proxy(" HTTP://u:p@Proxy/ ") == "http://u:p@proxy:80" == check_proxy("http://u:p@proxy:80")
    assert check_proxy("https://[::1]:3128") == "https://[::1]:3128"
    assert without_password("http://u:p@proxy:80") == "http://proxy:80"


# --- what is saved and shown -----------------------------------------------------------------------------------------


def test_what_is_saved_is_kept_private_and_read_by_others(store: RemoteStore, authority: Authority) -> None:
    server = store.add("box", "https://127.0.0.1:9", ca=authority.pem, proxy=f"http://{USER}@127.0.0.1:3128")
    plain = store.add("plain", "http://127.0.0.1:9")
    assert RemoteStore(store.path.parent).get("box") == server and server.secrets() == ["p%40ss-word", PASSWORD]
    shown = json.dumps(server.public()) + repr(server)
    assert "p%40ss" not in shown and PASSWORD not in shown and "CERTIFICATE" not in shown
    assert server.public()["has_ca"] and server.public()["proxy"] == "http://127.0.0.1:3128"
    rows = json.loads(store.path.read_text(encoding="utf-8"))["servers"]
    assert set(rows[1]) == {"name", "url", "kind", "reach", "key"} and plain.ca is None, "an older version reads it"
    for change in ({"proxy": "socks5://x"}, {"ca": "x"}, {"ca": 3}, {"proxy_reach": "a"}, {"proxy_resolves": 1}):
        store.path.write_text(json.dumps({"servers": [{**rows[0], **change}]}), encoding="utf-8")
        with pytest.raises(ConfigError, match="damaged"):
            RemoteStore(store.path.parent).servers()
    with pytest.raises(InvalidParameter, match="no proxy"):
        store.add("x", "http://127.0.0.1:9", proxy_resolves=True)


def test_the_command_line(
    far: FarServer, proxy: ProxyServer, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def command(*words: str) -> int:
        config = parse(["remote", *words, "--user-data-dir", str(tmp_path)], environ={})
        assert config.arguments is not None
        return cli.run(config.arguments, config)

    for name in (cli.KEY_VARIABLE, cli.CA_VARIABLE, cli.PROXY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "ca.pem"
    file.write_text(authority.pem, encoding="ascii")
    assert command("add", "one", far.url) == 1 and "--ca FILE" in capsys.readouterr().out
    assert command("add", "two", far.url, "--ca", str(file), "--proxy", proxy.url()) == 0
    assert f"certificates of its own, through {proxy.url()}" in capsys.readouterr().out and proxy.asked
    monkeypatch.setenv(cli.CA_VARIABLE, str(file))
    monkeypatch.setenv(cli.PROXY_VARIABLE, proxy.url(USER))
    proxy.user = f"me:{PASSWORD}"
    assert command("add", "three", far.url) == 0
    assert command("test", "three") == 0 and command("list", "three", "--json") == 0
    shown = capsys.readouterr()
    assert PASSWORD not in shown.out + shown.err and "p%40ss" not in shown.out + shown.err
    assert command("add", "four", far.url, "--ca", str(tmp_path / "missing.pem")) == 1
    assert command("list", "--proxy", proxy.url()) == 1


async def test_the_error_of_a_checked_address_is_typed(store: RemoteStore) -> None:
    connection = Connection(Server("far", "https://127.0.0.1:9/v1", reach=reach.PUBLIC))
    with pytest.raises(RemoteError, match="leads into this computer"):
        await connection.get("/models")
    await connection.close()

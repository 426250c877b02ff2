"""The guard's rules by themselves; tests/api has them over sockets."""

from __future__ import annotations

import pytest

from modules.api.middleware import Hosts, _same_host, host_name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:7860", "localhost"),
        ("[::1]:7860", "::1"),
        ("[::1]", "::1"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("", None),
        ("user@localhost", None),
        ("localhost:", None),
        ("localhost:80:90", None),
        ("localhost/x", None),
        ("[::1", None),
        ("[::1]x", None),
        ("::1", None),
        (":80", None),
        ("a b", None),
        ("löcalhost", None),
    ],
)
def test_host_names(header: str, name: str | None) -> None:
    assert host_name(header) == name


def test_loopback_takes_loopback_and_configured_names_only() -> None:
    hosts = Hosts(["My.Box."])
    for good in (b"localhost", b"127.9.9.9:1", b"[::1]", b"my.box:8080"):
        assert hosts.allowed(good), good
    for bad in (b"192.168.1.5", b"evil.com", b"localhost.evil.com", b"0.0.0.0", b"my.box.evil.com", b""):
        assert not hosts.allowed(bad), bad


def test_beyond_loopback_addresses_pass_and_names_do_not() -> None:
    hosts = Hosts(loopback_only=False)
    assert hosts.allowed(b"192.168.1.5:7860") and hosts.allowed(b"[fe80::1]:7860")
    assert not hosts.allowed(b"evil.com:7860")


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://localhost:7860", "localhost:7860", True),
        ("https://box.example", "box.example", True),
        ("https://box.example:443", "box.example", True),
        ("http://localhost", "localhost:80", True),
        ("http://localhost:7861", "localhost:7860", False),
        ("http://127.0.0.1:7860", "localhost:7860", False),
        ("null", "localhost", False),
        ("file://localhost", "localhost", False),
        ("http://localhost:7860/path", "localhost:7860", False),
        ("http://localhost.evil.com:7860", "localhost:7860", False),
    ],
)
def test_origins(origin: str, host: str, same: bool) -> None:
    assert _same_host(origin, host) is same

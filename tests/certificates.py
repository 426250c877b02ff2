"""A certificate authority of the test's own and a server's certificate from it, made here: RSA, DER and PEM by hand."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

_SMALL = [n for n in range(3, 2000, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2))]
_E = 65537


def _prime(bits: int) -> int:
    while True:
        n = secrets.randbits(bits) | (3 << (bits - 2)) | 1
        if n % _E != 1 and all(n % small for small in _SMALL) and all(pow(a, n - 1, n) == 1 for a in (2, 3, 5, 7)):
            return n


@dataclass(frozen=True)
class Key:
    p: int
    q: int

    @classmethod
    def make(cls) -> Key:
        return cls(_prime(1024), _prime(1024))

    @property
    def n(self) -> int:
        return self.p * self.q

    @property
    def d(self) -> int:
        return pow(_E, -1, (self.p - 1) * (self.q - 1))

    @property
    def public(self) -> bytes:
        return _sequence(_sequence(_oid("1.2.840.113549.1.1.1"), b"\x05\x00"), _bits(_sequence(_int(self.n), _int(_E))))

    def sign(self, data: bytes) -> bytes:
        """PKCS #1, SHA-256."""
        digest = _sequence(_sequence(_oid("2.16.840.1.101.3.4.2.1"), b"\x05\x00"), _tag(4, hashlib.sha256(data).digest()))
        padded = b"\0\1" + b"\xff" * (256 - 3 - len(digest)) + b"\0" + digest
        return pow(int.from_bytes(padded, "big"), self.d, self.n).to_bytes(256, "big")

    def pem(self) -> str:
        d, p, q = self.d, self.p, self.q
        return _pem("RSA PRIVATE KEY", _sequence(*map(_int, (0, self.n, _E, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p)))))


class Authority:
    """`pem` is its certificate."""

    def __init__(self, name: str = "Test authority") -> None:
        self._name, self._key = name, Key.make()
        extensions = [(_oid("2.5.29.19"), _sequence(b"\x01\x01\xff")), (_oid("2.5.29.15"), b"\x03\x02\x02\x04")]
        self.pem = self._certificate(name, self._key, extensions)

    def server(self, folder: Path, *names: str) -> ssl.SSLContext:
        """What a server of these names and addresses shows."""
        key = Key.make()
        entries = []
        for name in names:
            try:
                entries.append(_tag(0x87, ipaddress.ip_address(name).packed))
            except ValueError:
                entries.append(_tag(0x82, name.encode()))
        certificate = self._certificate(names[0], key, [(_oid("2.5.29.17"), _sequence(*entries))])
        file = folder / f"server-{secrets.token_hex(4)}.pem"
        file.write_text(certificate + key.pem(), encoding="ascii")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _certificate(self, name: str, key: Key, extensions: list[tuple[bytes, bytes]]) -> str:
        algorithm = _sequence(_oid("1.2.840.113549.1.1.11"), b"\x05\x00")
        now = datetime.datetime.now(datetime.timezone.utc)
        times = [_tag(0x18, (now + datetime.timedelta(days=days)).strftime("%Y%m%d%H%M%SZ").encode()) for days in (-2, 400)]
        number = _int(secrets.randbits(100))
        body = _sequence(
            _tag(0xA0, _int(2)), number, algorithm, _who(self._name), _sequence(*times), _who(name), key.public,
            _tag(0xA3, _sequence(*(_sequence(oid, _tag(4, value)) for oid, value in extensions))),
        )  # fmt: skip
        return _pem("CERTIFICATE", _sequence(body, algorithm, _bits(self._key.sign(body))))


def _tag(tag: int, data: bytes) -> bytes:
    size = len(data)
    if size < 128:
        return bytes((tag, size)) + data
    count = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(count))) + count + data


def _sequence(*parts: bytes) -> bytes:
    return _tag(0x30, b"".join(parts))


def _int(value: int) -> bytes:
    return _tag(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _bits(data: bytes) -> bytes:
    return _tag(3, b"\0" + data)


def _oid(text: str) -> bytes:
    first, second, *rest = map(int, text.split("."))
    data = bytearray((first * 40 + second,))
    for number in rest:
        digits = [number & 127]
        while number := number >> 7:
            digits.append(number & 127 | 128)
        data += bytes(reversed(digits))
    return _tag(6, bytes(data))


def _who(name: str) -> bytes:
    return _sequence(_tag(0x31, _sequence(_oid("2.5.4.3"), _tag(12, name.encode()))))


def _pem(what: str, data: bytes) -> str:
    text = base64.b64encode(data).decode("ascii")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {what}-----", *lines, f"-----END {what}-----", ""])

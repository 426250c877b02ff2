"""A hub on this machine for the download tests: model info with siblings, files with redirects and ranges, and every fault.

It speaks the parts of the hub's API that huggingface_hub's model_info and a plain GET use.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.unit.model_files import LLAMA, llama_tensors, safetensors_bytes, tokenizer_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL_LLAMA = {
    "config.json": json.dumps({**LLAMA, "vocab_size": 4096, "hidden_size": 64}).encode(),
    "tokenizer.json": json.dumps(tokenizer_json()).encode(),
    "model.safetensors": safetensors_bytes(llama_tensors({"vocab_size": 4096, "hidden_size": 64})),
}


@dataclass
class Faults:
    """What goes wrong. Lists are used up one request at a time; the last entry does not stay."""

    cut_after: list[int] = field(default_factory=list)  # close the connection after so many bytes of the body
    statuses: list[int] = field(default_factory=list)  # answer this instead of the file
    stall_s: float = 0.0  # after the body or its cut
    drip_s: float = 0.0  # send the body a byte at a time, this far apart
    stall_only: str = ""  # only for this file
    html: bool = False
    ignore_range: bool = False
    wrong_range: bool = False
    corrupt: int = 0  # so many times, flip the file's last byte
    pointer: bool = False
    redirect_to: str | None = None
    info_status: int | None = None
    info_html: bool = False
    gated: bool = False
    hold: threading.Event | None = None  # send half of each large file, then wait for this


class FakeHub:
    """`files` maps a path to its bytes; large=True paths are announced with a sha256, others with git's blob hash."""

    def __init__(self, files: dict[str, bytes], *, lie_about: dict[str, int] | None = None) -> None:
        self.files = files
        self.lies = lie_about or {}
        self.faults = Faults()
        self.requests: list[tuple[str, dict[str, str]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
                try:
                    hub._answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def file_requests(self) -> list[tuple[str, dict[str, str]]]:
        return [(path, headers) for path, headers in self.requests if not path.startswith("/api/")]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if path.startswith("/api/models/"):
            self._info(handler, path)
        elif "/resolve/" in path:
            target = self.faults.redirect_to or "/cdn/" + path.split("/resolve/")[1].split("/", 1)[1]
            _send(handler, 302, b"", {"Location": target})
        elif path.startswith("/cdn/"):
            self._file(handler, path.removeprefix("/cdn/"))
        else:
            _send(handler, 404, b"not found")

    def _info(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if self.faults.info_html:
            return _send(handler, 200, b"<!doctype html><title>Log in</title>", {"Content-Type": "text/html"})
        if self.faults.gated:
            return _send(handler, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.endswith("/refs"):
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": COMMIT} for name in ("main", "4.0bpw")]
            body = json.dumps({"branches": refs, "converts": [], "tags": []}).encode()
            return _send(handler, 200, body, {"Content-Type": "application/json"})
        if "/missing" in path:
            return _send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if self.faults.info_status:
            return _send(handler, self.faults.info_status, b"{}")
        siblings = [self._sibling(name, data) for name, data in self.files.items()]
        body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
        _send(handler, 200, body, {"Content-Type": "application/json"})
        return None

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.lies.get(name, len(data))
        row: dict[str, Any] = {
            "rfilename": name,
            "size": size,
            "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if name.endswith((".safetensors", ".gguf")):
            row["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return row

    def _file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        faults = self.faults
        data = self.files[name]
        if faults.statuses:
            return _send(handler, faults.statuses.pop(0), b"busy", {"Retry-After": "0"})
        if faults.html:
            return _send(handler, 200, b"<html>please log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if faults.pointer and name.endswith(".safetensors"):
            return _send(handler, 200, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        if faults.corrupt:
            faults.corrupt -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        wanted = handler.headers.get("Range")
        headers = {"ETag": '"x"', "Accept-Ranges": "bytes"}
        status = 200
        if wanted and not faults.ignore_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return _send(handler, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
            shown = start + 7 if faults.wrong_range else start
            headers["Content-Range"] = f"bytes {shown}-{len(data) - 1}/{len(data)}"
            status = 206
        body = data[start:]
        cut = faults.cut_after.pop(0) if faults.cut_after else None
        handler.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if faults.hold is not None and name.endswith((".safetensors", ".gguf")) and start == 0:
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            faults.hold.wait(60)
            body = body[len(body) // 2 :]
        for number in range(len(body) if faults.drip_s else 0):
            handler.wfile.write(body[number : number + 1])
            time.sleep(faults.drip_s)
        handler.wfile.write(body if cut is None else body[:cut])
        handler.wfile.flush()
        if faults.stall_s and faults.stall_only in name:
            time.sleep(faults.stall_s)
        if cut is not None:
            handler.close_connection = True
        return None


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(body)

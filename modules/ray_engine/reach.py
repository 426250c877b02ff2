"""Whether a Ray cluster can be reached and used, and in plain words why not."""

from __future__ import annotations

import contextlib
import os
import re
import socket

from modules.errors import AppError, BackendUnavailable

REACH_S = 3.0
# What opens a connection of HTTP/2, which gRPC speaks: the preface and an empty frame of settings; the answer is settings, too.
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_START = "Start one with `ray start --head --port=6379`, or leave --ray-address out for a Ray of our own."


def check_reachable(address: str) -> None:
    """Raises BackendUnavailable within seconds where nothing listens, or no gRPC server: Ray itself would try for half a minute
    and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACH_S) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                _check_grpc(address, connection)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackendUnavailable(f"There is no Ray cluster at {address}: {why}.", hint=_START) from error


def _check_grpc(address: str, connection: socket.socket) -> None:
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        connection.settimeout(REACH_S)
        connection.sendall(_HTTP2)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != 4:
        raise explain_connect(address, ConnectionError("it does not speak gRPC"))


def explain_connect(address: str, error: Exception) -> AppError:
    """What Ray's exception means for the user."""
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        versions = [f"Ray {ray} on Python {python.rstrip('.')}" for ray, python in re.findall(r"Ray: (\S+) Python: (\S+)", text)]
        theirs, ours = versions if len(versions) == 2 else ("another Ray or Python", "the version of here")
        return BackendUnavailable(
            f"The cluster at {address} runs {theirs}; here is {ours}.",
            hint="Give all its nodes the Ray and the Python of here, to the last figure of both.",
            detail={"stderr": text[-8192:]},
        )
    if "oken" in text and ("auth" in text.lower() or "UNAUTHENTICATED" in text):
        return BackendUnavailable(
            f"The Ray cluster at {address} asks for a token.",
            hint="Start the server with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set to the cluster's.",
            detail={"stderr": text[-8192:]},
        )
    return BackendUnavailable(
        f"What listens at {address} can't be used as a Ray cluster: {text[:300].rstrip('.')}.",
        hint="Give --ray-address the address that `ray start --head` printed; both sides need the same Ray and Python.",
        detail={"stderr": text[-8192:]},
    )

"""Whether a Ray cluster can be reached and used, and in plain words why not."""

from __future__ import annotations

import re
import socket
import sys

from modules.errors import AppError, BackendUnavailable

REACH_S = 3.0
_START = "Start one with `ray start --head --port=6379`, or leave --ray-address out for a Ray of our own."


def check_reachable(address: str) -> None:
    """Raises BackendUnavailable within seconds where nothing listens: Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackendUnavailable(f"There is no Ray cluster at {address}: {why}.", hint=_START) from error


def explain_connect(address: str, error: Exception) -> AppError:
    """What Ray's exception means for the user."""
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        import ray  # only a Ray that is there says this

        here = f"Ray {ray.__version__}, Python {sys.version.split()[0]}"
        found = re.search(r"started with: Ray: (\S+) Python: (\S+)", text)
        theirs = f"Ray {found[1]} on Python {found[2].rstrip('.')}" if found else "another Ray or Python"
        return BackendUnavailable(
            f"The cluster at {address} runs {theirs}; that is not what runs here.",
            hint=f"Give all its nodes the Ray and the Python of here ({here}).",
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

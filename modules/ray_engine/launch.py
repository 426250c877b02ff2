"""The environment variables of everything that speaks to Ray: the node, the gateway, and through them the replicas."""

from __future__ import annotations

import os
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OVERLAY = "ray"
LOOPBACK = "SWITCHYARD_RAY_LOOPBACK"  # set for a Ray of our own: nothing of it listens beyond 127.0.0.1

# One loop in the replica and in the handle: a token crosses in a third of the time. (RAY_SERVE_THROUGHPUT_OPTIMIZED would add an
# HTTP port in each replica and half a minute of draining it.)
SERVE = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A process that is started just after another's end may find its stdin closed by uvloop, and its own end is then never told.
    "RAY_USE_UVLOOP": "0",
}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # else everything that computes gives way to everything else
    "PYTHONWARNINGS": "ignore",
}
HEAD_LOST_S = 10  # Ray's own is a minute
CLUSTER_AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def local_env(token: str) -> dict[str, str]:
    """For a Ray of our own: loopback only, and a token, since other users of this machine reach loopback, too."""
    return {
        **QUIET,
        **SERVE,
        LOOPBACK: "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the switch that keeps Ray's own servers on 127.0.0.1, on any system
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PYTHONPATH": str(ROOT),
    }


def cluster_env(address: str) -> dict[str, str]:
    """For a cluster of somebody else's: its token, if it has one, comes from our own environment, which drops secrets."""
    auth = {name: os.environ[name] for name in CLUSTER_AUTH if name in os.environ}
    return {
        **QUIET,
        **SERVE,
        **auth,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if _on_loopback_only(address) else "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_LOST_S),
        "PYTHONPATH": str(ROOT),
    }


def _on_loopback_only(address: str) -> bool:
    """Ray takes 127.0.0.1 for this machine's name in the network; where the head listens on loopback alone, that is no use."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "::1", "[::1]"):
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: it asks for the route
            probe.connect(("192.0.2.1", 9))
            own = str(probe.getsockname()[0])
        socket.create_connection((own, int(port)), 1.0).close()
    except OSError:
        return True
    return False

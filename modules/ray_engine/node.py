"""`python -m modules.ray_engine.node`: the local Ray, or our place in a cluster; a child of the server that ends with it.

Reads one JSON line {"address": HOST:PORT or null, "folder", "cpus", "gpus"}, answers one: {"address"} or {"error"}. The end of
stdin ends Ray, also after a kill -9 of the server; the death of one of Ray's own processes ends this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from modules.errors import AppError, BackendUnavailable, one_line
from modules.ray_engine.reach import check_reachable, explain_connect
from modules.worker import take_over_stdout

OBJECT_STORE_BYTES = 100_000_000  # nothing of ours goes through it
POLL_S = 0.2
END_S = 5.0


def main() -> None:
    sink = take_over_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    wanted = json.loads(sys.stdin.buffer.readline() or b"{}")
    folder = Path(wanted["folder"])
    shutil.rmtree(folder, ignore_errors=True)  # what a run before this one may have left
    folder.mkdir(mode=0o700, parents=True)  # Ray's own folder in it is open to everyone
    try:
        node = _join(wanted, folder) if wanted["address"] else _start(wanted, folder)
    except AppError as error:
        sink.write(json.dumps({"error": error.to_wire()}).encode() + b"\n")
        os._exit(1)
    address = wanted["address"] or node.gcs_address
    sink.write(json.dumps({"address": address, "pid": os.getpid()}).encode() + b"\n")
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    while node is not None and not ended.wait(POLL_S):
        if dead := node.dead_processes():
            print(f"ray: {', '.join(kind for kind, _ in dead)} ended", file=sys.stderr, flush=True)
            break
    if node is None:
        ended.wait()
    else:
        _end_all(node)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0 if ended.is_set() else 3)


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.buffer.read()
    ended.set()


def _end_all(node: Any) -> None:
    """Ray's processes, and what they started: without the head these would try for a minute to tell it of their end."""
    import psutil

    members = psutil.Process().children(recursive=True)
    node.kill_all_processes(
        check_alive=False, allow_graceful=False
    )  # the raylet first, which else starts others for those killed
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, timeout=END_S)


def _start(wanted: dict[str, Any], folder: Path) -> Any:
    """A head of our own. Ray's `Node` is what `ray start --head` makes; that would add a fixed port and three processes."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LocalNode(Node):  # type: ignore[misc]  # Ray is not there when mypy runs
        def start_monitor(self) -> None:
            """No cluster to grow."""

        def start_log_monitor(self) -> None:
            """The workers' words come over their pipes."""

        def start_api_server(self, **_: Any) -> None:
            """No dashboard."""

    parameters = RayParams(
        node_ip_address="127.0.0.1",
        num_cpus=wanted["cpus"],
        num_gpus=wanted["gpus"],
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(folder / "r"),
        include_dashboard=False,
        dashboard_agent_listen_port=0,
    )
    try:
        return LocalNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    except Exception as error:
        raise BackendUnavailable(f"Ray did not start: {one_line(error)}.", hint="Run the server with --verbose.") from error


def _join(wanted: dict[str, Any], folder: Path) -> Any:
    """A place in the cluster that runs nothing: a program can only speak to a cluster from one of its nodes. None where this
    machine is one already."""
    check_reachable(wanted["address"])
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._raylet import GcsClient

    try:
        host = services.get_node_ip_address(wanted["address"])
        nodes = GcsClient(address=wanted["address"]).get_all_node_info(timeout=10).values()
        if any(n.state == 0 and n.node_manager_address in (host, "127.0.0.1") for n in nodes):
            return None
        parameters = RayParams(
            gcs_address=wanted["address"],
            node_ip_address=host,
            num_cpus=0,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            temp_dir=str(folder / "r"),
            dashboard_agent_listen_port=0,
        )
        return Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=True)
    except Exception as error:
        raise explain_connect(wanted["address"], error) from error


if __name__ == "__main__":
    main()

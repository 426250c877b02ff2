"""A download with its hash checked against what curl makes of the same line: ours / curl, from a server on this machine.

    python benchmarks/download_speed.py [--mb 1000] [--rounds 5]

The server sends from memory as fast as the kernel takes it, so that only the two clients differ: both write the file to the same
disk, ours also hashes it (sha256), syncs it and gives it its name. The rounds alternate; the medians are compared.
GOAL: at least 0.8.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common import report

from modules.download.hub import Hub
from modules.download.plan import RepoFile
from modules.download.transfer import fetch_file


def serve(path: str) -> None:
    """In a process of its own: the file at any address, its port on stdout."""
    size = os.path.getsize(path)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            with open(path, "rb") as file:
                self.connection.sendfile(file)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def curl(url: str, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["curl", "--silent", "--fail", "--output", str(target), url], check=True)
    return time.perf_counter() - started


def ours(url: str, target: Path, file: RepoFile) -> float:
    started = time.perf_counter()
    asyncio.run(fetch_file(Hub(url), url, file, target, lambda done: None))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if not shutil.which("curl"):
        raise SystemExit("curl is not here to compare with.")
    with tempfile.TemporaryDirectory(prefix="switchyard-bench-") as folder:
        source = Path(folder) / "source.bin"
        digest = hashlib.sha256()
        with source.open("wb") as out:
            for _ in range(args.mb):
                block = os.urandom(1_000_000)
                digest.update(block)
                out.write(block)
        file = RepoFile("model.safetensors", source.stat().st_size, digest.hexdigest())
        process = subprocess.Popen([sys.executable, __file__, "--serve", str(source)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            compare(f"http://127.0.0.1:{int(process.stdout.readline())}/file", Path(folder), file, args.rounds)
        finally:
            process.kill()
            process.wait()
    return None


def compare(url: str, folder: Path, file: RepoFile, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"curl": [], "switchyard": []}
    target = folder / "model.safetensors"
    for number in range(rounds + 1):  # the first of each warms up
        for name in seconds:
            target.unlink(missing_ok=True)
            taken = curl(url, target) if name == "curl" else ours(url, target, file)
            if number:
                seconds[name].append(taken)
    rates = {name: file.size / statistics.median(times) / 1e6 for name, times in seconds.items()}
    with report("download_speed") as figures:
        figures.update(file_mb=round(file.size / 1e6), rounds=rounds)
        for name, rate in rates.items():
            figures[name] = {"mb_per_s": round(rate, 1), "seconds": [round(value, 3) for value in seconds[name]]}
        figures["ours_over_curl"] = round(rates["switchyard"] / rates["curl"], 3)


if __name__ == "__main__":
    main()

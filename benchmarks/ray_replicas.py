"""Throughput against replicas, through the whole server: eight clients on one and on two replicas.

Echo at a fixed rate with one answer at a time in each replica costs no processor time: its ratio is what the routing gives.
The bundled model with one thread for each replica computes: its ratio is what these cores give.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import httpx
from common import Server, report

CLIENTS = 8


def throughput(server: Server, model: str, message: str, tokens: int, rounds: int) -> float:
    """Tokens per second of all clients together, each asking `rounds` times in a row."""
    counted: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=600) as http:
            for _ in range(rounds):
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": message}],
                    "max_tokens": tokens,
                    "ignore_eos": True,
                }
                answer = http.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                counted.append(answer.json()["usage"]["completion_tokens"])

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counted) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    wren = "wren-6m-gguf/wren-6m-F16.gguf"
    work: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
        "echo at 50 tok/s": ("echo", "echo", {"slots": 1}, "[[echo tokens=50 rate=50]] x", 50),
        "wren-6m": (wren, "llamacpp", {"threads": 1}, "Tell me a story about a little bird.", 200),
    }
    with report("ray_replicas") as figures:
        found: dict[str, dict[int, float]] = {name: {} for name in work}
        for replicas in (1, 2):
            flags = ("--engine", "ray", "--ray-replicas", str(replicas), "--ray-routing", "least-loaded", "--ray-cpus", "0.5")
            with Server(*flags, "--nowebui", "--no-model") as server:
                for name, (model, loader, options, message, tokens) in work.items():
                    server.load(model, loader, **options)
                    throughput(server, model, message, tokens, 1)
                    found[name][replicas] = throughput(server, model, message, tokens, given.rounds)
        for name, by_replicas in found.items():
            ratio = by_replicas[2] / by_replicas[1]
            rates = {f"{count} replicas tok_s": round(rate, 1) for count, rate in by_replicas.items()}
            figures[name] = {**rates, "ratio": round(ratio, 2)}
        figures["clients"] = CLIENTS


if __name__ == "__main__":
    main()

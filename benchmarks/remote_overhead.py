"""What a model costs more for being on another server: a second Switchyard here, asked directly and through the first."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from typing import Any

from api_overhead import Connection, together
from common import Server, report


async def measure(connections: dict[str, list[Connection]], tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, the two ways in turn: milliseconds to the first token and per token of all streams together."""
    streams = len(connections["direct"])
    firsts: dict[str, list[float]] = {way: [] for way in connections}
    rates: dict[str, list[float]] = {way: [] for way in connections}
    for turn in range(rounds + 1):
        for way, opened in connections.items():
            answers = await together(opened, [f"[[echo tokens={tokens}]] x"] * streams, tokens)
            bad = [a for a in answers if a["error"] is not None or not a["stamps"]]
            assert not bad, (way, bad[0])
            if turn == 0:  # warms everything up
                continue
            firsts[way] += [answer["stamps"][0] - answer["begun"] for answer in answers]
            begun, ended = min(a["begun"] for a in answers), max(a["stamps"][-1] for a in answers)
            rates[way].append(tokens * streams / (ended - begun))
    made = {
        way: {"ttft_p50_ms": round(1000 * statistics.median(firsts[way]), 2), "tok_s": round(statistics.median(rates[way]))}
        for way in connections
    }
    added = 1000 / made["remote"]["tok_s"] - 1000 / made["direct"]["tok_s"]
    return {
        **made,
        "ttft_added_p50_ms": round(made["remote"]["ttft_p50_ms"] - made["direct"]["ttft_p50_ms"], 2),
        "per_token_added_ms": round(added, 4),
        "ratio_at_full_speed": round(made["remote"]["tok_s"] / made["direct"]["tok_s"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    flags = ("--nowebui", "--no-background-install", "--model", "echo")
    with report("remote_overhead") as figures, Server(*flags) as far, Server(*flags) as near:
        near.http.post("/v1/internal/remotes", json={"name": "far", "url": far.url}).raise_for_status()
        near.load("remote/far/echo", "remote")
        for streams in (1, 8):
            connections = {
                "direct": [Connection(far.url) for _ in range(streams)],
                "remote": [Connection(near.url, "remote/far/echo") for _ in range(streams)],
            }
            figures[f"{streams} streams"] = asyncio.run(measure(connections, arguments.tokens, arguments.rounds))


if __name__ == "__main__":
    main()

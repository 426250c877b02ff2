"""Loads and unloads, alternating two models: the parent's memory, file descriptors and children stay as they are.

The first cycles fill what has a bound (the store's page cache, the heap's free lists), so the growth is told for the first and
for the last 100.
"""

from __future__ import annotations

import argparse
from typing import Any

import psutil
from common import Server, linear_fit, report, rss_anon

SPAN = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs=2, default=["echo", "wren-6m-gguf/wren-6m-F16.gguf"])
    parser.add_argument("--cycles", type=int, default=400, help="at least 200")
    arguments = parser.parse_args()
    with report("load_cycles") as figures, Server("--no-model", "--nowebui", wait_ready=False) as server:
        server.wait("/ui-api/models")
        parent = psutil.Process(server.process.pid)
        rows: list[dict[str, Any]] = []
        for cycle in range(arguments.cycles):
            server.load(arguments.models[cycle % 2])
            reply = server.http.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
            )
            reply.raise_for_status()
            server.unload()
            rows.append({"rss": rss_anon(parent.pid), "fds": parent.num_fds(), "children": len(parent.children(recursive=True))})
        settled = rows[-SPAN:]
        slope, fit = linear_fit([row["rss"] / 1024 for row in settled])
        first_slope, first_fit = linear_fit([row["rss"] / 1024 for row in rows[SPAN // 10 : SPAN]])
        figures.update(
            cycles=arguments.cycles,
            models=arguments.models,
            rss_anon_mib={
                f"after {number}": round(rows[number - 1]["rss"] / 2**20, 1)
                for number in (SPAN // 10, *range(SPAN, len(rows) + 1, SPAN))
            },
            first_slope_kib_per_cycle=round(first_slope, 2),
            first_r_squared=round(first_fit, 3),
            slope_kib_per_cycle=round(slope, 2),
            r_squared=round(fit, 3),
            file_descriptors={"first": settled[0]["fds"], "last": rows[-1]["fds"], "most": max(r["fds"] for r in settled)},
            children={"first": settled[0]["children"], "last": rows[-1]["children"]},
        )


if __name__ == "__main__":
    main()

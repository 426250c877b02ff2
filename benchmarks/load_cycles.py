"""100 loads and unloads, alternating two models: the parent's memory, file descriptors and children stay as they are."""

from __future__ import annotations

import argparse
from typing import Any

import psutil
from common import Server, linear_fit, report, rss_anon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs=2, default=["echo", "wren-6m-gguf/wren-6m-F16.gguf"])
    parser.add_argument("--cycles", type=int, default=100)
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
        settled = rows[len(rows) // 10 :]
        slope, fit = linear_fit([row["rss"] / 1024 for row in settled])
        figures.update(
            cycles=arguments.cycles,
            models=arguments.models,
            rss_anon_mib_after_settling=round(settled[0]["rss"] / 2**20, 1),
            rss_anon_mib_at_the_end=round(rows[-1]["rss"] / 2**20, 1),
            slope_kib_per_cycle=round(slope, 2),
            r_squared=round(fit, 3),
            file_descriptors={"first": settled[0]["fds"], "last": rows[-1]["fds"], "most": max(r["fds"] for r in settled)},
            children={"first": settled[0]["children"], "last": rows[-1]["children"]},
        )


if __name__ == "__main__":
    main()

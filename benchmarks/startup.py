"""From the command to the page: first HTTP answer, splash page, UI; and what the parent costs when idle."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time

import psutil
from common import ROOT, Overlays, Server, report


def import_seconds(module: str) -> float:
    """How long a bare import takes in the parent's environment."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    python = str(Overlays.find(ROOT).python("parent"))
    return float(
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    )


def one_start() -> dict[str, float]:
    with Server("--no-model", wait_ready=False) as server:
        splash = server.wait("/")
        api = server.wait("/v1/models")
        while "gradio" not in server.http.get("/").text.lower() or server.http.get("/config").status_code != 200:
            time.sleep(0.01)
        ui = time.perf_counter() - server.started
        parent = psutil.Process(server.process.pid)
        time.sleep(5)
        before, begun = parent.cpu_times(), time.perf_counter()
        time.sleep(20)
        after, seconds = parent.cpu_times(), time.perf_counter() - begun
        cpu = (after.user + after.system - before.user - before.system) / seconds
        return {"splash_s": splash, "api_s": api, "ui_s": ui, "rss_mib": parent.memory_info().rss / 2**20, "idle_cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    count = parser.parse_args().repetitions
    with report("startup") as figures:
        imports, starts = [], []
        for _ in range(count):
            imports.append(import_seconds("gradio"))
            starts.append(one_start())
        median = {name: round(statistics.median(s[name] for s in starts), 4) for name in starts[0]}
        figures.update(median, gradio_import_s=round(statistics.median(imports), 3), repetitions=count)
        figures["ui_after_gradio_import_s"] = round(figures["ui_s"] - figures["gradio_import_s"], 3)


if __name__ == "__main__":
    main()

"""A thousand models in the list: how long the page's and the API's lists take, and whether the server answers meanwhile.

    python benchmarks/list_models.py [--models 1000]

Half are Hugging Face folders, half GGUF files: hard links of the bundled models, each with its own header to be read.
GOAL: at most 1 s for the list; the longest wait of /health meanwhile tells whether the event loop was held up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from common import ROOT, Server, report


def make_models(folder: Path, count: int) -> None:
    source = ROOT / "models" / "wren-6m"
    gguf = next((ROOT / "models" / "wren-6m-gguf").glob("*.gguf"))
    for number in range(count):
        if number % 2:
            os.link(gguf, folder / f"model-{number:05}.gguf")
            continue
        (folder / f"model-{number:05}").mkdir()
        for file in source.iterdir():
            if file.is_file():
                os.link(file, folder / f"model-{number:05}" / file.name)


class Watch:
    """The longest wait of /health while something else is asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.longest = 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.over.is_set():
                started = time.perf_counter()
                http.get("/v1/internal/health")
                self.longest = max(self.longest, time.perf_counter() - started)
                time.sleep(0.005)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def timed(server: Server, path: str) -> tuple[float, int]:
    started = time.perf_counter()
    answer = server.http.get(path)
    answer.raise_for_status()
    return time.perf_counter() - started, len(answer.content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=".list-models-", dir=ROOT))  # hard links stay on one disk
    try:
        make_models(folder, args.models)
        with report("list_models") as figures:
            figures["models"] = args.models
            measure(folder, args.repetitions, figures)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, repetitions: int, figures: dict[str, Any]) -> None:
    data = folder / ".data"
    flags = ("--no-model", "--nowebui", "--model-dir", str(folder), "--user-data-dir", str(data))
    with Server(*flags) as server:
        figures["first_time_s"] = round(timed(server, "/ui-api/models")[0], 3)  # every header is read
    with Server(*flags) as server, Watch(server.url) as watch:
        after_a_restart, size = timed(server, "/ui-api/models")
        warm = [timed(server, "/ui-api/models")[0] for _ in range(repetitions)]
        internal = [timed(server, "/v1/internal/model/list")[0] for _ in range(repetitions)]
    figures.update(
        after_a_restart_s=round(after_a_restart, 3),
        warm_s=round(statistics.median(warm), 3),
        internal_list_s=round(statistics.median(internal), 3),
        body_kb=round(size / 1000),
        longest_wait_of_another_request_s=round(watch.longest, 3),
        repetitions=repetitions,
    )


if __name__ == "__main__":
    main()

"""A model beside programs that use every core: tokens per second, with libgomp's own long spinning and as workers are started."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from common import ROOT, report

MODELS = (
    "wren-6m@transformers",
    "wren-6m-gguf/wren-6m-F16.gguf@llamacpp",
    "wren-6m-gptq-4bit-128g@gptq_for_llama",
    "wren-rwkv-7m@rwkv",
    "wren-opt-6m@flexgen",
)
LIBGOMPS_OWN = "300000"  # turns, where nothing is set (GCC's manual, "GOMP_SPINCOUNT")


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def tokens_per_second(model: str, tokens: int, spins: str | None) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, str(ROOT / "server.py"), "bench", model, "-m", str(tokens), "-r", "2", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model} did not answer:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["results"][0]["decode_tok_s"]["mean"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL@LOADER")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    programs = os.cpu_count() or 1
    with report("busy_cores") as figures:
        figures["programs"] = programs
        for model in args.models:
            row = {"alone": tokens_per_second(model, args.tokens, None)}
            row["alone_long_spins"] = tokens_per_second(model, args.tokens, LIBGOMPS_OWN)
            with busy(programs):
                row["busy"] = tokens_per_second(model, args.tokens, None)
                row["busy_long_spins"] = tokens_per_second(model, args.tokens, LIBGOMPS_OWN)
            figures[model.partition("@")[2]] = {name: round(value, 1) for name, value in row.items()}


if __name__ == "__main__":
    main()

"""GPTQ on this CPU against llama.cpp and Transformers: prefill, decode and memory of one shape in every width.

    python benchmarks/gptq_speed.py --base llama-1.1b --gguf llama-1.1b-Q4_0.gguf --checkpoints FOLDER

The base model is made by make_model.py, its GGUF by `server.py convert`; missing checkpoints are made by make_gptq.py. Every
engine is a process of its own that holds its model; they run in turn, and ratios are taken within a round, so that what else
the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from pathlib import Path
from typing import Any

from common import ROOT, Loop, report

from modules.overlays import Overlays

CHECKPOINTS = {
    "4-bit": ("--bits", "4"),
    "3-bit": ("--bits", "3"),
    "2-bit": ("--bits", "2"),
    "8-bit": ("--bits", "8"),
    "4-bit desc_act": ("--bits", "4", "--desc-act"),
}
LLAMA, BF16, EXACT = "llama.cpp Q4_0", "transformers bf16", "4-bit exact"


class Engine(Loop):
    """benchmarks/gptq_loop.py in a backend's environment; `weights` in bytes."""

    def __init__(self, overlay: str, engine: str, model: Path, threads: int, how: str) -> None:
        super().__init__(overlay, "gptq_loop.py", engine, model, "--threads", threads, "--how", how)
        self.weights = sum(f.stat().st_size for f in ([model] if model.is_file() else model.glob("*.safetensors")))


def checkpoint(base: Path, folder: Path, name: str) -> Path:
    """The checkpoint of that name, made when it is not there."""
    path = folder / name.replace(" ", "-")
    if not (path / "model.safetensors").is_file():
        python = str(Overlays.find(ROOT).python("transformers"))
        subprocess.run(
            [python, str(ROOT / "benchmarks" / "make_gptq.py"), str(base), str(path), *CHECKPOINTS[name]],
            check=True,
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument(
        "--only", default=",".join((*CHECKPOINTS, EXACT, BF16)), help="beside llama.cpp; names separated by commas"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, help="roughly")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="gptq_speed")
    arguments = parser.parse_args()

    names = [name.strip() for name in arguments.only.split(",") if name.strip()]
    loops = {LLAMA: Engine("llamacpp", "llama_cpp", arguments.gguf, arguments.threads, "")}
    for name in names:
        if name == BF16:
            loops[name] = Engine("transformers", "transformers", arguments.base, arguments.threads, "bfloat16")
        else:
            path = checkpoint(arguments.base, arguments.checkpoints, "4-bit" if name == EXACT else name)
            kernel = "exact" if name == EXACT else "int8"
            loops[name] = Engine("transformers", "gptq", path, arguments.threads, kernel)
    rounds: list[dict[str, dict[str, Any]]] = []
    prompt = "Once upon a time there was a small bird who wanted to see the sea. " * (arguments.prompt_tokens // 16)
    own = next(loop for name, loop in loops.items() if name not in (LLAMA, BF16))
    length = int(own.run(prompt, 2)["prompt_tokens"])
    for loop in loops.values():
        loop.run(prompt, 2)
    for _ in range(arguments.repetitions):
        rounds.append({name: loop.run(prompt, arguments.tokens) for name, loop in loops.items()})
    with report(arguments.name) as figures:
        figures["tokens"], figures["repetitions"], figures["threads"] = arguments.tokens, arguments.repetitions, arguments.threads
        figures["prompt_tokens"] = length
        for name, loop in loops.items():
            figures[name] = summary(name, loop, rounds, length)
    for loop in loops.values():
        loop.close()


def summary(name: str, loop: Engine, rounds: list[dict[str, dict[str, Any]]], length: int) -> dict[str, Any]:
    """Medians of one engine, and of its ratios to the others within each round."""

    def prefill(run: dict[str, Any]) -> float:
        return length / float(run["ttft_s"])

    def ratio(other: str, rate: Any) -> float:
        return round(statistics.median(rate(r[name]) / rate(r[other]) for r in rounds), 3)

    def decode(run: dict[str, Any]) -> float:
        return float(run["decode_tok_s"])

    found: dict[str, Any] = {
        "decode_tok_s": round(statistics.median(decode(r[name]) for r in rounds), 2),
        "prefill_tok_s": round(statistics.median(prefill(r[name]) for r in rounds), 1),
        "weights_mib": round(loop.weights / 2**20),
        "memory_mib": round(max(r[name]["rss_anon"] for r in rounds) / 2**20),
    }
    for other in (LLAMA, BF16, "4-bit"):
        if other in rounds[0] and other != name:
            found[f"decode / {other}"], found[f"prefill / {other}"] = ratio(other, decode), ratio(other, prefill)
    return found | loop.about


if __name__ == "__main__":
    main()

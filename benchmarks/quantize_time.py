"""Time and memory to quantise, ours against GPTQModel's in turn: same model, settings, calibration windows and threads.

    ./start_linux.sh run benchmarks/quantize_time.py --gptqmodel ENVIRONMENT/bin/python [--memory-model FOLDER]

From the folder on disk to the checkpoint on disk, the second run in each process (GPTQModel compiles parts of itself in the
first). Processor seconds stand beside seconds: on a machine that does other things they are the steadier figure. The memory part
quantises two blocks of a larger model: peak over what the process held before, beside the sizes of a block and of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, report

from modules.overlays import Overlays

sys.path.insert(0, str(ROOT))


def run(python: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    script = str(ROOT / "benchmarks" / "quantize_run.py")
    # in the folder: GPTQModel leaves its logs where it runs
    command = [str(python), script, str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{job['engine']} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(arguments: argparse.Namespace, ours: Path, base: Path, folder: Path) -> dict[str, Any]:
    job = {
        "base": str(base), "out": str(folder / "out"), "calibration": "bundled", "nsamples": arguments.nsamples, "seqlen": 512,
        "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damp": 0.01, "runs": 2, "threads": arguments.threads,
    }  # fmt: skip
    rounds: dict[str, list[dict[str, Any]]] = {"switchyard": [], "gptqmodel": []}
    for _ in range(arguments.rounds):
        for engine, python in (("switchyard", ours), ("gptqmodel", arguments.gptqmodel)):
            rounds[engine].append(run(python, job | {"engine": engine}, folder))
            print(engine, rounds[engine][-1], file=sys.stderr)
    figures: dict[str, Any] = {"nsamples": arguments.nsamples, "seqlen": 512, "bits": 4, "group_size": 128}
    for engine, results in rounds.items():
        for key in ("seconds", "cpu_seconds"):
            figures[f"{engine}_{key}"] = [round(result["runs"][-1][key], 2) for result in results]
        figures[f"{engine}_peak_mb"] = round(max(result["peak_bytes"] for result in results) / 1e6)
    figures["gptqmodel_version"] = rounds["gptqmodel"][0]["version"]
    for key, name in (("seconds", "time_ratio"), ("cpu_seconds", "cpu_time_ratio")):
        pairs = zip(figures[f"switchyard_{key}"], figures[f"gptqmodel_{key}"], strict=True)
        figures[name] = round(statistics.median(a / b for a, b in pairs), 3)
    figures["peak_memory_ratio"] = round(figures["switchyard_peak_mb"] / figures["gptqmodel_peak_mb"], 3)
    return figures


def memory(arguments: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """Two blocks of a larger model: the peak is reached in each."""
    base = arguments.memory_model
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    job = {
        "engine": "switchyard", "base": str(base), "out": str(folder / "out"), "calibration": "bundled", "nsamples": 8,
        "seqlen": 512, "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damp": 0.01, "runs": 1, "blocks": 2,
        "threads": arguments.threads,
    }  # fmt: skip
    found = run(python, job, folder)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    packed = config["num_hidden_layers"] * block * 4.15625 / 8 + 2 * vocab * hidden * 2
    return {
        "memory_model": base.name,
        "base_mb": round(sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e6),
        "packed_mb": round(packed / 1e6),
        "block_float32_mb": round(block * 4 / 1e6),
        "embedding_float32_mb": round(vocab * hidden * 4 / 1e6),
        "hessian_mb": round(ffn * ffn * 4 / 1e6),
        "hidden_states_mb": round(8 * 512 * hidden * 4 / 1e6),
        "peak_over_start_mb": round((found["peak_bytes"] - found["before_bytes"]) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment with GPTQModel; without it no comparison")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory-model", type=Path, help="a larger Llama folder (make_model.py) for the memory figures")
    arguments = parser.parse_args()
    ours = Overlays.find(ROOT).python("transformers")
    with report("quantize_time") as figures, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.gptqmodel:
            base = folder / "llama-29m"
            make = [str(ours), str(ROOT / "benchmarks" / "make_model.py"), str(base), "--shape", "29m"]
            subprocess.run(make, check=True, capture_output=True)
            figures.update({"model": "llama-29m", "threads": arguments.threads}, **compare(arguments, ours, base, folder))
        if arguments.memory_model:
            figures.update(memory(arguments, ours, folder))


if __name__ == "__main__":
    main()

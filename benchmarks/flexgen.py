"""FlexGen's two promises, on random OPTs: many prompts as a batch against one by one, and memory under offloading.

Throughput: 32 prompts × 32 tokens through the API one after another, then as a batch of the same server, in turn, same settings.
Memory: the worker's peak (VmHWM, Linux) with the weights on disk, above that of a worker with a tiny model, over what the
percentages promise (loaders/_flexgen_plan.py: main_memory_bytes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import Server, report, run_in

from loaders._flexgen_plan import main_memory_bytes, plan_of
from loaders.flexgen import SPEC
from modules.detect.opt import opt_shape

WORDS = "river stone small brown dog garden window paper light morning cat house tree story".split()


def make(folder: Path, name: str, hidden: int, layers: int) -> Path:
    out = folder / name
    run_in("flexgen", "benchmarks/flexgen_model.py", out, hidden, layers)
    return out


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Prompts of different lengths, greedy, exactly `tokens` tokens each."""
    texts = [" ".join(WORDS[(n + i) % len(WORDS)] for i in range(6 + n % 9)) for n in range(count)]
    return [{"prompt": text, "max_tokens": tokens, "temperature": 0, "ban_eos_token": True} for text in texts]


def one_by_one(server: Server, requests: list[dict[str, Any]]) -> float:
    """Tokens per second."""
    begun, tokens = time.perf_counter(), 0
    for body in requests:
        answer = server.http.post("/v1/completions", json=body)
        answer.raise_for_status()
        tokens += answer.json()["usage"]["completion_tokens"]
    return tokens / (time.perf_counter() - begun)


def as_batch(server: Server, requests: list[dict[str, Any]]) -> float:
    """Tokens per second, from the start of the batch to its last result on the disk."""
    lines = [
        json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body})
        for n, body in enumerate(requests)
    ]
    batch = server.http.post("/ui-api/batches", json={"name": "benchmark.jsonl"}).json()["id"]
    server.http.post(f"/ui-api/batches/{batch}/input", json={"text": "\n".join(lines), "offset": 0}).raise_for_status()
    begun = time.perf_counter()
    server.http.post(f"/ui-api/batches/{batch}/start", json={}).raise_for_status()
    while (view := server.http.get(f"/ui-api/batches/{batch}").json())["state"] in ("waiting", "running"):
        time.sleep(0.01)
    took = time.perf_counter() - begun
    if view["state"] != "done" or view["failed"]:
        raise SystemExit(f"The batch did not end well: {view}")
    return float(view["completion_tokens"] / took)


def throughput(model: Path, repetitions: int) -> dict[str, Any]:
    requests = bodies(32, 32)
    with Server("--nowebui", "--no-model", "--model-dir", str(model.parent)) as server:
        server.load(model.name, "flexgen", gpu_batch_size=32)
        one_by_one(server, requests[:2])
        pairs = [(one_by_one(server, requests), as_batch(server, requests)) for _ in range(repetitions)]
    singles, batches = zip(*pairs, strict=True)
    return {
        "prompts": 32,
        "tokens_each": 32,
        "one_by_one_tok_s": round(statistics.median(singles), 1),
        "batch_tok_s": round(statistics.median(batches), 1),
        "ratio_median": round(statistics.median(b / s for s, b in pairs), 2),
    }


def peak(server: Server) -> int:
    """The worker's VmHWM in bytes."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    worker = next(child for child in children if "modules.worker" in " ".join(child.cmdline()))
    lines = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory(model: Path, tiny: Path, **options: Any) -> dict[str, Any]:
    """Peak above a tiny model's worker, over the promise, with a block of 8 at work."""
    requests, rows = bodies(8, 16), 8
    peaks = []
    for chosen in (tiny, model):
        with Server("--nowebui", "--no-model", "--model-dir", str(model.parent)) as server:
            server.load(chosen.name, "flexgen", gpu_batch_size=rows, **options)
            as_batch(server, requests)
            peaks.append(peak(server))
    shape = opt_shape(json.loads((model / "config.json").read_text(encoding="utf-8")))
    plan = plan_of({o.name: o.default for o in SPEC.options} | {"gpu_batch_size": rows} | options, cuda=False)
    promised = main_memory_bytes(shape, plan, rows, 32, 16)
    used = peaks[1] - peaks[0]
    return {
        **options,
        "weights_mb": round(sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e6),
        "promised_mb": round(promised / 1e6),
        "peak_mb": round(used / 1e6),
        "libraries_mb": round(peaks[0] / 1e6),
        "ratio": round(used / promised, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="switchyard-opt-") as name, report("flexgen") as figures:
        folder = Path(name)
        tiny = make(folder, "opt-tiny", 64, 1)
        figures["throughput"] = throughput(make(folder, "opt-125m", 768, 12), arguments.repetitions)
        large = make(folder, "opt-1b", 2048, 20)
        figures["memory"] = [
            memory(large, tiny, w_percent="0,0,100", cache_percent="0,100,0"),
            memory(large, tiny, w_percent="0,40,60", cache_percent="0,100,0"),
        ]


if __name__ == "__main__":
    main()

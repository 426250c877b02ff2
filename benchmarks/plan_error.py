"""The planner's estimates against what was measured: memory and speed of each loader, on the bundled models and 1.1B shapes.

Each model is loaded in its worker and generates with its context filled. The measured memory is the peak of what the process
holds itself (anonymous pages; sampled), its libraries' pages, and of the model's mapped file the pages that a second generation
reads: those the kernel may drop without harm (what was only read to be converted) are no need. VmHWM is given beside it. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Overlays, report, run_in

from modules.detect import inspect
from modules.load_options import complete_options
from modules.plan.admission import need_of
from modules.plan.machine import measure_bandwidth, this_machine
from modules.plan.planner import tokens_per_second
from modules.registry import discover
from modules.schema import GenerationRequest, StopParams, TokenEvent
from modules.worker_client import WorkerClient

ANSWER = 12
MB = 1_000_000
_MAP = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S{4} \S+ \S+ \d+\s+(\S.*)?$")
BUNDLED = [
    ("wren-6m", "transformers", {}),
    ("wren-6m-gguf/wren-6m-F16.gguf", "llamacpp", {}),
    ("wren-6m-gptq-4bit-128g", "gptq_for_llama", {}),
    ("wren-6m-gptq-4bit-128g", "autogptq", {}),
    ("wren-rwkv-7m", "rwkv", {}),
    ("wren-opt-6m", "flexgen", {}),
]
SHORT = {"ctx_size": 256}
QUANTISED = {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attn": "on"}
LARGE: list[tuple[str, str, dict[str, Any]]] = [
    ("gguf", "llamacpp", {"ctx_size": 2048}),
    ("gguf", "llamacpp", {"ctx_size": 2048, **QUANTISED}),
    ("gguf", "llamacpp", {"ctx_size": 256, "no_mmap": True}),
    ("gguf-Q8_0", "llamacpp", SHORT),
    ("gguf-Q4_K_M", "llamacpp", SHORT),
    ("gptq", "gptq_for_llama", {"ctx_size": 1024, "kernel": "int8"}),
    ("gptq", "gptq_for_llama", {"ctx_size": 256, "kernel": "exact"}),
    ("gptq", "autogptq", SHORT),
    ("hf", "transformers", {"ctx_size": 256, "dtype": "float32"}),
    ("hf", "transformers", {"ctx_size": 256, "dtype": "bfloat16"}),
    ("hf", "transformers", {"ctx_size": 256, "load_in_8bit": True}),
    ("hf", "transformers", {"ctx_size": 256, "load_in_4bit": True}),
    ("rwkv", "rwkv", SHORT),
    ("rwkv", "rwkv", {"ctx_size": 256, "strategy": "cpu bf16"}),
    ("opt", "flexgen", SHORT),
    ("opt", "flexgen", {"ctx_size": 256, "w_percent": "0,100,0"}),
    ("opt", "flexgen", {"ctx_size": 256, "w_percent": "0,40,60", "cache_percent": "0,100,0"}),
    ("opt", "flexgen", {"ctx_size": 256, "w_percent": "0,0,100", "cache_percent": "0,100,0"}),
]


class Watch:
    """A process's memory over time. Anonymous and shared pages are looked at every few milliseconds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.own = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.004):
            with contextlib.suppress(OSError):
                found = _fields(Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8"))
                self.own = max(self.own, found["RssAnon"] + found["RssShmem"] + found["VmSwap"])

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _fields(text: str) -> dict[str, int]:
    """Every "Name: N kB" line, in bytes."""
    return {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def file_pages(pid: int, model: Path) -> tuple[int, int]:
    """(resident pages of other files, pages of the model's files read since `forget_reads`), in bytes."""
    other = used = 0
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _MAP.match(line):
            name = match[1] or ""
        elif line.startswith(("Rss:", "Referenced:", "Anonymous:")) and name.startswith("/"):
            kind, count, _ = line.split()
            mine = str(model) in name
            if mine and kind == "Referenced:":
                used += int(count) * 1024
            elif not mine and kind != "Referenced:":
                other += int(count) * 1024 * (1 if kind == "Rss:" else -1)
    return other, used


def forget_reads(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("1", encoding="ascii")


async def generate(client: Any, ids: list[int], tokens: int) -> float:
    """Tokens per second of the answer, the first token left out."""
    stop = StopParams(max_tokens=tokens, ignore_eos=True)
    request = GenerationRequest(f"p{time.monotonic_ns()}", token_ids=tuple(ids), sampling={"temperature": 0.0}, stop=stop)
    times = []
    async for event in client.generate(request):
        if isinstance(event, TokenEvent):
            times.append(time.perf_counter())
    return (len(times) - 1) / (times[-1] - times[0])


async def measure(path: Path, loader: str, options: dict[str, Any], data: Path) -> dict[str, Any]:
    specs, overlays = discover(), Overlays.find(ROOT)
    spec = specs[loader]
    model = inspect(path)
    if model.problem:
        raise SystemExit(f"{path}: {model.problem}")
    machine = this_machine(path, data)
    complete = complete_options(spec, options)
    need = need_of(model, spec, complete, machine)
    client = await WorkerClient.start(spec, overlays)
    assert client.pid is not None
    watch = Watch(client.pid)
    try:
        info = await client.load(str(path), complete)
        words = list(range(10, 10 + 97))
        full = [words[i % 97] + i // 97 % 50 for i in range(info.context_length - ANSWER - 1)]
        await generate(client, full, ANSWER)
        watch.end()
        forget_reads(client.pid)
        pairs = []
        for _ in range(2):  # what else this machine does slows both alike
            bandwidth = measure_bandwidth()
            pairs.append((bandwidth, await generate(client, full[:32], ANSWER)))
        others, used = file_pages(client.pid, path)
        peak = _fields(Path(f"/proc/{client.pid}/status").read_text(encoding="utf-8"))["VmHWM"]
    finally:
        watch.end()
        await client.close()
    measured = watch.own + others + used
    bandwidth, speed = max(pairs, key=lambda pair: pair[1])
    expected = tokens_per_second(need.memory, dataclasses.replace(machine, bandwidth=bandwidth))
    return {
        "model": path.name,
        "loader": loader,
        "options": options,
        "context": info.context_length,
        "estimate_mb": round(need.memory.ram / MB),
        "measured_mb": round(measured / MB),
        "error": round(need.memory.ram / measured - 1, 3),
        "own_mb": round(watch.own / MB),
        "libraries_mb": round(others / MB),
        "mapped_mb": round(used / MB),
        "vmhwm_mb": round(peak / MB),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "read_mb": round(need.memory.read / MB),
        "tok_s": round(speed, 1),
        "estimate_tok_s": None if expected is None else round(expected, 1),
    }


def made(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The 1.1B models: those given, and random ones of other kinds, made here."""
    found = {"hf": arguments.hf, "gguf": arguments.gguf, "gptq": arguments.gptq}

    run_in("rwkv", "benchmarks/make_rwkv.py", folder / "rwkv-1b", 24, 2048)
    run_in("flexgen", "benchmarks/flexgen_model.py", folder / "opt-1b", 2048, 22)
    found |= {"rwkv": folder / "rwkv-1b", "opt": folder / "opt-1b"}
    for kind in ("Q8_0", "Q4_K_M"):
        found[f"gguf-{kind}"] = folder / f"llama-1.1b-{kind}.gguf"
        if not found[f"gguf-{kind}"].exists():  # kept from an earlier run
            flags = ["--type", kind, "--out", found[f"gguf-{kind}"], "--requantize"]
            run_in("parent", "server.py", "convert", arguments.gguf, *flags)
    return {name: Path(path) for name, path in found.items() if path}


def recorded() -> list[dict[str, Any]]:
    """The rows of the last run."""
    path = RESULTS / "plan_error.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["figures"]["rows"]) if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, help="the 1.1B Llama as safetensors (benchmarks/make_model.py)")
    parser.add_argument("--gguf", type=Path, help="the same as Q4_0")
    parser.add_argument("--gptq", type=Path, help="the same as 4-bit GPTQ")
    parser.add_argument("--only", default="", help="loaders, separated by commas; the others' rows stay as they were recorded")
    parser.add_argument("--keep", type=Path, help="folder for what is made here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="switchyard-plan-") as name, report("plan_error") as figures:
        folder = arguments.keep or Path(name)
        models = made(folder, arguments)
        cases = [(ROOT / "models" / path, loader, options) for path, loader, options in BUNDLED]
        cases += [(models[path], loader, options) for path, loader, options in LARGE if path in models]
        only = set(filter(None, arguments.only.split(",")))
        rows = [row for row in recorded() if only and row["loader"] not in only]
        for path, loader, options in cases:
            if not only or loader in only:
                rows.append(asyncio.run(measure(path, loader, options, Path(name))))
                print(rows[-1], flush=True)
        figures["rows"] = rows
        figures["largest_error"] = max(abs(row["error"]) for row in rows)
        figures["bandwidth_gb_s"] = round((this_machine(ROOT, Path(name)).bandwidth or 0) / 1e9, 1)


if __name__ == "__main__":
    main()

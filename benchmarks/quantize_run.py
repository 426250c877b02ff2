"""One quantiser in a process of its own, run once or several times, for quantize_time.py and gptq_quality.py:

python benchmarks/quantize_run.py JOB.json     prints one line: {"runs": [{seconds, cpu_seconds}, ...], "peak_bytes", ...}

JOB: engine ("switchyard" or "gptqmodel", run in its environment), base, out, calibration, nsamples, seqlen, bits, group_size,
sym, desc_act, damp, runs, threads, blocks (stop after so many; 0: all). Both are given the same windows of the same text.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel refuses to start where it would want fewer
os.environ["HF_HUB_OFFLINE"] = "1"


def settings_of(job: dict[str, Any]) -> Any:
    from modules.quantize.settings import QuantizeSettings

    names = ("bits", "group_size", "sym", "desc_act", "calibration", "nsamples", "seqlen")
    return QuantizeSettings(damp_percent=job["damp"], **{name: job[name] for name in names})


def switchyard(job: dict[str, Any]) -> None:
    from modules.quantize import _job

    class Enough(Exception):
        pass

    def on_event(event: dict[str, Any]) -> None:
        if job.get("blocks") and event.get("block", 0) > job["blocks"]:
            raise Enough

    with contextlib.suppress(Enough):
        _job.run(_job.Job(Path(job["base"]), Path(job["out"]), settings_of(job), resume=False), on_event)


def gptqmodel(job: dict[str, Any]) -> None:
    import torch
    import transformers
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    from modules.quantize._calibration import read_calibration

    settings = settings_of(job)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    windows = read_calibration(tokenizer, settings, 1 << 20).windows.tolist()
    # act_group_aware is a reordering of GPTQModel's own: off, for equal settings
    config = QuantizeConfig(
        bits=settings.bits, group_size=settings.group_size, sym=settings.sym, desc_act=settings.desc_act,
        act_group_aware=False, damp_percent=settings.damp_percent, device="cpu", offload_to_disk=False,
    )  # fmt: skip
    # its default on a CPU is bfloat16, which is slow where the processor has no instructions for it
    model = GPTQModel.load(job["base"], config, dtype=torch.bfloat16 if native_bfloat16() else torch.float32)
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]
    model.quantize(examples, batch_size=8, calibration_sort=None, backend=BACKEND.TORCH)
    model.save(job["out"])


def native_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resident_bytes() -> int | None:
    """The process's memory now (Linux)."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def main(path: str) -> None:
    import torch
    import transformers

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    run = {"switchyard": switchyard, "gptqmodel": gptqmodel}[job["engine"]]
    runs = []
    with contextlib.redirect_stdout(sys.stderr):
        if job["engine"] == "gptqmodel":
            import gptqmodel as _  # noqa: F401
        before = resident_bytes()
        for _number in range(job.get("runs", 1)):
            shutil.rmtree(job["out"], ignore_errors=True)
            started, cpu = time.perf_counter(), time.process_time()
            run(job)
            runs.append({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    version = importlib.metadata.version("gptqmodel") if job["engine"] == "gptqmodel" else None
    print(json.dumps({"runs": runs, "peak_bytes": peak, "before_bytes": before, "version": version}))


if __name__ == "__main__":
    main(sys.argv[1])

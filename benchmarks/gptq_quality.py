"""Perplexity, size, memory and speed: float32, round to nearest, our GPTQ and GPTQModel's, by bits and group size.

    ./start_linux.sh run benchmarks/gptq_quality.py [--model FOLDER] [--text FILE] [--gptqmodel ENVIRONMENT/bin/python] [--quick]

The text (default: dialogue of the recipe's own generator, other draws than the calibration sample's) is cut into windows of the
context length that do not overlap; perplexity is exp of the mean NLL of their tokens but the first of each, in float32 by
dequantised weights, as in the GPTQ paper. "damage" is the perplexity lost, as a share of what rounding to nearest loses at the
same bits and groups. Speed and memory are the packed int4 kernel's. docs/generate.py makes the table of docs/gptq.md of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, report

from modules.overlays import Overlays

PLAIN = {"desc_act": False, "static_groups": False}


def draws(arguments: argparse.Namespace) -> list[int]:
    """Calibration windows of each draw: what quantising loses depends on them by chance, too."""
    return [arguments.nsamples - 16 * number for number in range(arguments.draws)]


def wanted_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    grid = [(4, 128), (3, 128)] if arguments.quick else [(8, 128), (4, -1), (4, 128), (4, 32), (3, 128), (3, 32), (2, 32)]
    rows: list[dict[str, Any]] = []
    for bits, group in grid:
        shape = {"bits": bits, "group_size": group}
        calibration = {"draws": draws(arguments), "seqlen": 512}
        rows.append({"label": "RTN", "method": "rtn"} | shape)
        rows.append({"label": "GPTQ, plain order", "method": "gptq"} | shape | calibration | PLAIN)
        rows.append({"label": "GPTQ", "method": "gptq"} | shape | calibration)
        if bits < 8:
            rows.append({"label": "GPTQ, MSE", "method": "gptq", "mse": True} | shape | calibration)
    return rows


def run(python: Path, script: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), str(ROOT / "benchmarks" / script), str(path)]
    # in the folder: GPTQModel leaves its logs where it runs
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def with_gptqmodel(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Checkpoints by GPTQModel at the settings of our plain rows."""
    rows = []
    for bits in (4, 3):
        made = []
        for nsamples in draws(arguments):
            made.append(str(folder / f"gptqmodel-{bits}-{nsamples}"))
            job = {
                "engine": "gptqmodel", "base": str(arguments.model), "out": made[-1], "calibration": "bundled", "bits": bits,
                "nsamples": nsamples, "seqlen": 512, "group_size": 128, "sym": True, "desc_act": False, "damp": 0.01,
                "threads": arguments.threads,
            }  # fmt: skip
            version = run(arguments.gptqmodel, "quantize_run.py", job, folder)["version"]
        rows.append({"label": f"GPTQModel {version}", "method": "gptqmodel", "bits": bits, "group_size": 128, "made": made})
    return rows


def damages(rows: list[dict[str, Any]]) -> None:
    """Add to each row the perplexity it lost as a share of RTN's, and beside GPTQModel's rows the ratio of ours to theirs."""
    for row in rows[1:]:
        shape = (row["bits"], row["group_size"])
        same = {other["label"]: other for other in rows[1:] if (other["bits"], other["group_size"]) == shape}
        lost = same["RTN"]["ppl"] - rows[0]["ppl"]
        row["damage"] = (row["ppl"] - rows[0]["ppl"]) / lost if lost > 0 else None
        if row["method"] == "gptqmodel":
            row["ours_over_theirs"] = same["GPTQ, plain order"]["ppl"] / row["ppl"]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    digits = {"size_mb": 2, "memory_mb": 1, "ppl": 4, "spread": 4, "ppl_int4": 4, "tok_s": 0, "damage": 3, "ours_over_theirs": 4}
    return {key: round(value, digits[key]) if key in digits and value is not None else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "wren-6m", help="a Hugging Face folder in 16 or 32 bits")
    parser.add_argument("--text", default="", help="UTF-8 text to measure on")
    parser.add_argument("--characters", type=int, default=150_000, help="of the text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument(
        "--draws", type=int, default=1, help="quantise so often, with 16 windows fewer each time; means are shown"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment with GPTQModel, to compare with")
    parser.add_argument("--quick", action="store_true", help="4 and 3 bits in groups of 128 only")
    arguments = parser.parse_args()
    arguments.model = arguments.model.resolve()
    python = Overlays.find(ROOT).python("transformers")
    with report("gptq_quality") as figures, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            "base": str(arguments.model), "text": arguments.text, "characters": arguments.characters, "folder": name,
            "context": arguments.context, "threads": arguments.threads, "rows": wanted_rows(arguments),
        }  # fmt: skip
        if arguments.gptqmodel:
            job["rows"] += with_gptqmodel(arguments, folder)
        result = run(python, "quality_run.py", job, folder)
        damages(result["rows"])
        figures.update(
            model=arguments.model.name,
            text=Path(arguments.text).name if arguments.text else "held-out dialogue",
            windows=result["windows"],
            torch=result["torch"],
            calibration=f"bundled, {', '.join(map(str, draws(arguments)))} windows of 512 tokens",
            rows=[rounded(row) for row in result["rows"]],
        )
        print(json.dumps(figures["rows"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()

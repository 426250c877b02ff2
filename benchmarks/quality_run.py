"""Perplexity, size, memory and speed of one model and its quantisations, for gptq_quality.py; in the Transformers environment:

python benchmarks/quality_run.py JOB.json     prints one line: {"rows": [...], "windows": [n, length], "torch": version}

JOB: base, text ("" for generated held-out dialogue), characters, context, rows ([{label, bits, group_size, method, ...settings},
...]; "draws" counts the calibration windows of each draw, "made" are folders of checkpoints that another program wrote), folder,
threads.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sample_text import sample_text  # noqa: E402

from loaders._gptq_load import load  # noqa: E402
from loaders.gptq_for_llama import SPEC  # noqa: E402
from modules.quantize import _job  # noqa: E402
from modules.quantize.settings import complete_settings  # noqa: E402

DECODED = 64
ROUNDS = 5


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean NLL over all tokens of `windows` [n, length] but each row's first."""
    total = 0.0
    with torch.inference_mode():
        for row in windows:
            logits = model(row[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


def decode_tok_s(models: list[Any], prompt: torch.Tensor) -> list[float]:
    """Greedy tokens per second of each, one sequence, KV cache; they take turns, so that a busy machine is as busy for each."""
    best = [0.0] * len(models)
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for number, model in enumerate(models):
                output = model(prompt[None], use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                started = time.perf_counter()
                for _ in range(DECODED):
                    output = model(token, past_key_values=output.past_key_values, use_cache=True)
                    token = output.logits[:, -1:].argmax(-1)
                best[number] = max(best[number], DECODED / (time.perf_counter() - started))
    return best


def weights_mb(model: Any) -> float:
    """Parameters and buffers in memory; tied ones once."""
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(sizes.values()) / 1e6


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def packed(checkpoint: Path, kernel: str) -> Any:
    options = {option.name: option.default for option in SPEC.options} | {"kernel": kernel}
    return load(str(checkpoint), options, lambda _: None).model


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base = Path(job["base"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    text = Path(job["text"]).read_text(encoding="utf-8") if job["text"] else sample_text(2, job["characters"])
    ids = torch.tensor(tokenizer(text[: job["characters"]], add_special_tokens=False, verbose=False)["input_ids"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    length = min(job["context"], int(model.config.max_position_embeddings))
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    prompt = ids[:32]
    rows = [
        {"label": "float32", "method": "", "bits": 32, "group_size": "", "size_mb": size_mb(base), "memory_mb": weights_mb(model)}
        | {"ppl": perplexity(model, windows)}
    ]
    print(rows[0], file=sys.stderr)
    models = [model]
    for wanted in job["rows"]:
        row, model = one(wanted, job, windows)
        rows.append(row)
        models.append(model)
        print(row, file=sys.stderr)
    for row, speed in zip(rows, decode_tok_s(models, prompt), strict=True):
        row["tok_s"] = speed
    return {"rows": rows, "windows": list(windows.shape), "torch": torch.__version__}


def checkpoints(wanted: dict[str, Any], job: dict[str, Any]) -> Iterator[tuple[Path, float | None]]:
    """(folder, seconds that quantising took) of each draw of calibration windows; the same folder again and again."""
    for made in wanted.get("made") or ():
        yield Path(made), None
    for nsamples in () if wanted.get("made") else wanted.get("draws") or (1,):
        settings = {key: value for key, value in wanted.items() if key not in ("label", "draws")} | {"nsamples": nsamples}
        out = Path(job["folder"]) / "out"
        started = time.perf_counter()
        task = _job.Job(Path(job["base"]), out, complete_settings(settings), resume=False, overwrite=True)
        _job.run(task, lambda event: None)
        yield out, time.perf_counter() - started


def one(wanted: dict[str, Any], job: dict[str, Any], windows: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """A row and its last model; perplexities are means over the draws, `spread` their standard deviation."""
    row = {key: wanted[key] for key in ("label", "method", "bits", "group_size")}
    exact, int4 = [], []
    for out, seconds in checkpoints(wanted, job):
        exact.append(perplexity(packed(out, "dense"), windows))
        model = packed(out, "int4")
        int4.append(perplexity(model, windows))
        row |= {"size_mb": size_mb(out), "memory_mb": weights_mb(model)}
        if seconds is not None:
            row["quantize_s"] = round(seconds, 1)
    return row | {"ppl": statistics.mean(exact), "spread": statistics.pstdev(exact), "ppl_int4": statistics.mean(int4)}, model


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(job)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])

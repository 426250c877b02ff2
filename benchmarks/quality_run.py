"""Perplexity, size, memory and speed of one model and its quantisations, for gptq_quality.py; in the Transformers environment:

python benchmarks/quality_run.py JOB.json     prints one line: {"rows": [...], "windows": [n, length], "torch": version}

JOB: base, text ("" for generated held-out dialogue), characters, context, rows ([{label, bits, group_size, method, ...settings},
...]; "made" is the folder of a checkpoint that another program wrote), folder, threads.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
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


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean NLL over all tokens of `windows` [n, length] but each row's first."""
    total = 0.0
    with torch.inference_mode():
        for row in windows:
            logits = model(row[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


def decode_tok_s(model: Any, prompt: torch.Tensor) -> float:
    """Greedy tokens per second, one sequence, KV cache; the better of two runs."""
    best = 0.0
    with torch.inference_mode():
        for _ in range(2):
            output = model(prompt[None], use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            for _ in range(DECODED):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
            best = max(best, DECODED / (time.perf_counter() - started))
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
        | {"ppl": perplexity(model, windows), "tok_s": decode_tok_s(model, prompt)}
    ]
    print(rows[0], file=sys.stderr)
    del model
    for wanted in job["rows"]:
        rows.append(one(wanted, job, windows, prompt))
        print(rows[-1], file=sys.stderr)
    return {"rows": rows, "windows": list(windows.shape), "torch": torch.__version__}


def one(wanted: dict[str, Any], job: dict[str, Any], windows: torch.Tensor, prompt: torch.Tensor) -> dict[str, Any]:
    out = Path(wanted.get("made") or Path(job["folder"]) / "out")
    row = {key: wanted[key] for key in ("label", "method", "bits", "group_size")}
    if not wanted.get("made"):
        settings = complete_settings({key: value for key, value in wanted.items() if key != "label"})
        started = time.perf_counter()
        _job.run(_job.Job(Path(job["base"]), out, settings, resume=False, overwrite=True), lambda event: None)
        row["quantize_s"] = round(time.perf_counter() - started, 1)
    row |= {"size_mb": size_mb(out), "ppl": perplexity(packed(out, "dense"), windows)}
    model = packed(out, "int4")
    return row | {"memory_mb": weights_mb(model), "ppl_int4": perplexity(model, windows), "tok_s": decode_tok_s(model, prompt)}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(job)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])

"""Perplexity and size of a model: as it is, rounded to nearest, and with GPTQ, by bits and group size.

    <transformers environment>/bin/python benchmarks/gptq_quality.py models/wren-6m [--text FILE] [--bits 4 3] [--json FILE]

The text (default: the recipe's own generator with another seed than the calibration sample's) is cut into windows of the context
length that do not overlap; perplexity is exp of the mean NLL of their tokens but the first of each, in float32 by dequantised
weights, as in the GPTQ paper. "damage" is the perplexity lost, as a share of what rounding to nearest loses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
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
from modules.quantize.settings import QuantizeSettings  # noqa: E402


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean NLL over all tokens of `windows` [n, length] but each row's first."""
    total = 0.0
    with torch.inference_mode():
        for row in windows:
            logits = model(row[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return float(torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def packed(checkpoint: Path, kernel: str) -> Any:
    options = {option.name: option.default for option in SPEC.options} | {"kernel": kernel}
    return load(str(checkpoint), options, lambda _: None).model


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base = Path(arguments.model).resolve()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else sample_text(2, arguments.size)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    original = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    length = min(arguments.context, int(original.config.max_position_embeddings))
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    table = [{"method": "float32", "bits": 32, "group": "", "size_mb": size_mb(base), "ppl": perplexity(original, windows)}]
    print(table[0] | {"windows": list(windows.shape)}, file=sys.stderr)
    del original
    for bits in arguments.bits:
        for group in arguments.group_size:
            for method in ("rtn", "gptq"):
                settings = QuantizeSettings(
                    bits=bits, group_size=group, method=method, nsamples=arguments.nsamples, seqlen=min(length, 512)
                )
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "model"
                    started = time.monotonic()
                    _job.run(_job.Job(base, out, settings), lambda _: None)
                    row = {
                        "method": method,
                        "bits": bits,
                        "group": group,
                        "size_mb": size_mb(out),
                        "ppl": perplexity(packed(out, "dense"), windows),
                        "quantise_s": time.monotonic() - started,
                    }
                    if method == "gptq" and arguments.int4:
                        row["ppl_int4"] = perplexity(packed(out, "int4"), windows)
                table.append(row)
                print(row, file=sys.stderr)
    for row in table[1:]:
        rtn = next(r for r in table if (r["method"], r["bits"], r["group"]) == ("rtn", row["bits"], row["group"]))
        lost = rtn["ppl"] - table[0]["ppl"]
        row["damage"] = (row["ppl"] - table[0]["ppl"]) / lost if lost > 0 else None
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "| method | bits | group | size, MB | perplexity | damage, share of RTN's | int4 kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        damage = "" if row.get("damage") is None else f"{row['damage']:.2f}"
        int4 = f"{row['ppl_int4']:.4f}" if "ppl_int4" in row else ""
        cells = [row["method"], row["bits"], row["group"], f"{row['size_mb']:.2f}", f"{row['ppl']:.4f}", damage, int4]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder in 16 or 32 bits")
    parser.add_argument("--text", help="UTF-8 text to measure on")
    parser.add_argument("--size", type=int, default=60_000, help="characters of generated text, without --text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--int4", action="store_true", help="also measure through the int4 kernel (bf16 activations)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.redirect_stdout(sys.stderr):
        table = rows(arguments)
    versions = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "model": str(arguments.model)}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": table}, indent=1), encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    main()

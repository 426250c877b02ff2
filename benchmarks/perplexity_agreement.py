"""Perplexity of the same weights through every backend: how far apart are they?

    python benchmarks/perplexity_agreement.py [--text FILE] [--context 1024] [--max-windows N] [--threads N]

The default text is WikiText-2 from ../shared where that is, else the bundled held-out text. Groups of equal weights: the
bundled model in float32 and as GGUF F16 (both builds of llama.cpp); its 4-bit GPTQ checkpoint in every GPTQ backend and as the
GGUF that `convert` makes of it. `spread` is the largest perplexity of a group over the smallest, minus one: at most 0.005.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, report

from modules.evaluate.plan import Plan, Target
from modules.evaluate.report import method_of
from modules.evaluate.runner import Evaluation, Surroundings
from modules.evaluate.store import EvaluationStore
from modules.library import LocalLibrary
from modules.overlays import Overlays
from modules.registry import discover

WIKITEXT = ROOT.parent / "shared" / "data" / "eval" / "wikitext-2" / "valid.txt"
GPTQ = ROOT / "models" / "wren-6m-gptq-4bit-128g"


def groups(threads: int, bridge: Path | None) -> dict[str, list[Target]]:
    """What must agree, by group."""
    some = {"threads": threads}
    gguf = "wren-6m-gguf/wren-6m-F16.gguf"
    packed = [Target(GPTQ.name, "gptq_for_llama", some), Target(GPTQ.name, "gptq_for_llama", some | {"kernel": "dense"})]
    packed += [Target(GPTQ.name, "autogptq", some), Target(GPTQ.name, "exllama", {})]
    if bridge is not None:
        packed.append(Target(str(bridge), "llamacpp", some))
    return {
        "wren-6m float": [
            Target("wren-6m", "transformers", some | {"dtype": "float32"}),
            Target(gguf, "llamacpp", some | {"engine": "llama_cpp"}),
            Target(gguf, "llamacpp", some | {"engine": "xllamacpp"}),
        ],
        "wren-6m GPTQ 4 bit 128g": packed,
    }


def make_bridge(folder: Path) -> Path | None:
    """The GPTQ checkpoint as GGUF, by `server.py convert`; None where that is not possible."""
    import subprocess

    out = folder / "bridge.gguf"
    python = Overlays.find(ROOT).python("parent")
    command = [str(python), "server.py", "convert", str(GPTQ), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        print(f"no bridge: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    return out


async def measure(targets: list[Target], text: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    specs = discover()
    library = LocalLibrary([ROOT / "models"], specs.values())
    around = Surroundings(library, specs, Overlays.find(ROOT), EvaluationStore(folder / "evaluations"), [folder], by_path=True)
    here = [t for t in targets if t.loader in specs and around.overlays.unavailable(specs[str(t.loader)]) is None]
    plan = Plan(tuple(here), (text,), context=arguments.context, max_windows=arguments.max_windows)

    def show(event: dict[str, Any]) -> None:
        print(f"\r{here[event['row']].label} {event['words']}"[:150].ljust(150), end="", file=sys.stderr, flush=True)

    run = await Evaluation.new(around, plan, show).work()
    print(file=sys.stderr)
    rows = []
    for row in run["rows"]:
        found = row["perplexity"].get(text)
        entry = {"model": row["model"], "loader": row["loader"], "options": row.get("options"), "method": method_of(row)}
        if found is None:
            rows.append(entry | {"error": row["errors"][0]["message"]})
        else:
            keys = ("perplexity", "word_perplexity", "error", "tokens", "words", "context", "ids_sha256", "tok_s")
            rows.append(entry | {key: found[key] for key in keys} | {"memory_mb": round((row["peak_memory_bytes"] or 0) / 1e6)})
    values = [row["perplexity"] for row in rows if "perplexity" in row]
    spread = round(max(values) / min(values) - 1, 6) if len(values) > 1 else None
    return {"spread": spread, "same_tokens": len({row["ids_sha256"] for row in rows if "ids_sha256" in row}) == 1, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=str(WIKITEXT) if WIKITEXT.is_file() else "bundled")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, report("perplexity_agreement") as figures:
        folder = Path(name)
        figures["text"] = Path(arguments.text).name
        figures["groups"] = {}
        for title, targets in groups(arguments.threads, make_bridge(folder)).items():
            figures["groups"][title] = asyncio.run(measure(targets, arguments.text, arguments, folder))
        spreads = [group["spread"] for group in figures["groups"].values() if group["spread"] is not None]
        figures["largest_spread"] = max(spreads, default=None)


if __name__ == "__main__":
    main()

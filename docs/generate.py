"""Write the generated parts of the documentation; `--check` only says whether they are current.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->` in any Markdown file of the project.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules.errors import error_classes  # noqa: E402
from modules.registry import FORMAT_NAMES, discover  # noqa: E402
from modules.sampling import PARAMETERS  # noqa: E402

# What the README says of a result: its name, what was measured, and the figures that say it.
HEADLINES = (
    ("page_stream", "tokens into the page, 200 messages above", "{page_tok_s:,} tok/s, {ratio:.2f} of a bare page"),
    ("startup", "start to first answer, to the whole page", "{splash_s:.2f} s, {ui_s:.1f} s; {rss_mib:.0f} MiB"),
    ("api_throughput-llamacpp-1.1b", "through the API ÷ llama.cpp's own loop, 1.1B Q4_0", "{ratio_median:.2f}"),
    ("api_throughput-llamacpp-260k", "the same, 260K model", "{ratio_median:.2f} at {api_decode_tok_s:,.0f} tok/s"),
    ("api_throughput-transformers-1.1b", "through the API ÷ a plain Transformers loop, 1.1B", "{ratio_median:.2f}"),
    (
        "api_overhead",
        "the API above the raw engine, 1 and 16 streams",
        "first token +{1 streams[ttft_added_p50_ms]:.1f} and +{16 streams[ttft_added_p50_ms]:.1f} ms; "
        "200 streams: p99 {crowd[late_p99_ms]:.1f} ms late, {crowd[errors]} errors",
    ),
    (
        "structured",
        "held to a JSON schema ÷ free text, tokens/s",
        "Transformers {wren-6m on transformers[ratio]:.2f}, GPTQ {wren-6m-gptq-4bit-128g on gptq_for_llama[ratio]:.2f}, "
        "llama.cpp {wren-6m-gguf/wren-6m-F16_gguf on llamacpp[ratio]:.2f}",
    ),
    (
        "rwkv",
        "RWKV through the API ÷ the package's own loop; a second turn's first token ÷ a cold one's",
        "{decode_ratio_median:.2f}; {second_turn_ratio_median:.2f}",
    ),
    (
        "flexgen",
        "FlexGen: 32 prompts as a batch ÷ one by one; all weights on disk: peak ÷ promise",
        "{throughput[ratio_median]:.1f}; {memory[0][ratio]:.2f}",
    ),
    (
        "perplexity_agreement",
        "WikiText-2 perplexity of the same weights through every backend",
        "at most {largest_spread:.4%} apart",
    ),
    (
        "busy_cores",
        "tokens/s while other programs use every core (and with the wait that libgomp chooses itself)",
        "Transformers {transformers[busy]:.0f} ({transformers[busy_long_spins]:.0f}), "
        "RWKV {rwkv[busy]:.0f} ({rwkv[busy_long_spins]:.0f})",
    ),
    (
        "bfloat16",
        "bfloat16 on a CPU without 16-bit instructions ÷ the library's own, prompt and answer",
        "Transformers (1.1B) {transformers[over_library][prompt_tok_s]:.1f} and {transformers[over_library][answer_tok_s]:.1f}, "
        "RWKV (129M) {rwkv[over_library][prompt_tok_s]:.0f} and {rwkv[over_library][answer_tok_s]:.1f}",
    ),
    ("load_cycles", "The last 100 of 400 loads and unloads of two models", "memory {slope_kib_per_cycle:+.0f} KiB a cycle"),
    (
        "gptq_speed",
        "GPTQ of 1.1B in 4 bits ÷ llama.cpp's Q4_0 and ÷ Transformers in bfloat16, tokens/s",
        "{4-bit[decode / llama.cpp Q4_0]:.2f} and {4-bit[decode / transformers bf16]:.1f}; "
        "prompt {4-bit[prefill / llama.cpp Q4_0]:.2f} and {4-bit[prefill / transformers bf16]:.1f}",
    ),
    ("quantize_time", "time to quantise ÷ GPTQModel's; peak memory", "{time_ratio:.2f}; {peak_memory_ratio:.2f}"),
)
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines)


def loaders() -> str:
    """The backends, as their specs declare them."""
    rows = []
    for spec in discover().values():
        takes = ", ".join(FORMAT_NAMES[f] for f in sorted(spec.formats, key=lambda f: -spec.formats[f]))
        rows.append(
            [f"`{spec.name}`", spec.title, takes, spec.summary, str(len(spec.samplers)), ", ".join(sorted(spec.features)) or "–"]
        )
    return table(["name", "backend", "takes", "what it is", "samplers", "features"], rows)


def options() -> str:
    """Every load option of every loader."""
    parts = []
    for spec in discover().values():
        rows = [
            [
                f"`{o.name}`",
                ", ".join(f"`{a}`" for a in o.aliases),
                o.kind if not o.choices else " \\| ".join(o.choices),
                f"`{o.default}`",
                o.help,
            ]
            for o in spec.options
        ]
        parts.append(f"### {spec.title}\n\n" + table(["option", "also", "kind", "default", "what it does"], rows))
    return "\n".join(parts)


def parameters() -> str:
    """The sampling parameters and who honours them."""
    specs = discover().values()
    rows = []
    for p in PARAMETERS.values():
        span = "" if p.minimum is None else f"{p.minimum:g} to {p.maximum:g}" if p.maximum is not None else f"from {p.minimum:g}"
        who = [spec.name for spec in specs if p.name in spec.samplers]
        rows.append(
            [f"`{p.name}`", ", ".join(f"`{a}`" for a in p.aliases), f"`{p.neutral}`", span, p.help, ", ".join(who) or "–"]
        )
    return table(["parameter", "also", "off at", "range", "what it does", "loaders"], rows)


def errors() -> str:
    """Codes and statuses."""
    rows = [[f"`{c.code}`", str(c.http_status), c.openai_type, c.__name__] for c in error_classes()]
    return table(["code", "HTTP", "type", "class"], rows)


def scripts() -> str:
    """The benchmarks and what they use, by the first paragraph of each."""
    rows = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        what = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0]
        rows.append((path.name == "common.py" or "report(" not in code, [f"`{path.name}`", " ".join(what.split())]))
    rows.sort(key=lambda row: row[0])
    return table(["script", "what it is"], [row for _, row in rows])


def figures() -> str:
    """What benchmarks/results holds, in one table."""
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        shown = "; ".join(f"{key} {_short(value)}" for key, value in result["figures"].items())
        rows.append(
            [
                f"`{result['benchmark']}`",
                f"`{result['command']}`",
                shown,
                f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores",
            ]
        )
    return table(["benchmark", "command", "figures", "hardware"], rows)


def headlines() -> str:
    """The README's few figures."""
    rows = []
    for name, what, text in HEADLINES:
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if path.is_file():
            figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
            rows.append([what, text.format(**{key.replace(".", "_"): value for key, value in figures.items()})])
    return table(["measured", "figure"], rows)


def ray() -> str:
    """Replicas on Ray: what they add, and what a second one gives."""
    results = ROOT / "benchmarks" / "results"
    rows = []
    if (results / "ray_overhead.json").is_file():
        found = json.loads((results / "ray_overhead.json").read_text(encoding="utf-8"))["figures"]
        rows += [
            [
                "a replica above a local worker, one stream at full speed",
                f"{found['added_full_speed_ms_per_token']:+.3f} ms a token",
            ],
            [
                "the same at 50 tokens a second, one way",
                f"{found['added_paced_late_p50_ms']:+.2f} ms (p50)",
            ],
        ]
    if (results / "ray_replicas.json").is_file():
        found = json.loads((results / "ray_replicas.json").read_text(encoding="utf-8"))["figures"]
        for name, row in found.items():
            if isinstance(row, dict):
                rates = f"{row['1 replicas tok_s']:,.0f} and {row['2 replicas tok_s']:,.0f} tok/s"
                rows.append([f"one and two replicas, {found['clients']} clients, {name}", f"{rates}: {row['ratio']:.2f}"])
    return table(["measured", "figure"], rows)


def gptq() -> str:
    """Quantisations of one model, by bits and group size."""
    path = ROOT / "benchmarks" / "results" / "gptq_quality.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    found = result["figures"]
    rows = [
        [
            str(row["label"]),
            str(row["bits"]),
            {"": "", -1: "column"}.get(row["group_size"], str(row["group_size"])),
            f"{row['size_mb']:.2f}",
            f"{row['memory_mb']:.1f}",
            f"{row['ppl']:.4f}" + (f" ± {row['spread']:.4f}" if row.get("spread") else ""),
            "" if row.get("damage") is None else f"{row['damage']:.2f}",
            f"{row['ppl_int4']:.4f}" if "ppl_int4" in row else "",
            f"{row['tok_s']:.0f}",
        ]
        for row in found["rows"]
    ]
    head = ["method", "bits", "group", "file, MB", "weights, MB", "perplexity", "lost ÷ RTN's", "int4 kernel", "tok/s"]
    count, length = found["windows"]
    return (
        table(head, rows) + f"\n{found['model']}, {found['text']}: {count} windows of {length} tokens; calibration: "
        f"{found['calibration']}. {result['hardware']['cpu']}, {result['hardware']['cores']} cores, torch {found['torch']}; "
        f"`{result['command']}`.\n"
    )


def plan_error() -> str:
    """The planner's estimates against what was measured."""
    path = ROOT / "benchmarks" / "results" / "plan_error.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in result["figures"]["rows"]:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items()) or "defaults"
        sizes = [f"{row[name]:,}" for name in ("estimate_mb", "measured_mb")]
        rows.append([row["model"], row["loader"], options, str(row["context"]), *sizes, f"{row['error']:+.1%}"])
    head = ["model", "backend", "options", "context", "estimate, MB", "measured, MB", "error"]
    about = f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores; `{result['command']}`"
    worst, note = result["figures"]["largest_error"], result["figures"].get("note", "")
    return f"{table(head, rows)}\nThe largest error is {worst:.1%}. {note} {about}.\n"


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        text = json.dumps(value)
        return text if len(text) < 400 else f"({len(value)} entries)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def endpoints() -> str:
    """Every documented address, by protocol, as the routes declare them."""
    parts = []
    for tag, rows in _operations().items():
        parts.append(f"### {tag}\n\n" + table(["address", "what it does"], [[f"`{m} {p}`", text] for m, p, text, _ in rows]))
    return "\n".join(parts)


def examples() -> str:
    """The examples of /docs as curl commands."""
    from modules.api.examples import EXAMPLES

    parts = []
    for tag, rows in _operations().items():
        shown = [(path, *EXAMPLES[path]) for method, path, _, _ in rows if method == "POST" and path in EXAMPLES]
        for path, what, body in shown:
            text = json.dumps(body).replace("'", "'\\''")
            url = f"http://127.0.0.1:7860{path}"
            parts.append(f"{what} ({tag})\n\n```\ncurl {url} -H 'Content-Type: application/json' \\\n  -d '{text}'\n```\n")
    return "\n".join(parts)


def _operations() -> dict[str, list[tuple[str, str, str, dict[str, Any]]]]:
    """tag -> (method, path, description, operation), from the application itself."""
    import tempfile

    from modules.app import build_app
    from modules.config import Config

    found: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        document = build_app(Config(nowebui=True, no_model=True, user_data_dir=Path(folder))).openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = " ".join(str(operation.get("description") or operation.get("summary", "")).split())
            found.setdefault((operation.get("tags") or ["Other"])[0], []).append((method.upper(), path, text, operation))
    return found


GENERATORS: dict[str, Callable[[], str]] = {
    "loaders": loaders,
    "options": options,
    "parameters": parameters,
    "errors": errors,
    "endpoints": endpoints,
    "examples": examples,
    "figures": figures,
    "scripts": scripts,
    "gptq": gptq,
    "plan_error": plan_error,
    "ray": ray,
    "headlines": headlines,
}


def renewed(text: str) -> str:
    """`text` with every generated part made anew."""
    return PART.sub(lambda part: f"{part[1]}{GENERATORS[part[2]]()}{part[3]}", text)


def documents() -> list[Path]:
    return [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "loaders").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]


def stale() -> list[Path]:
    return [p for p in documents() if renewed(text := p.read_text(encoding="utf-8")) != text]


def main() -> int:
    changed = stale()
    for path in changed:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if changed and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

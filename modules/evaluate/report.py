"""One table out of one or several runs: model × method × bits × group, and its Markdown and CSV forms."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Column:
    """`digits` None is text; `better` says which way is better, for the page's marks. `key` names it in CSV and JSON."""

    key: str
    title: str
    digits: int | None = None
    better: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    columns: list[Column]
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        columns = [{"key": c.key, "title": c.title, "digits": c.digits, "better": c.better} for c in self.columns]
        return {"columns": columns, "rows": self.rows}


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Every row of every run, with the columns that any of them fills."""
    columns = [
        Column("model", "Model"),
        Column("method", "Method"),
        Column("bits", "Bits", 0),
        Column("group_size", "Group", 0),
        Column("loader", "Backend"),
        Column("size_mb", "Size, MB", 1, "low"),
        Column("memory_mb", "Memory, MB", 0, "low"),
        Column("load_s", "Load, s", 2, "low"),
    ]
    for name in _ordered(name for run in runs for row in run["rows"] for name in row["perplexity"]):
        columns.append(Column(f"ppl_{name}", f"Perplexity, {name}", 3, "low"))
        columns.append(Column(f"word_ppl_{name}", f"Word perplexity, {name}", 2, "low"))
    beams = _ordered(b for run in runs for row in run["rows"] if row["speed"] for b in row["speed"]["beams"])
    if beams:
        columns.append(Column("prefill_tok_s", "Prefill, tok/s", 1, "high"))
        columns += [
            Column(f"decode_tok_s_{b}", f"Decode, tok/s, {b} beam{'' if b == '1' else 's'}", 2, "high")
            for b in sorted(beams, key=int)
        ]  # fmt: skip
    for task, metric in _ordered((t, m) for run in runs for row in run["rows"] for t, m in _metrics(row)):
        columns.append(Column(f"task_{task}_{metric}", f"{task}, {metric}", 4, "low" if "perplexity" in metric else "high"))
    if any(row["answers"] and "agreement" in row["answers"][0] for run in runs for row in run["rows"]):
        columns.append(Column("agreement", "Agreement, %", 1, "high"))
    if len(runs) > 1:
        columns.insert(0, Column("run", "Run"))
    rows = [_row(run, row) for run in runs for row in run["rows"]]
    kept = [c for c in columns if c.key in ("model", "method") or any(row.get(c.key) is not None for row in rows)]
    return Table(kept, rows)


def _ordered(items: Any) -> list[Any]:
    return list(dict.fromkeys(items))


def _metrics(row: dict[str, Any]) -> list[tuple[str, str]]:
    tasks = (row["tasks"] or {}).get("results", {})
    return [(task, metric) for task, values in tasks.items() for metric in values if not metric.endswith("_stderr")]


def _row(run: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """One flat row; what was not measured is None or missing."""
    found: dict[str, Any] = {
        "run": run.get("title") or _date(run["created"]),
        "run_id": run["id"],
        "label": row["label"],
        "model": row["model"],
        "method": method_of(row),
        "bits": _bits(row.get("bits")),
        "group_size": row.get("group_size"),
        "loader": row.get("loader_title") or row.get("loader"),
        "size_mb": _mega(row.get("size_bytes")),
        "memory_mb": _mega(row.get("peak_device_bytes") or row.get("peak_memory_bytes")),
        "load_s": row.get("load_s"),
        "state": state_of(run, row),
        "errors": row["errors"],
    }
    for name, value in row["perplexity"].items():
        found[f"ppl_{name}"], found[f"word_ppl_{name}"] = value["perplexity"], value["word_perplexity"]
        found[f"ppl_error_{name}"] = value["error"]
    for beams, value in ((row["speed"] or {}).get("beams") or {}).items():
        if "decode_tok_s" in value:
            found[f"decode_tok_s_{beams}"] = value["decode_tok_s"]["mean"]
            found[f"decode_tok_s_{beams}_sd"] = value["decode_tok_s"]["sd"]
        if "prefill_tok_s" in value and "prefill_tok_s" not in found:
            found["prefill_tok_s"] = value["prefill_tok_s"]["mean"]
            found["prefill_tok_s_sd"] = value["prefill_tok_s"]["sd"]
    for task, metric in _metrics(row):
        found[f"task_{task}_{metric}"] = row["tasks"]["results"][task][metric]
    shares = [answer["agreement"]["common"] for answer in row["answers"] if "agreement" in answer]
    if shares:
        found["agreement"] = round(100 * math.fsum(shares) / len(shares), 1)
    return found


def method_of(row: dict[str, Any]) -> str:
    """GPTQ, RTN, Q4_K_M …, or the number format of unquantised weights."""
    method = row.get("method")
    if method:
        return str(method).upper() if str(method).islower() else str(method)
    return str(row.get("dtype") or "–")


def state_of(run: dict[str, Any], row: dict[str, Any]) -> str:
    """done, failed, partial, or waiting while the run goes on."""
    has = bool(row["perplexity"] or row["speed"] or row["answers"] or row["tasks"])
    if row["errors"]:
        return "partial" if has else "failed"
    return "done" if has else ("waiting" if run["state"] == "running" else "missing")


def _bits(value: float | None) -> float | int | str | None:
    """4, and "4.5" for a mixed format: a column of whole numbers with a few others among them."""
    if value is None:
        return None
    return int(value) if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _mega(value: int | None) -> float | None:
    return None if value is None else round(value / 1e6, 2)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


# --- text forms ----------------------------------------------------------------------------------------------------


def show(value: Any, digits: int | None) -> str:
    """A cell as people read it."""
    if value is None:
        return ""
    if digits is None or isinstance(value, str):
        return str(value)
    return f"{float(value):,.{digits}f}"


def _with_spread(row: dict[str, Any], column: Column) -> str:
    text = show(row.get(column.key), column.digits)
    deviation = row.get(f"{column.key}_sd")
    return f"{text} ± {show(deviation, column.digits)}" if text and deviation is not None else text


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The table with what it was measured on and how; errors below it."""
    made = table(runs)
    lines = [
        "| " + " | ".join(c.title for c in made.columns) + " |",
        "|" + "|".join("---" if c.digits is None else "---:" for c in made.columns) + "|",
    ]
    for row in made.rows:
        lines.append("| " + " | ".join(_escape(_with_spread(row, c)) for c in made.columns) + " |")
    lines += ["", *(line for run in runs for line in conditions(run))]
    for row in made.rows:
        lines += [f"- {_escape(row['label'])}, {e['stage']}: {_escape(e['message'])}" for e in row["errors"]]
    return "\n".join(lines) + "\n"


def conditions(run: dict[str, Any]) -> list[str]:
    """How and on what the run was measured, in sentences."""
    hardware, plan = run["hardware"], run["plan"]
    machine = f"{hardware['cpu']} ({', '.join(hardware['extensions']) or 'no extensions listed'}), {hardware['cores']} cores"
    memory = f"{hardware['memory_bytes'] / 1e9:.0f} GB"
    versions = _ordered(f"{k} {v}" for row in run["rows"] for k, v in (row.get("versions") or {}).items() if k != "python")
    lines = [
        f"{_date(run['created'])} UTC, {machine}, {memory}, {hardware['accelerator'] or 'no GPU'}. "
        f"Switchyard {run['software']['switchyard']}{', ' if versions else ''}{', '.join(versions)}."
    ]
    for name in plan["data"]:
        found = next((row["perplexity"][name] for row in run["rows"] if name in row["perplexity"]), None)
        if found:
            how = {"papers": f"windows of {found['context']} tokens, stride {found['stride']}"}
            words = how.get(found["windows"], f"rolling windows of {found['context']} tokens")
            part = "" if found["count"] == found["of_windows"] else f", {found['count']} of {found['of_windows']} windows"
            lines.append(f"{name}: {words}{part}, {found['tokens']:,} tokens, {found['words']:,} words.")
    speed = next((row["speed"] for row in run["rows"] if row["speed"]), None)
    if speed:
        repetitions = plan["speed"]["repetitions"]
        tokens = f"{speed['prompt_tokens']} tokens of prompt, {speed['new_tokens']} new"
        lines.append(f"Speed: {tokens}, mean ± σ of {repetitions} after a warm-up.")
    return lines


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def to_csv(runs: Sequence[dict[str, Any]]) -> str:
    """Every measured number of every row, one column each."""
    made = table(runs)
    keys = _ordered(
        ["run_id", *(c.key for c in made.columns), *(k for row in made.rows for k in row if k not in ("errors", "run", "label"))]
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    for row in made.rows:
        writer.writerow(["" if row.get(key) is None else _harmless(row[key]) for key in keys])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    """A name that a spreadsheet would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value


def answers_markdown(run: dict[str, Any]) -> str:
    """The study's table: one question a line, one model a column, the ground truth first."""
    rows = [row for row in run["rows"] if row["answers"]]
    if not rows:
        return ""
    truth = run.get("reference")
    if truth is not None:
        rows.sort(key=lambda row: row is not run["rows"][truth])
    heads = [f"{row['label']}{' (ground truth)' if truth is not None and row is run['rows'][truth] else ''}" for row in rows]
    lines = ["| Question | " + " | ".join(map(_escape, heads)) + " |", "|---|" + "---|" * len(rows)]
    for index, answer in enumerate(rows[0]["answers"]):
        cells = [_answer(row["answers"][index], row is rows[0]) for row in rows if index < len(row["answers"])]
        lines.append(f"| {_escape(answer['question'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _answer(answer: dict[str, Any], is_truth: bool) -> str:
    found = answer.get("agreement")
    if is_truth or not found:
        return _escape(answer["text"])
    unit = found["unit"][:-1]
    parts = (
        "the same"
        if found["parts_at"] is None
        else f"parts at {unit} {found['parts_at'] + 1}, {100 * found['common']:.0f} % common"
    )
    return f"{_escape(answer['text'])} *({parts})*"

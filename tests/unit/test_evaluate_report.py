"""Tables, plots and exports of stored runs; how two answers are compared."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from modules.errors import NotFound, StoreCorrupt
from modules.evaluate import agreement, plots, report
from modules.evaluate.store import EvaluationStore, alive, this_process


def row(label: str, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "label": label, "model": label, "loader": "llamacpp", "loader_title": "llama.cpp", "method": None, "dtype": "float32",
        "bits": None, "group_size": None, "size_bytes": 12_000_000, "peak_memory_bytes": 90_000_000, "load_s": 1.5,
        "versions": {"llama": "1", "python": "3"}, "perplexity": {}, "unfinished": {}, "speed": None, "answers": [],
        "tasks": None, "errors": [],
    }  # fmt: skip
    return base | changes


def perplexity(value: float) -> dict[str, Any]:
    return {
        "perplexity": value, "word_perplexity": value * 2, "error": 0.1, "context": 512, "stride": 512, "windows": "papers",
        "count": 4, "of_windows": 9, "tokens": 2044, "words": 1500,
    }  # fmt: skip


def run(*rows: dict[str, Any], run_id: str = "20260101-000000-aaaa", **changes: Any) -> dict[str, Any]:
    hardware = {"cpu": "Test CPU", "extensions": ["avx2"], "cores": 2, "memory_bytes": 8e9, "accelerator": None, "system": "x"}
    plan = {"data": ["wikitext2"], "speed": {"repetitions": 3}, "questions": None}
    base = {"version": 1, "id": run_id, "title": "", "created": 0.0, "finished": 1.0, "state": "done", "plan": plan}
    return base | {"hardware": hardware, "software": {"switchyard": "0.1.0"}, "rows": list(rows)} | changes


def example() -> dict[str, Any]:
    speed = {
        "prompt_tokens": 64, "new_tokens": 8,
        "beams": {
            "1": {"decode_tok_s": {"mean": 100.0, "sd": 2.5, "n": 3}, "prefill_tok_s": {"mean": 900.0, "sd": 9.0, "n": 3}},
            "4": {"reason": "llama.cpp has no beam search."},
        },
    }  # fmt: skip
    failed = {"stage": "load", "code": "load_failed", "message": "It | broke.", "hint": ""}
    return run(
        row("base", perplexity={"wikitext2": perplexity(5.68)}, speed=speed),
        row("pipe|name", method="gptq", bits=4, group_size=128, size_bytes=3_600_000, perplexity={"wikitext2": perplexity(5.85)}),
        row("mixed", method="Q4_K_M", bits=4.53, perplexity={"wikitext2": perplexity(5.9)}),
        row("=cmd()", errors=[failed]),
    )


def test_the_table_has_a_column_for_everything_that_was_measured() -> None:
    made = report.table([example()])
    titles = [column.title for column in made.columns]
    assert titles[:5] == ["Model", "Method", "Bits", "Group", "Backend"]
    assert "Perplexity, wikitext2" in titles and "Decode, tok/s, 1 beam" in titles
    assert "Decode, tok/s, 4 beams" not in titles  # nothing in it
    assert [r["method"] for r in made.rows] == ["float32", "GPTQ", "Q4_K_M", "float32"]
    assert [r["bits"] for r in made.rows] == [None, 4, "4.5", None]
    assert [r["state"] for r in made.rows] == ["done", "done", "done", "failed"]


def test_markdown_says_how_it_was_measured_and_what_failed() -> None:
    text = report.markdown([example()])
    lines = text.splitlines()
    assert "100.00 ± 2.50" in lines[2]
    assert "pipe\\|name" in text and "It \\| broke." in text
    assert "4 of 9 windows" in text and "Test CPU" in text and "llama 1" in text
    cells = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(cells) == 1


def test_csv_holds_every_number_and_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv([example()]))))
    assert [r["ppl_wikitext2"] for r in rows] == ["5.68", "5.85", "5.9", ""]
    assert rows[0]["decode_tok_s_1_sd"] == "2.5" and rows[0]["ppl_error_wikitext2"] == "0.1"
    assert rows[3]["model"] == "'=cmd()"


def test_runs_are_compared_in_one_table() -> None:
    other = run(row("base", perplexity={"ptb": perplexity(8.0)}), run_id="20260102-000000-bbbb", title="second")
    made = report.table([example(), other])
    assert made.columns[0].key == "run"
    assert made.rows[-1]["run"] == "second" and made.rows[-1]["ppl_ptb"] == 8.0
    assert json.dumps(made.to_dict())


def test_plots_are_well_formed_and_hold_every_point() -> None:
    made = report.table([example()])
    found = plots.plots(made.rows, made.columns)
    assert set(found) == {"perplexity-wikitext2", "speed"}
    root = ElementTree.fromstring(found["perplexity-wikitext2"])
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 3 + 1  # points, and the legend's one backend
    assert "GPTQ 4 bit g128" in found["perplexity-wikitext2"]


def test_plots_escape_names_and_bear_one_point_or_none() -> None:
    svg = plots.scatter([plots.Point(1.0, 1.0, "<script>alert(1)</script>", 'a"&b')], "t", "x", "y")
    assert "<script>" not in svg
    ElementTree.fromstring(svg)
    assert plots.scatter([], "t", "x", "y") == ""
    assert plots.scatter([plots.Point(float("inf"), 1.0, "a", "b")], "t", "x", "y") == ""


def test_agreement_says_where_two_answers_part() -> None:
    assert agreement.agreement([1, 2, 3], [1, 2, 3]) == {"parts_at": None, "prefix": 1.0, "common": 1.0}
    parted = agreement.agreement([1, 2, 3, 4], [1, 2, 9, 4])
    assert (parted["parts_at"], parted["prefix"], parted["common"]) == (2, 0.5, 0.75)
    assert agreement.agreement([1, 2], [1, 2, 3])["parts_at"] == 2
    assert agreement.agreement([], []) == {"parts_at": None, "prefix": 1.0, "common": 1.0}


def test_segments_are_the_other_answer_with_its_differences_marked() -> None:
    segments = agreement.segments("The cat sat down.", "The dog sat down, here.")
    assert "".join(piece for piece, _ in segments) == "The dog sat down, here."
    assert ["dog", False] in segments and segments[0] == ["The ", True]
    assert agreement.segments("same", "same") == [["same", True]]


def test_answers_of_other_tokenizers_are_compared_by_words() -> None:
    found = agreement.compare({"text": "One two three.", "ids": [1]}, {"text": "One  two four.", "ids": [9, 8, 7]}, False)
    assert (found["unit"], found["parts_at"]) == ("words", 2)


def test_runs_are_kept_whole_and_the_damaged_are_named(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path / "evaluations")
    assert store.list() == []
    made = example() | {"id": store.new_id()}
    store.save(made)
    assert store.load(made["id"]) == json.loads(json.dumps(made))
    (store.folder / "20200101-000000-dead.json").write_text('{"version": 1', encoding="utf-8")
    listed = store.list()
    assert [entry["state"] for entry in listed] == ["done", "damaged"]
    with pytest.raises(StoreCorrupt):
        store.load("20200101-000000-dead")
    store.delete(made["id"])
    for wrong in (made["id"], "20990101-000000-none"):
        with pytest.raises(NotFound):
            store.load(wrong)
    assert not list(store.folder.glob(".*"))


def test_a_run_whose_process_is_gone_was_interrupted(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path)
    store.save(example() | {"id": "20260101-000001-here", "state": "running", "owner": this_process()})
    store.save(example() | {"id": "20260101-000002-gone", "state": "running", "owner": {"pid": 2**22 - 1, "started": 1.0}})
    states = {entry["id"][-4:]: entry["state"] for entry in store.list()}
    assert states == {"here": "running", "gone": "interrupted"}
    assert store.newest_unfinished() == "20260101-000002-gone"
    assert not alive(example())


def test_the_study_s_table_of_answers() -> None:
    same = {"question": "Why | how?", "text": "Because.", "agreement": agreement.agreement([1], [1]) | {"unit": "tokens"}}
    other = {"question": "Why | how?", "text": "No.", "agreement": agreement.agreement([1], [2]) | {"unit": "tokens"}}
    made = run(row("int4", answers=[other]), row("fp32", answers=[same]), reference=1)
    lines = report.answers_markdown(made).splitlines()
    assert lines[0] == "| Question | fp32 (ground truth) | int4 |"
    assert lines[2] == "| Why \\| how? | Because. | No. *(parts at token 1, 0 % common)* |"
    assert report.table([made]).rows[0]["agreement"] == 0.0

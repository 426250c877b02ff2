"""Evaluations over the page's routes and from the command line; lm-evaluation-harness on our own API."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.overlays import Overlays
from modules.registry import discover
from tests.conftest import ROOT

if TYPE_CHECKING:
    from tests.api.conftest import Server

GGUF = "wren-6m-gguf/wren-6m-F16.gguf"
SPEED = {"prompt_tokens": 16, "new_tokens": 4, "repetitions": 1, "beams": [1]}
PLAN = {
    "targets": [{"model": "echo", "loader": "echo"}, {"model": "echo", "loader": "echo", "options": {"context_length": 512}}],
    "speed": SPEED,
    "questions": {"questions": ["What is a train?", "What is a track?"], "max_tokens": 6},
    "title": "two echoes",
}


def finished(server: Server, run_id: str) -> dict[str, Any]:
    server.until(lambda: not server.http.get(f"/ui-api/evaluations/{run_id}").json()["active"], "evaluated")
    return dict(server.http.get(f"/ui-api/evaluations/{run_id}").json())


def start(server: Server, **changes: Any) -> str:
    answer = server.http.post("/ui-api/evaluations", json=PLAN | changes)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_run_from_the_page(server: Server) -> None:
    before = server.http.get("/ui-api/evaluations").json()
    assert before["data"][0]["name"] == "bundled" and len(before["questions"]["questions"]) == 5
    run_id = start(server)
    data = finished(server, run_id)
    run = data["run"]
    assert run["state"] == "done" and run["title"] == "two echoes" and run["hardware"]["cores"] >= 1
    assert [row["state"] for row in data["table"]["rows"]] == ["done", "done"]
    assert "ids" not in run["rows"][0]["answers"][0] and run["rows"][1]["answers"][0]["segments"]
    assert "decode_tok_s_1" in {column["key"] for column in data["table"]["columns"]}
    listed = server.http.get("/ui-api/evaluations").json()
    assert listed["runs"][0]["id"] == run_id and listed["active"] == []
    assert server.http.get("/ui-api/models").json()["state"] == "ready"  # the chats' model stayed where it was

    address = f"/ui-api/evaluations/export?ids={run_id}&format="
    exported = {form: server.http.get(address + form) for form in ("csv", "json", "markdown")}
    assert "attachment" in exported["csv"].headers["content-disposition"]
    assert len(list(csv.DictReader(io.StringIO(exported["csv"].text)))) == 2
    assert exported["json"].json()["id"] == run_id
    assert exported["markdown"].text.startswith("| Model |") and "What is a train?" in exported["markdown"].text

    vote = server.http.post(f"/ui-api/evaluations/{run_id}/vote", json={"question": 1, "row": 1})
    assert vote.json() == {"votes": {"1": 1}}
    assert server.http.post(f"/ui-api/evaluations/{run_id}/vote", json={"question": 1, "row": -1}).json() == {"votes": {}}
    for wrong in ({"question": 2, "row": 0}, {"question": 0, "row": 9}, {"question": 0}, {"question": "0", "row": 0}):
        assert server.http.post(f"/ui-api/evaluations/{run_id}/vote", json=wrong).status_code == 400

    other = start(server, title="again")
    finished(server, other)
    compared = server.http.get(f"/ui-api/evaluations/compare?ids={run_id},{other}").json()
    assert len(compared["table"]["rows"]) == 4 and compared["same_machine"]
    assert server.http.delete(f"/ui-api/evaluations/{other}").status_code == 200
    assert server.http.get(f"/ui-api/evaluations/{other}").status_code == 404


def test_a_run_can_be_stopped_and_goes_on(server: Server) -> None:
    slow = {"targets": [{"model": "echo", "loader": "echo", "options": {"load_seconds": 30}}], "questions": None}
    run_id = start(server, **slow)
    assert server.http.delete(f"/ui-api/evaluations/{run_id}").status_code == 409
    assert server.http.post(f"/ui-api/evaluations/{run_id}/resume").status_code == 409
    waiting = start(server, title="behind it")
    assert [entry["state"] for entry in server.http.get("/ui-api/evaluations").json()["active"]][-1] == "queued"
    assert server.http.post(f"/ui-api/evaluations/{run_id}/cancel").status_code == 200
    assert finished(server, run_id)["run"]["state"] == "cancelled"
    assert finished(server, waiting)["run"]["state"] == "done"
    server.until(lambda: len(server.workers()) == 1, "left with the chats' worker")
    assert server.http.post(f"/ui-api/evaluations/{run_id}/resume").status_code == 200
    server.http.post(f"/ui-api/evaluations/{run_id}/cancel")
    server.oracle()


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": []},
        {"targets": [{"model": "echo", "loader": "nobody"}]},
        {"data": ["/etc/passwd"]},
        {"data": ["../settings.yaml"]},
        {"data": ["wikitext2"]},
        {"speed": {"repetitions": 0}},
        {"speed": None, "questions": None},
        {"more": 1},
        {"context": "long"},
    ],
)
def test_a_plan_that_can_not_be_is_refused(server: Server, wrong: dict[str, Any]) -> None:
    answer = server.http.post("/ui-api/evaluations", json=PLAN | wrong)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_names_of_runs_stay_in_their_folder(server: Server) -> None:
    for name in ("..%2Fsettings", "nothing", "a%00b", "CON"):
        assert server.http.get(f"/ui-api/evaluations/{name}").status_code in (400, 404)
    assert server.http.get("/ui-api/evaluations/export?ids=").status_code == 400
    assert server.http.get("/ui-api/evaluations/compare?ids=x&format=y").status_code == 404
    assert server.http.get("/ui-api/evaluations/export?ids=x&format=exe").status_code == 400


def test_a_text_of_ones_own(server: Server) -> None:
    added = server.http.put("/ui-api/datasets/mein text.txt", json={"text": "Ein Zug fährt.\n"})
    assert added.status_code == 200
    assert any(entry["name"] == "mein text.txt" and entry["there"] for entry in added.json()["data"])
    assert (server.data / "datasets" / "mein text.txt").read_text(encoding="utf-8") == "Ein Zug fährt.\n"
    assert "mein text.txt" in server.http.get("/ui-api/quantizations").json()["calibration"]
    for name, body in (("x.exe", {"text": "a"}), ("..%2Fx.txt", {"text": "a"}), ("e.txt", {"text": " "}), ("n.txt", {})):
        assert server.http.put(f"/ui-api/datasets/{name}", json=body).status_code in (400, 404, 405)


def test_quantising_refuses_what_can_not_be(server: Server) -> None:
    overview = server.http.get("/ui-api/quantizations").json()
    assert overview["choices"]["bits"] == [2, 3, 4, 8] and overview["defaults"]["group_size"] == 128
    for body in (
        {"model": "echo"},
        {"model": "nothing-like-it"},
        {"model": "wren-6m", "settings": {"bits": 7}},
        {"model": "wren-6m", "settings": {"calibration": "/etc/passwd"}},
        {"model": "wren-6m", "name": "../out"},
        {"model": "wren-6m", "nonsense": 1},
        {},
    ):
        answer = server.http.post("/ui-api/quantizations", json=body)
        assert answer.status_code in (400, 404, 422), (body, answer.text)
    for path in ("nobody/cancel", "nobody/resume"):
        assert server.http.post(f"/ui-api/quantizations/{path}").status_code == 404
    assert server.http.delete("/ui-api/quantizations/nobody").status_code == 404


# --- the command line ----------------------------------------------------------------------------------------------


def command(*words: str, data: Path) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SWITCHYARD_") or k == "SWITCHYARD_SET"}
    line = [sys.executable, "server.py", *words, "--user-data-dir", str(data)]
    return subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=800, check=False)


def test_bench_takes_the_study_s_options_in_both_spellings(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--model_name", "echo", "--loader", "echo", "--prompt", "count to ten", "--max_tokens", "8", "--repetitions", "3"]
    done = command("bench", *options, "--device", "cpu", "--json", str(out), data=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| Model | Backend |") and "±" in done.stdout
    (row,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert (row["tokens"], row["repetitions"], row["tok_s"]["n"], row["num_beams"]) == (8, 3, 3, 1)
    assert row["peak_memory_bytes"] and row["text"]
    done = command(
        "bench", "echo", "--max-tokens", "4", "--repetitions", "1", "--num-beams", "1", "4", "--format", "json", data=tmp_path
    )
    assert done.returncode == 1
    good, bad = json.loads(done.stdout)["results"]
    assert good["tok_s"]["n"] == 1 and "no beam search" in bad["error"] and bad["code"] == "unsupported_parameter"
    for words in (["bench"], ["bench", "echo", "--repetitions", "0"], ["bench", "echo", "--loader", "nobody"]):
        done = command(*words, data=tmp_path)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_evaluate_keeps_lists_resumes_and_compares(tmp_path: Path) -> None:
    done = command(
        "evaluate", "echo", "--speed", "--beams", "1", "--repetitions", "1", "--prompt-tokens", "8", "--new-tokens", "4",
        "--data", "bundled", "--title", "first", "--plots", str(tmp_path / "plots"), data=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Echo can't score text" in done.stderr  # the speed is measured all the same
    assert "Decode, tok/s, 1 beam" in done.stdout
    listed = command("evaluate", "--list", data=tmp_path).stdout.split()
    assert listed[1:] == ["partial", "first"]
    again = command("evaluate", "--resume", "--format", "csv", "--out", str(tmp_path / "again.csv"), data=tmp_path)
    assert again.returncode == 1 and (tmp_path / "again.csv").read_text(encoding="utf-8").startswith("run_id,")
    compared = command("evaluate", "--compare", listed[0], listed[0], data=tmp_path)
    assert compared.returncode == 0 and compared.stdout.count("| echo |") == 2
    missing = command("evaluate", "echo", "--data", "c4", data=tmp_path)
    assert missing.returncode == 1 and "c4-validation.00000-of-00008.json.gz" in missing.stderr
    assert command("evaluate", data=tmp_path).returncode == 1


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------

PERPLEXITY_TASK = """\
task: own_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/texts.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
CHOICE_TASK = """\
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """A folder with two tasks of our own and their data: nothing is fetched."""
    overlays = Overlays.find(ROOT)
    if not overlays.complete("lm_eval") or not overlays.has_module("lm_eval", "lm_eval"):
        pytest.skip("lm-evaluation-harness is not installed (install lm_eval)")
    if (reason := overlays.unavailable(discover()["llamacpp"])) is not None:
        pytest.skip(f"llama.cpp: {reason}")
    text = (ROOT / "modules" / "evaluate" / "heldout.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    questions = [{"q": "Two plus two is", "choices": [" four", " zzq xv"], "gold": 0}]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    for name, task in (("own_perplexity", PERPLEXITY_TASK), ("own_choice", CHOICE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(task.format(folder=tmp_path.as_posix()), encoding="utf-8")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def ours(folder: Path, *words: str) -> dict[str, Any]:
    """The evaluation's JSON of one row."""
    done = command("evaluate", GGUF, "--threads", "1", "--format", "json", *words, data=folder / "data")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["rows"][0])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the harness imports for long on a busy machine
def test_tasks_of_ones_own_run_offline_and_agree_with_our_perplexity(harness: Path) -> None:
    text = str(harness / "text.txt")
    row = ours(
        harness, "--tasks", "own_perplexity,own_choice", "--task-dir", str(harness), "--data", text, "--windows", "rolling"
    )
    results = row["tasks"]["results"]
    assert results["own_choice"]["acc"] == 1.0
    assert results["own_perplexity"]["word_perplexity"] == pytest.approx(row["perplexity"][text]["word_perplexity"], rel=0.005)
    assert results["own_perplexity"]["bits_per_byte"] == pytest.approx(row["perplexity"][text]["bits_per_byte"], rel=0.001)
    unknown = command("evaluate", GGUF, "--tasks", "no_such_task", "--task-dir", str(harness), data=harness / "data")
    assert unknown.returncode == 1 and "no_such_task" in unknown.stderr


LOCAL_COMPLETIONS = """\
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
arguments = dict(base_url=sys.argv[1], model=sys.argv[2], tokenizer=sys.argv[3], tokenizer_backend="huggingface", max_length=257)
found = simple_evaluate("local-completions", model_args=arguments, tasks=["own_perplexity"],
                        task_manager=TaskManager(include_path=sys.argv[4]), bootstrap_iters=0, log_samples=False)
print("RESULT" + json.dumps(found["results"]["own_perplexity"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the harness imports for long on a busy machine
def test_lm_eval_over_our_api_gives_our_perplexity(launch: Callable[..., Server], harness: Path) -> None:
    server = launch("--loader", "llamacpp", "--threads", "1", model=GGUF).wait_ready()
    overlays = Overlays.find(ROOT)
    words = [f"{server.url}/v1/completions", GGUF, str(ROOT / "models" / "wren-6m"), str(harness)]
    environ = overlays.worker_env("lm_eval") | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(harness / "cache")}
    line = [str(overlays.python("lm_eval")), "-c", LOCAL_COMPLETIONS, *words]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.partition("RESULT")[2])
    # Its client keeps one token of the context for generation, so 257 there are windows of 256 here.
    text = str(harness / "text.txt")
    value = ours(harness, "--data", text, "--windows", "rolling", "--context", "256")["perplexity"][text]
    assert theirs["bits_per_byte,none"] == pytest.approx(value["bits_per_byte"], rel=0.001)

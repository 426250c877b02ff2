"""Whole runs over real workers: Echo (which can't score) everywhere, llama.cpp and Transformers where they are installed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from modules.errors import Conflict, InvalidParameter, ModelNotFound
from modules.evaluate.plan import Plan, QuestionPlan, SpeedPlan, Target
from modules.evaluate.runner import Evaluation, Surroundings
from modules.evaluate.store import EvaluationStore
from modules.library import LocalLibrary
from modules.registry import discover
from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

SPECS = discover()
GGUF = Target("wren-6m-gguf/wren-6m-F16.gguf", "llamacpp", {"threads": 1})
HF = Target("wren-6m", "transformers", {"dtype": "float32", "threads": 1})
ECHO = Target("echo", "echo")


Workers = Callable[[], "list[psutil.Process]"]


def needs(overlays: Overlays, *targets: Target) -> None:
    for target in targets:
        spec = SPECS[str(target.loader)]
        if (reason := overlays.unavailable(spec)) is not None:
            pytest.skip(f"{spec.title}: {reason}")
        if not (ROOT / "models" / target.model).exists():
            pytest.skip(f"{target.model} is not here")


@pytest.fixture
def around(tmp_path: Path, overlays: Overlays) -> Surroundings:
    library = LocalLibrary([tmp_path, ROOT / "models"], SPECS.values())
    return Surroundings(library, SPECS, overlays, EvaluationStore(tmp_path / "evaluations"), [tmp_path / "datasets"])


@pytest.fixture
def new_workers() -> Workers:
    """The worker processes alive that were not when the test began (another test's may be kept)."""
    before = set(_workers())
    return lambda: [worker for worker in _workers() if worker not in before]


def text_file(tmp_path: Path, size: int = 6000) -> str:
    path = tmp_path / "short.txt"
    path.write_text((ROOT / "modules" / "evaluate" / "heldout.txt").read_text(encoding="utf-8")[:size], encoding="utf-8")
    return str(path)


def new(around: Surroundings, plan: Plan, heard: list[dict[str, Any]] | None = None) -> Evaluation:
    return Evaluation.new(around, plan, (heard if heard is not None else []).append)


async def test_echo_is_timed_and_asked_but_says_that_it_can_not_score(around: Surroundings, new_workers: Workers) -> None:
    heard: list[dict[str, Any]] = []
    plan = Plan(
        (ECHO, Target("echo", "echo", {"context_length": 512})),
        data=("bundled",),
        speed=SpeedPlan(32, 8, 2, (1, 4)),
        questions=QuestionPlan(("What is a train?", "And a track?"), "Be brief.", 8),
    )
    run = await new(around, plan, heard).work()
    row = run["rows"][0]
    assert run["state"] == "partial"
    assert [(e["stage"], e["code"]) for e in row["errors"]] == [("text:bundled", "incompatible_model")]
    assert "Echo can't score" in row["errors"][0]["message"]
    assert row["speed"]["beams"]["1"]["decode_tok_s"]["n"] == 2
    assert row["speed"]["beams"]["4"] == {"reason": "Echo has no beam search."}
    assert [len(answer["ids"]) > 0 for answer in row["answers"]] == [True, True]
    assert run["reference"] == 0 and run["rows"][1]["answers"][1]["agreement"]["parts_at"] is None
    assert row["peak_memory_bytes"] > 1_000_000 and row["load_s"] >= 0
    assert around.store.load(run["id"])["state"] == "partial"
    assert {event["stage"] for event in heard} >= {"load", "speed", "answers", "end"}
    assert around.library.list() and not new_workers()


async def test_a_model_that_does_not_load_leaves_the_others_their_turn(around: Surroundings) -> None:
    plan = Plan((Target("echo", "echo", {"fault": "exit"}), ECHO), speed=SpeedPlan(16, 4, 1, (1,)))
    run = await new(around, plan).work()
    assert [row["errors"][0]["code"] if row["errors"] else None for row in run["rows"]] == ["worker_crashed", None]
    assert run["rows"][1]["speed"]


async def test_what_is_wrong_is_said_before_anything_runs(around: Surroundings, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="wikitext2 is not here"):
        new(around, Plan((ECHO,), data=("wikitext2",)))
    with pytest.raises(InvalidParameter, match="no backend 'nobody'"):
        new(around, Plan((Target("echo", "nobody"),), data=("bundled",)))
    assert around.store.ids() == []
    run = await new(around, Plan((Target("not-there"), Target("echo", "llamacpp")), data=("bundled",))).work()
    assert [row["errors"][0]["code"] for row in run["rows"]] == [ModelNotFound.code, "incompatible_model"]
    assert run["rows"][1]["errors"][0]["hint"]


async def test_ppl_of_the_same_weights_is_the_same_in_two_loaders(
    around: Surroundings, tmp_path: Path, overlays: Overlays
) -> None:
    needs(overlays, HF, GGUF)
    text = text_file(tmp_path)
    run = await new(around, Plan((HF, GGUF), data=(text,), context=128, max_windows=8)).work()
    assert run["state"] == "done", [row["errors"] for row in run["rows"]]
    first, second = (row["perplexity"][text] for row in run["rows"])
    assert first["ids_sha256"] == second["ids_sha256"]
    assert first["tokens"] == 8 * 127
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=0.005)
    assert 2 < first["perplexity"] < first["word_perplexity"]
    assert run["rows"][0]["size_bytes"] > 0 and run["rows"][1]["peak_memory_bytes"] > 0


async def test_a_stopped_run_goes_on_where_it_was(
    around: Surroundings, tmp_path: Path, overlays: Overlays, new_workers: Workers
) -> None:
    needs(overlays, GGUF)
    text = text_file(tmp_path)
    plan = Plan((GGUF,), data=(text,), context=64)
    whole = (await new(around, plan).work())["rows"][0]["perplexity"][text]
    windows: list[str] = []
    work: asyncio.Task[Any] | None = None

    def stop_after_five(event: dict[str, Any]) -> None:
        windows.append(event["words"])
        if work is not None and event["words"].startswith("window 5 "):
            work.cancel()

    first = Evaluation.new(around, plan, stop_after_five)
    work = asyncio.create_task(first.work())
    with pytest.raises(asyncio.CancelledError):
        await work
    stored = around.store.load(first.run["id"])
    assert stored["state"] == "cancelled" and stored["rows"][0]["perplexity"] == {}
    assert len(stored["rows"][0]["unfinished"][text]["sums"]) >= 5
    assert not new_workers()
    heard: list[dict[str, Any]] = []
    run = await Evaluation.resume(around, first.run["id"], heard.append).work()
    assert run["state"] == "done" and not any(event["words"].startswith("window 3 ") for event in heard)
    assert run["rows"][0]["perplexity"][text]["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-9)


async def test_a_worker_that_dies_in_the_middle_loses_only_its_own_text(
    around: Surroundings, tmp_path: Path, overlays: Overlays, new_workers: Workers
) -> None:
    needs(overlays, GGUF)
    text = text_file(tmp_path)
    killed: list[int] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["words"].startswith("window 3 ") and not killed:
            (worker,) = new_workers()
            killed.append(worker.pid)
            os.kill(worker.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    plan = Plan((GGUF,), data=(text, "bundled"), context=64, max_windows=6)
    run = await Evaluation.new(around, plan, kill_once).work()
    row = run["rows"][0]
    assert killed and [(e["stage"], e["code"]) for e in row["errors"]] == [(f"text:{text}", "worker_crashed")]
    assert list(row["perplexity"]) == ["bundled"] and len(row["unfinished"][text]["sums"]) == 3
    again = await Evaluation.resume(around, run["id"], lambda event: None).work()
    assert again["state"] == "done" and set(again["rows"][0]["perplexity"]) == {text, "bundled"}


async def test_a_text_that_is_too_short_and_a_context_that_is_too_long(
    around: Surroundings, tmp_path: Path, overlays: Overlays
) -> None:
    needs(overlays, GGUF)
    text = text_file(tmp_path, 200)
    run = await new(around, Plan((GGUF,), data=(text,))).work()
    assert "one window needs 1024" in run["rows"][0]["errors"][0]["message"]
    run = await new(around, Plan((GGUF,), data=("bundled",), context=4096)).work()
    assert "holds 1024 tokens" in run["rows"][0]["errors"][0]["message"]
    run = await new(around, Plan((GGUF,), data=(text,), windows="rolling")).work()
    value = run["rows"][0]["perplexity"][text]
    assert run["state"] == "done" and value["tokens"] == value["all_tokens"]


async def test_a_run_is_worked_on_once(around: Surroundings) -> None:
    evaluation = new(around, Plan((ECHO,), speed=SpeedPlan(16, 4, 1, (1,))))
    with pytest.raises(Conflict):
        Evaluation.resume(around, evaluation.run["id"], lambda event: None)


def _workers() -> list[psutil.Process]:
    """Worker processes below this one that are alive."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "modules.worker" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.Error:
            continue  # it ended while we looked
    return found


async def test_the_operator_may_name_a_path(around: Surroundings, tmp_path: Path) -> None:
    broken = tmp_path.parent / "elsewhere.gguf"
    broken.write_bytes(b"GGUF but no more")
    plan = Plan((Target(str(broken), "llamacpp"),), speed=SpeedPlan(16, 4, 1, (1,)))
    run = await new(around, plan).work()
    assert run["rows"][0]["errors"][0]["code"] == "model_not_found"  # the page names what is listed
    around.by_path = True
    run = await new(around, plan).work()
    assert run["rows"][0]["errors"][0]["code"] in ("incompatible_model", "corrupt_model", "backend_unavailable")
    assert run["rows"][0]["format"] == "gguf"

"""Batch files: lines in and out, an output that survives a kill, many lines at once, what stops a batch and what does not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.echo import SPEC
from modules import caller
from modules.batch import jobs as jobs_module
from modules.batch.files import Output, read_lines, refuse_same
from modules.batch.jobs import BatchJobs
from modules.batch.lines import URLS, answered, failed, parse_line, refused
from modules.batch.runner import BatchRun, Progress
from modules.errors import Conflict, EngineDead, InvalidParameter, NoModelLoaded, NotFound, StorageFull
from modules.events import EventBus
from modules.overlays import write_json
from modules.residents import Place, Ticket
from modules.schema import ModelInfo


def line(custom_id: Any, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(text + "\n" for text in lines), encoding="utf-8")
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


# --- a line ------------------------------------------------------------------------------------------------------


def test_a_line() -> None:
    found = parse_line(b"\xef\xbb\xbf" + line("a", prompt="x").encode() + b"\r\n", 1)
    assert (found.custom_id, found.url, found.body, found.error) == ("a", "/v1/completions", {"prompt": "x"}, None)


@pytest.mark.parametrize(
    "raw,custom_id,code,words",
    [
        (b"broken {", None, "invalid_json", "Line 7 is no valid JSON"),
        (b"\xff\xfe", None, "invalid_json", "no UTF-8"),
        (b"[1]", None, "invalid_json", "no JSON object"),
        (b'{"custom_id": "a", "x": NaN}', None, "invalid_json", "no valid JSON"),
        (line("").encode(), None, "invalid_parameter", "custom_id must be text"),
        (line(5).encode(), None, "invalid_parameter", "custom_id must be text"),
        (b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "a", "invalid_parameter", "POST"),
        (line("a", "/v1/files").encode(), "a", "invalid_parameter", URLS[0]),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": []}', "a", "invalid_parameter", "body must be an object"),
        (line("a", stream=True).encode(), "a", "unsupported_parameter", "does not stream"),
    ],
)
def test_a_broken_line_says_why(raw: bytes, custom_id: str | None, code: str, words: str) -> None:
    found = parse_line(raw, 7)
    assert found.error is not None and found.error.code == code and words in str(found.error)
    assert found.custom_id == custom_id
    record = refused(found, found.error)
    assert record["response"] is None and record["error"]["code"] == code and record["line"] == 7 and failed(record)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    found = parse_line(raw, 2)
    assert (found.error is None) == (found.body is not None)


def test_lines_of_a_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"), "", line("a"), "  ", line("b"))
    found = list(read_lines(source))
    assert [(item.number, item.custom_id) for item in found] == [(1, "a"), (3, "a"), (5, "b")]
    assert found[1].error is not None and "earlier line" in str(found[1].error)
    with pytest.raises(NotFound, match="no batch file"):
        list(read_lines(tmp_path / "none.jsonl"))
    with pytest.raises(Conflict, match="over the input"):
        refuse_same(source, tmp_path / "." / "in.jsonl")


# --- the output --------------------------------------------------------------------------------------------------


def record(number: int, custom_id: str | None = "a", status: int = 200) -> dict[str, Any]:
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    return answered(parse_line(line(custom_id).encode(), number), status, {"text": "Zürich 🙂", "usage": usage}, "r")


@pytest.mark.parametrize("torn", [b"", b'{"id": "batch', "Zürich".encode()[:2], b"x" * (3 << 20)])
def test_what_a_kill_tore_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    output = Output(path)
    output.append([record(1), record(2, "b", 400)])
    output.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    output = Output(path)
    assert path.read_bytes() == whole
    assert output.done == {1: False, 2: True} and output.failures == 1
    assert (output.prompt_tokens, output.completion_tokens) == (4, 6)
    output.append([record(3, "c")])
    output.close()
    assert [item["line"] for item in results(path)] == [1, 2, 3]


def test_an_output_of_another_input_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = Output(path)
    output.append([record(1, "other")])
    with pytest.raises(Conflict, match="another input: line 1 is 'other'"):
        output.has(parse_line(line("mine").encode(), 1))
    output.close()
    path.write_text('{"some": "file"}\n', encoding="utf-8")
    with pytest.raises(Conflict, match=r"Line 1 of out\.jsonl is no batch result"):
        Output(path)
    assert path.read_text(encoding="utf-8") == '{"some": "file"}\n'


def test_results_of_another_program_count_by_their_id(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "x", "custom_id": "b", "response": {"status_code": 200, "body": {}}, "error": null}\n')
    output = Output(path)
    assert output.has(parse_line(line("b").encode(), 9)) and not output.has(parse_line(line("c").encode(), 1))
    output.close()


def test_a_full_disk_leaves_only_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    output = Output(path)
    output.append([record(1)])
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageFull, match="disk is full"):
            output.append([record(2, "b")])
    assert path.read_bytes() == before and list(output.done) == [1]
    output.append([record(2, "b")])
    output.close()
    assert len(results(path)) == 2


# --- a run -------------------------------------------------------------------------------------------------------


class Answers:
    """Answers each request with its own prompt, counting how many run at once."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.active = self.most = 0
        self.faults: dict[str, list[Exception]] = {}
        self.hold: asyncio.Event | None = None

    async def __call__(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert caller.current().background
        self.asked.append(body["prompt"])
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await (self.hold.wait() if self.hold is not None else asyncio.sleep(0.001))
            if self.faults.get(body["prompt"]):
                raise self.faults[body["prompt"]].pop(0)
            return 200, {"text": body["prompt"], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}
        finally:
            self.active -= 1


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Answers]:
    monkeypatch.setattr("modules.batch.runner.RETRY_WAIT_S", 0.001)
    source = write(tmp_path / "in.jsonl", *(line(f"id{n}", prompt=f"p{n}") for n in range(20)), "broken", line("x", prompt=1))
    return source, tmp_path / "out.jsonl", Answers()


def run(source: Path, target: Path, answers: Answers, slots: int = 3) -> tuple[Progress, list[Progress]]:
    told: list[Progress] = []
    work = BatchRun(source, target, answers, lambda: slots, told.append)
    return asyncio.run(work.run()), told


def test_every_line_is_answered_once(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch
    progress, told = run(source, target, answers)
    found = results(target)
    assert sorted(item["line"] for item in found) == list(range(1, 23))
    assert {item["custom_id"]: item["response"]["body"]["text"] for item in found if item["response"]}["id7"] == "p7"
    assert answers.most == 4  # three slots, and one that waits
    assert (progress.total, progress.done, progress.failed, progress.completion_tokens) == (22, 22, 1, 84)
    assert [p.done for p in told] == sorted(p.done for p in told) and told[0].done == 0 and progress.tokens_per_s
    again = Answers()
    assert run(source, target, again)[0].done == 22 and again.asked == []


def test_a_cancelled_run_goes_on_where_it_stopped(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch

    async def cancel_midway() -> None:
        work = asyncio.create_task(BatchRun(source, target, answers, lambda: 2).run())
        while len(answers.asked) < 9:
            await asyncio.sleep(0)
        answers.hold = asyncio.Event()
        await asyncio.sleep(0.02)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancel_midway())
    before = {item["line"] for item in results(target)}
    assert 0 < len(before) < 22
    more = Answers()
    run(source, target, more)
    assert sorted(item["line"] for item in results(target)) == list(range(1, 23))
    assert not {f"p{number - 1}" for number in before} & {str(prompt) for prompt in more.asked}


def test_a_bad_request_is_its_own_error_only(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch
    answers.faults["p3"] = [InvalidParameter("temperature must be at least 0.", param="temperature")]
    progress, _ = run(source, target, answers)
    bad = next(item for item in results(target) if item["custom_id"] == "id3")
    assert bad["response"]["status_code"] == 400 and bad["response"]["body"]["error"]["param"] == "temperature"
    assert bad["error"] is None and progress.failed == 2


def test_a_worker_that_died_is_asked_again_a_line_that_kills_it_is_given_up(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch
    answers.faults["p4"] = [EngineDead("It died.")]
    answers.faults["p5"] = [EngineDead("It died.") for _ in range(9)]
    run(source, target, answers)
    by_id = {item["custom_id"]: item for item in results(target)}
    assert by_id["id4"]["response"]["status_code"] == 200
    assert by_id["id5"]["response"]["status_code"] == 502
    assert by_id["id5"]["response"]["body"]["error"]["code"] == "worker_crashed"
    assert answers.asked.count("p5") == 3


def test_no_model_stops_the_batch_and_spoils_no_line(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch
    answers.faults["p6"] = [NoModelLoaded("No model is loaded.")]
    with pytest.raises(NoModelLoaded):
        run(source, target, answers)
    done = {item["custom_id"] for item in results(target)}
    assert "id6" not in done and all(not failed(item) for item in results(target) if item["custom_id"])
    assert run(source, target, Answers())[0].done == 22


def test_an_input_that_shrinks_while_it_is_read(batch: tuple[Path, Path, Answers]) -> None:
    source, target, answers = batch

    async def shrink() -> None:
        work = BatchRun(source, target, answers, lambda: 1)
        task = asyncio.create_task(work.run())
        while not answers.asked:
            await asyncio.sleep(0)
        work._reader = iter(())
        await task

    with pytest.raises(Conflict, match="has changed"):
        asyncio.run(shrink())


# --- manners -----------------------------------------------------------------------------------------------------


def test_everyone_else_goes_before_a_batch() -> None:
    async def order() -> list[str]:
        spec = dataclasses.replace(SPEC, slots=1)
        place = Place("r1", spec.builtin[0], spec, {}, lambda: None, state="ready")
        place.client = object()  # type: ignore[assignment]  # never called
        names = ["batch 1", "batch 2", "chat 1", "chat 2"]
        tickets = {name: Ticket(n, False, None, name.startswith("batch")) for n, name in enumerate(names)}
        first = Ticket(-1, False, None, True)
        for ticket in (first, *tickets.values()):
            place.enqueue(ticket)
        served = []
        lease = first.future.result()
        while tickets:
            assert lease is not None
            place.release(lease)
            name = next(name for name, ticket in tickets.items() if ticket.future.done())
            lease = tickets.pop(name).future.result()
            served.append(name)
        return served

    assert asyncio.run(order()) == ["chat 1", "chat 2", "batch 1", "batch 2"]


def test_a_model_may_run_more_at_once_than_its_loader_says() -> None:
    place = Place("r1", SPEC.builtin[0], SPEC, {}, lambda: None)
    assert place.slots == SPEC.slots
    place.info = ModelInfo("m", "m", "echo", "echo", slots=3)
    assert place.slots == 3


# --- the server's batches ----------------------------------------------------------------------------------------


async def test_a_stop_while_the_first_state_is_saved_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gate = asyncio.Event(), threading.Event()

    async def resolve(name: str | None) -> Any:
        return SimpleNamespace(model=SimpleNamespace(id="m"))

    async def answer(*request: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    def save(path: Path, value: dict[str, Any]) -> None:
        if value["state"] == "running":
            assert gate.wait(60)
        write_json(path, value)

    monkeypatch.setattr(jobs_module, "write_json", save)
    monkeypatch.setattr(jobs_module, "slots_of", lambda services, model: 1)
    manager = SimpleNamespace(active=lambda: "m", resolve=resolve)
    jobs = BatchJobs(SimpleNamespace(manager=manager, events=EventBus()), tmp_path, answer)  # type: ignore[arg-type]
    batch = await jobs.create("b.jsonl")
    await jobs.upload(batch.id, 0, (line("one", prompt="x") + "\n").encode())
    await jobs.start(batch.id)
    await asyncio.wait_for(asked.wait(), 20)
    stop = asyncio.create_task(jobs.stop(batch.id, "paused"))
    await asyncio.sleep(0)  # it has asked the work to end, and waits for that
    gate.set()
    await asyncio.wait_for(stop, 20)
    await jobs.close()
    assert batch.state == "paused" and not jobs.output_path(batch.id).read_bytes()

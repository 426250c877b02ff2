"""The server's quantisation jobs: queue, stop, resume, restart. The quantiser itself is tested elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.errors import Conflict, IncompatibleModel, InvalidParameter, LoadOutOfMemory, ModelNotFound, NotFound
from modules.events import EventBus
from modules.quantizations import Quantizations, settings_of
from modules.quantize.process import Quantized, QuantizeJob
from modules.schema import ModelFiles, Quantization

if TYPE_CHECKING:
    from modules.overlays import Overlays


class Library:
    def find(self, name: str) -> ModelFiles:
        quantization = Quantization("gptq", 4) if name == "packed" else None
        if name == "gone":
            raise ModelNotFound("There is no model.")
        return ModelFiles(name, f"/models/{name}", "gptq" if quantization else "hf", quantization=quantization)

    def list(self) -> list[ModelFiles]:
        return [self.find("base")]

    def check(self, model: ModelFiles) -> None:
        """Every one is fine."""


class Quantiser:
    """Stands for the child process: it sends what a real one sends, and waits at `gate` after the first layer."""

    def __init__(self) -> None:
        self.jobs: list[QuantizeJob] = []
        self.gate = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, job: QuantizeJob, on_event: Callable[[dict[str, Any]], None], overlays: Overlays) -> Quantized:
        self.jobs.append(job)
        on_event({"stage": "Reading the model's structure"})
        on_event({"note": "a note"})
        on_event({"block": 1, "blocks": 2, "layer": "q_proj", "loss": 0.01, "damp": 0.01, "fraction": 0.5, "eta_s": 3.0})
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        on_event({"block": 2, "blocks": 2, "layer": "q_proj", "loss": 0.02, "damp": 0.01, "fraction": 1.0, "eta_s": 0.0})
        return Quantized(job.out, 1234, 5.0, 0.015, 2)


class Place:
    def __init__(self, folder: Path, overlays: Overlays) -> None:
        self.folder, self.overlays = folder, overlays
        self.quantiser = Quantiser()
        self.jobs = self.fresh()

    def fresh(self) -> Quantizations:
        """As after a restart of the server."""
        return Quantizations(
            Library(), self.folder, self.overlays, EventBus(), self.folder / "quantizations.json", run=self.quantiser
        )

    async def state(self, job_id: str, wanted: str) -> dict[str, Any]:
        async def there() -> None:
            while self.jobs.job(job_id)["state"] != wanted or (wanted == "running" and not self.jobs.job(job_id)["losses"]):
                await asyncio.sleep(0.005)

        await asyncio.wait_for(there(), 20)
        return self.jobs.job(job_id)


@pytest.fixture
async def place(tmp_path: Path, overlays: Overlays) -> Any:
    made = Place(tmp_path, overlays)
    yield made
    await made.jobs.close()


async def test_one_after_another_with_losses_and_a_result(place: Place) -> None:
    first = await place.jobs.start("base", {"bits": 3})
    second = await place.jobs.start("base", {"bits": 4, "group_size": 64})
    running = await place.state(first["id"], "running")
    assert (running["block"], running["blocks"], running["stage"], running["eta_s"]) == (1, 2, "q_proj", 3.0)
    assert running["losses"] == [[1, "q_proj", 0.01]] and running["notes"] == ["a note"]
    assert place.jobs.job(second["id"])["state"] == "queued"
    place.quantiser.gate.set()
    done = await place.state(second["id"], "done")
    assert done["result"] == {"model": "base-GPTQ-4bit-64g", "size_bytes": 1234, "seconds": 5.0, "mean_loss": 0.015, "layers": 2}
    assert [job.settings.bits for job in place.quantiser.jobs] == [3, 4]


async def test_a_stopped_one_is_resumed_with_the_same_settings(place: Place) -> None:
    job = await place.jobs.start("base", {"bits": 2, "desc_act": True}, name="mine")
    await place.state(job["id"], "running")
    await place.jobs.cancel(job["id"])
    assert place.jobs.job(job["id"])["state"] == "cancelled"
    place.quantiser.gate.set()
    place.jobs.resume(job["id"])
    await place.state(job["id"], "done")
    assert [made.settings for made in place.quantiser.jobs] == [settings_of({"bits": 2, "desc_act": True})] * 2
    assert {made.out for made in place.quantiser.jobs} == {place.folder / "mine"}
    with pytest.raises(Conflict):
        place.jobs.resume(job["id"])


async def test_a_restart_finds_what_was_cut_off(place: Place) -> None:
    job = await place.jobs.start("base", {"bits": 4})
    await place.state(job["id"], "running")
    survivor = place.fresh()  # the file says running; that process is no more
    (found,) = survivor.jobs()
    assert (found["id"], found["state"], found["settings"]["bits"]) == (job["id"], "interrupted", 4)
    place.quantiser.gate.set()
    survivor.resume(job["id"])
    for _ in range(400):
        if survivor.job(job["id"])["state"] == "done":
            break
        await asyncio.sleep(0.01)
    assert survivor.job(job["id"])["state"] == "done"
    await survivor.close()


async def test_a_failure_keeps_its_words_and_can_be_tried_again(place: Place) -> None:
    place.quantiser.failure = LoadOutOfMemory("The memory ran out.", hint="Run it again.", detail={"stderr": "x", "secret": "y"})
    place.quantiser.gate.set()
    job = await place.jobs.start("base", {})
    failed = await place.state(job["id"], "failed")
    assert failed["error"]["code"] == "out_of_memory_load" and failed["error"]["detail"] == {"stderr": "x"}
    place.quantiser.failure = None
    place.jobs.resume(job["id"])
    await place.state(job["id"], "done")


async def test_what_can_not_be_is_refused_at_once(place: Place) -> None:
    with pytest.raises(IncompatibleModel, match="no plain Hugging Face folder"):
        await place.jobs.start("packed", {})
    with pytest.raises(ModelNotFound):
        await place.jobs.start("gone", {})
    for wrong in ({"bits": 5}, {"bits": "4"}, {"bits": True}, {"sym": 1}, {"nonsense": 1}, {"method": "rtn", "desc_act": True}):
        with pytest.raises(InvalidParameter):
            await place.jobs.start("base", wrong)
    for name in ("../out", "a/b", "con", ".hidden"):
        with pytest.raises(InvalidParameter):
            await place.jobs.start("base", {}, name=name)
    (place.folder / "there").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        await place.jobs.start("base", {}, name="there")
    await place.jobs.start("base", {}, name="new")
    with pytest.raises(Conflict, match="is being made"):
        await place.jobs.start("base", {"bits": 8}, name="new")
    with pytest.raises(NotFound):
        place.jobs.job("nobody")


async def test_giving_one_up_removes_its_work_folder(place: Place) -> None:
    job = await place.jobs.start("base", {}, name="mine")
    await place.state(job["id"], "running")
    work = place.folder / ".mine.part"
    work.mkdir()
    with pytest.raises(Conflict):
        place.jobs.forget(job["id"])
    await place.jobs.cancel(job["id"])
    place.jobs.forget(job["id"])
    assert not work.exists() and place.jobs.jobs() == [] and place.fresh().jobs() == []

"""The server's conversions: queued, stopped, failed. The converter itself is tested elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.conversions import Conversions
from modules.convert.gguf import Converted, ConvertJob
from modules.errors import Conflict, InvalidParameter, LoadOutOfMemory, ModelNotFound, NotFound
from modules.events import EventBus
from modules.schema import LoadProgress, ModelFiles

if TYPE_CHECKING:
    from modules.overlays import Overlays


class Library:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str) -> ModelFiles:
        if name == "gone":
            raise ModelNotFound("There is no model.")
        folder = self.folder.parent / "elsewhere" if name == "bundled" else self.folder
        return ModelFiles(name, str(folder / name), "hf")

    def list(self) -> list[ModelFiles]:
        return [self.find("base")]

    def check(self, model: ModelFiles) -> None:
        """Every one is fine."""


class Converter:
    """Stands for the child processes: says one stage and waits at `gate`."""

    def __init__(self) -> None:
        self.jobs: list[ConvertJob] = []
        self.started, self.gate = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, job: ConvertJob, on_progress: Callable[[LoadProgress], None], overlays: Overlays) -> Converted:
        self.jobs.append(job)
        self.started.set()
        on_progress(LoadProgress("Writing tensors", 0.5))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        assert job.out is not None or job.type == "auto"
        out = job.out or job.source.with_name("base-F16.gguf")
        return Converted(out, "F16" if job.type == "auto" else job.type, 99, 1.5, ("a note",))


class Place:
    def __init__(self, folder: Path, overlays: Overlays) -> None:
        self.folder = folder
        self.converter = Converter()
        self.events = EventBus()
        self.jobs = Conversions(Library(folder), folder, overlays, self.events, run=self.converter)

    async def state(self, job_id: str, *wanted: str) -> dict[str, Any]:
        async def there() -> dict[str, Any]:
            with self.events.subscribe() as events:
                if self.jobs.job(job_id)["state"] in wanted:
                    return self.jobs.job(job_id)
                async for event in events:
                    if event.kind == "conversion" and event.data["id"] == job_id and event.data["state"] in wanted:
                        return event.data
            raise AssertionError("the bus ended")

        return await asyncio.wait_for(there(), 20)


@pytest.fixture
async def place(tmp_path: Path, overlays: Overlays) -> Any:
    made = Place(tmp_path / "models", overlays)
    made.folder.mkdir()
    yield made
    await made.jobs.close()


async def test_one_after_another(place: Place) -> None:
    first, second = await place.jobs.start("base", "q8_0"), await place.jobs.start("base", "auto")
    running = await place.state(first["id"], "running")
    assert running["type"] == "Q8_0" and place.jobs.job(second["id"])["state"] == "queued"
    assert (await place.jobs.start("base", "Q8_0"))["id"] == first["id"], "the same asked for twice is one"
    assert place.jobs.busy("base")
    place.converter.gate.set()
    done = await place.state(first["id"], "done")
    assert done["result"] == {"model": "base-Q8_0.gguf", "size_bytes": 99, "seconds": 1.5} and done["notes"] == ["a note"]
    assert (await place.state(second["id"], "done"))["type"] == "F16"
    assert not place.jobs.busy("base")
    place.jobs.forget(first["id"])
    with pytest.raises(NotFound):
        place.jobs.job(first["id"])


async def test_stopped_at_work_and_while_it_waits(place: Place) -> None:
    first, second = await place.jobs.start("base", "Q8_0"), await place.jobs.start("base", "Q4_0")
    await asyncio.wait_for(place.converter.started.wait(), 20)
    with pytest.raises(Conflict):
        place.jobs.forget(first["id"])
    assert (await place.jobs.cancel(second["id"]))["state"] == "cancelled"
    assert (await place.jobs.cancel(first["id"]))["state"] == "cancelled"
    assert len(place.converter.jobs) == 1


async def test_a_failure_is_told(place: Place) -> None:
    place.converter.failure = LoadOutOfMemory("The conversion ran out of memory.", detail={"stderr": ["x"], "path": "/secret"})
    place.converter.gate.set()
    job = await place.jobs.start("base", "Q8_0")
    failed = await place.state(job["id"], "failed")
    assert failed["error"]["message"] == "The conversion ran out of memory." and failed["error"]["detail"] == {"stderr": ["x"]}


async def test_the_result_lies_in_the_users_folder(place: Place) -> None:
    place.converter.gate.set()
    job = await place.jobs.start("bundled", "Q8_0")
    await place.state(job["id"], "done")
    assert place.converter.jobs[0].out == place.folder / "bundled-Q8_0.gguf"


async def test_what_can_not_be(place: Place) -> None:
    with pytest.raises(InvalidParameter, match="no GGUF type"):
        await place.jobs.start("base", "Q99")
    with pytest.raises(ModelNotFound):
        await place.jobs.start("gone", "Q8_0")
    (place.folder / "base-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(Conflict, match="exists already"):
        await place.jobs.start("base", "Q8_0")
    assert place.jobs.jobs() == []

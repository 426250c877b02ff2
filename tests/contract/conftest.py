"""One real worker process per row, kept for the row's tests; a fresh one for the tests that break it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from modules.ray_engine.client import RayEngine
from modules.ray_engine.settings import RaySettings
from modules.registry import load_spec
from modules.schema import Done, GenerationRequest, PrefillProgress, StopParams, TokenEvent
from modules.worker_client import WorkerClient
from tests.contract.rows import ROWS, Row, ray_problem

if TYPE_CHECKING:
    from modules.overlays import Overlays

T = TypeVar("T")
_ids = itertools.count()


@dataclass
class Answer:
    """One finished generation."""

    tokens: list[TokenEvent] = field(default_factory=list)
    prefill: list[PrefillProgress] = field(default_factory=list)
    done: Done | None = None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.tokens)

    @property
    def ids(self) -> list[int]:
        return [token for event in self.tokens for token in event.token_ids]

    @property
    def end(self) -> Done:
        assert self.done is not None
        return self.done


class Bench:
    """A worker under test, driven from synchronous tests."""

    def __init__(self, row: Row, overlays: Overlays, loop: asyncio.AbstractEventLoop, ray: RayEngine | None = None) -> None:
        self.row, self.overlays, self.loop, self.ray = row, overlays, loop, ray
        self.spec = load_spec(row.loader)
        self.log: list[str] = []
        self.client: WorkerClient = self.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def options(self, **changes: Any) -> dict[str, Any]:
        return {o.name: o.default for o in self.spec.options} | self.row.options | changes

    def start(self) -> WorkerClient:
        if self.ray is not None:
            return self.run(self.ray.start(self.spec, self.log.append))
        return self.run(WorkerClient.start(self.spec, self.overlays, on_log=self.log.append))

    def load(self, path: Any = None, **options: Any) -> None:
        self.run(self.client.load(str(path or self.row.model()), self.options(**options)))

    def request(self, prompt: str | None, *, stop: StopParams | None = None, **fields: Any) -> GenerationRequest:
        fields.setdefault("sampling", {"temperature": 0.0})
        return GenerationRequest(f"t{next(_ids)}", prompt=prompt, stop=stop or StopParams(max_tokens=32), **fields)

    async def collect(self, request: GenerationRequest, abort_after: int | None = None) -> Answer:
        answer = Answer()
        async for event in self.client.generate(request):
            if isinstance(event, TokenEvent):
                answer.tokens.append(event)
                if abort_after is not None and len(answer.tokens) == abort_after:
                    await self.client.abort(request.request_id)
            elif isinstance(event, PrefillProgress):
                answer.prefill.append(event)
            else:
                answer.done = event
        return answer

    def generate(self, prompt: str | None, abort_after: int | None = None, **fields: Any) -> Answer:
        return self.run(self.collect(self.request(prompt, **fields), abort_after))

    def close(self) -> None:
        self.run(self.client.close())


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()


def _ready_row(row: Row, overlays: Overlays) -> Row:
    reason = row.skip_reason(overlays)
    if reason:
        pytest.skip(reason)
    return row


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.id)
def row(request: pytest.FixtureRequest, overlays: Overlays) -> Row:
    return _ready_row(request.param, overlays)


@pytest.fixture(scope="module")
def bench(row: Row, overlays: Overlays, loop: asyncio.AbstractEventLoop, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A loaded worker, shared by the tests of one row."""
    bench = Bench(row, overlays, loop, request.getfixturevalue("ray_engine") if row.ray else None)
    bench.load()
    yield bench
    bench.close()


@pytest.fixture
def fresh(row: Row, overlays: Overlays, loop: asyncio.AbstractEventLoop, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A worker of its own, nothing loaded yet; only for a loader's first row (see `pytest_collection_modifyitems`)."""
    bench = Bench(row, overlays, loop, request.getfixturevalue("ray_engine") if row.ray else None)
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def ray_engine(
    overlays: Overlays, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayEngine]:
    """One Ray for all tests of this process; `settings` may be changed between models."""
    if problem := ray_problem(overlays):
        pytest.skip(problem)
    engine = RayEngine(RaySettings(maximum=4), overlays, tmp_path_factory.mktemp("ray"))
    loop.run_until_complete(engine.start_node())
    engine.settings = RaySettings()
    yield engine
    loop.run_until_complete(engine.close())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rows that a test is not about, before a worker is started for them.

    `@pytest.mark.rows(loader=…, model=…)` names them; `fresh` breaks processes with one row of each loader.
    """
    out = [item for item in items if not _concerned(item)]
    if out:
        items[:] = [item for item in items if item not in set(out)]
        config.hook.pytest_deselected(items=out)


def _concerned(item: pytest.Item) -> bool:
    row = getattr(item, "callspec", None) and item.callspec.params.get("row")  # type: ignore[attr-defined]
    if not isinstance(row, Row):
        return True
    if row.variant and "fresh" in getattr(item, "fixturenames", ()):
        return False
    mark = item.get_closest_marker("rows")
    wanted = mark.kwargs if mark else {}
    return wanted.get("loader", row.loader) == row.loader and wanted.get("model", "") in row.id


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if "tests/contract/" in report.nodeid]
    ran = sorted(row.id for row in ROWS if any(f"[{row.id}" in node for node in passed))
    if ran:
        terminalreporter.write_line(f"contract suite: {len(ran)} of {len(ROWS)} rows ran: {', '.join(ran)}")

"""Everything here needs an NVIDIA GPU, and says so where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.overlays import nvidia_present
from modules.quantize.process import QuantizeJob, quantize
from modules.quantize.settings import QuantizeSettings
from tests.conftest import ROOT
from tests.contract.conftest import Bench
from tests.contract.rows import Row

if TYPE_CHECKING:
    from modules.overlays import Overlays

WREN = ROOT / "models" / "wren-6m"
Start = Callable[..., Bench]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group under pytest-xdist: they share the one card."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if not nvidia_present():
        pytest.skip("needs an NVIDIA GPU; this machine has no driver for one")


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()


class PatientBench(Bench):
    """A worker whose first load may compile kernels."""

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 1800))


@pytest.fixture
def start(gpu: None, overlays: Overlays, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(loader, path, cpu=False, **options): a worker with that model; `cpu` hides the card from it."""
    begun: list[Bench] = []

    def begin(loader: str, path: Path, *, cpu: bool = False, **options: Any) -> Bench:
        row = Row(f"gpu-{loader}", loader, lambda: path, options)
        missing = row.skip_reason(overlays)
        if missing:
            pytest.skip(missing)
        with monkeypatch.context() as patch:
            if cpu:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            bench = PatientBench(row, overlays, loop)
        begun.append(bench)
        bench.load()
        return bench

    yield begin
    for bench in begun:
        bench.close()


@pytest.fixture(scope="session")
def checkpoint(
    gpu: None, overlays: Overlays, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """checkpoint(bits=4, ...): Wren quantised on the GPU with these settings, made once."""
    folder = tmp_path_factory.mktemp("gptq")
    made: dict[QuantizeSettings, Path] = {}

    def make(**values: Any) -> Path:
        settings = QuantizeSettings(**{"nsamples": 16, "seqlen": 256, **values})
        if settings not in made:
            job = QuantizeJob(WREN, folder / str(len(made)), settings, device="cuda")
            made[settings] = loop.run_until_complete(quantize(job, lambda _: None, overlays)).path
        return made[settings]

    return make

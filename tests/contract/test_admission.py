"""A load that can't fit is refused before a worker starts, with the nearest setting that fits, which then loads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from modules.errors import CannotFit
from modules.events import EventBus
from modules.library import LocalLibrary
from modules.model_manager import ModelManager
from modules.plan import Machine
from modules.registry import discover
from modules.worker_client import WorkerClient
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from modules.engine_client import EngineClient
    from modules.overlays import Overlays
    from modules.schema import LoaderSpec

GB = 10**9
MODEL = "wren-6m-gguf/wren-6m-F16.gguf"
TOO_LONG = {"ctx_size": 2_000_000}  # a cache of 6 GB


class Rig:
    """The real library, backends and workers on a machine of 1 GB."""

    def __init__(self, overlays: Overlays, **options: Any) -> None:
        self.started: list[str] = []
        self.free = GB
        specs = discover()
        reason = overlays.unavailable(specs["llamacpp"])
        if reason:
            pytest.skip(f"llama.cpp: {reason}")

        def start(spec: LoaderSpec, on_log: Callable[[str], None]) -> Awaitable[EngineClient]:
            self.started.append(spec.name)
            return WorkerClient.start(spec, overlays, on_log=on_log)

        self.manager = ModelManager(
            LocalLibrary([ROOT / "models"], specs.values()), specs, overlays, EventBus(), start,
            available=lambda: self.free, machine=lambda: Machine(GB, GB), **options,
        )  # fmt: skip


def run(overlays: Overlays, work: Callable[[Rig], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def whole() -> None:
        rig = Rig(overlays, **options)
        try:
            await work(rig)
        finally:
            await rig.manager.close()

    asyncio.run(asyncio.wait_for(whole(), 120))


def test_a_refused_load_names_the_nearest_that_fits_and_that_loads(overlays: Overlays) -> None:
    async def work(rig: Rig) -> None:
        with pytest.raises(CannotFit) as caught:
            await rig.manager.load(MODEL, "llamacpp", TOO_LONG)
        assert rig.started == []
        near = caught.value.detail["nearest"]
        assert (near["loader"], near["options"]) == ("llamacpp", {"ctx_size": 1024})
        assert "ctx_size 1024" in caught.value.hint
        (card,) = rig.manager.residents()
        assert card.state == "failed" and card.error is not None and card.error["code"] == "cannot_fit"
        resident = await rig.manager.load(MODEL, near["loader"], near["options"])
        assert resident.state == "ready" and resident.info is not None and resident.info.context_length == 1024
        assert rig.started == ["llamacpp"]

    run(overlays, work)


def test_a_refused_load_leaves_the_model_that_answers(overlays: Overlays) -> None:
    async def work(rig: Rig) -> None:
        await rig.manager.load("echo")
        with pytest.raises(CannotFit):
            await rig.manager.load(MODEL, "llamacpp", TOO_LONG)
        active = rig.manager.active()
        assert active is not None and active.model.id == "echo" and active.state == "ready"

    run(overlays, work)


@pytest.mark.parametrize("by", ["request", "flag"])
def test_it_is_tried_anyway_where_the_operator_says_so(overlays: Overlays, by: str) -> None:
    async def work(rig: Rig) -> None:
        # A cache that this machine's memory really holds: 90 MB on a machine that is told it has 20.
        rig.free = 20_000_000
        options = {"ctx_size": 16384}
        if by == "request":
            with pytest.raises(CannotFit):
                await rig.manager.load(MODEL, "llamacpp", options)
        resident = await rig.manager.load(MODEL, "llamacpp", options, anyway=by == "request")
        assert resident.state == "ready"

    run(overlays, work, load_anyway=by == "flag")


def test_what_unloading_others_gives_back_is_no_refusal(overlays: Overlays) -> None:
    async def work(rig: Rig) -> None:
        first = await rig.manager.load("echo", options={"megabytes": 200})
        assert first.memory_bytes is not None and first.memory_bytes > 200 << 20
        # Less free than the load needs, and enough once the first is gone.
        busy = [30_000_000]

        def free() -> int:
            return GB if not rig.manager.residents() or rig.manager.residents()[0].model.id != "echo" else busy[0]

        rig.manager.room.available = free
        resident = await rig.manager.load(MODEL, "llamacpp", {"ctx_size": 512})
        assert resident.state == "ready" and [r.model.id for r in rig.manager.residents()] == [MODEL]

    run(overlays, work)

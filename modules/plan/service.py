"""The plan as the routes, the page and --json give it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from modules.detect.weights import headers_kept
from modules.errors import CorruptModel
from modules.plan.machine import this_machine
from modules.plan.planner import nearest, plan
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.plan.types import Fit, Machine
    from modules.services import Services


def body(model: str, machine: Machine, fits: list[Fit]) -> dict[str, Any]:
    """{"model", "machine", "fits": [best first], "nearest": the best that fits, or null}: JSON-safe."""
    best = nearest(fits)
    return {
        "model": model,
        "machine": to_wire(machine),
        "fits": [to_wire(fit) for fit in fits],
        "nearest": None if best is None else to_wire(best),
    }


async def answer_plan(services: Services, name: str) -> dict[str, Any]:
    """The plan for one local model, as if the models in memory made room for it. Raises ModelNotFound, LoadError's subclasses."""
    freed = sum(resident.memory_bytes or 0 for resident in services.manager.residents())

    def work() -> dict[str, Any]:
        with headers_kept():
            model = services.library.find(name)
            if model.problem:
                raise CorruptModel(f"{model.id} can't be loaded: {model.problem}")
            machine = this_machine(services.config.model_dir, services.config.user_data_dir, freed_bytes=freed)
            return body(model.id, machine, plan(model, machine, services.specs.values(), services.overlays))

    return await asyncio.to_thread(work)

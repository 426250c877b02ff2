"""Before a load: what it will need, and the refusal of one that this machine can't hold, with the nearest setting that it can.

The one estimate of a load's memory: the model manager makes room by it, too. Estimates err, so a load is refused only where it
falls short by more than that, and never where unloading other models would do; the operator can load it anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, CannotFit, LoadError
from modules.plan.planner import complete, contexts, describe, estimate, estimator, nearest, plan, shortage, size, with_context
from modules.plan.shape import read_shape
from modules.plan.types import Fit, Machine, Memory, Setting, Shape
from modules.schema import to_wire

if TYPE_CHECKING:
    from modules.registry import Environment
    from modules.schema import LoaderSpec, ModelFiles

ERROR = 0.15  # estimates are within this of what was measured (benchmarks/plan_error.py)


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """A load of `model` with complete `options`, and the memory it needs. `known` is false for a figure by the file's size alone,
    which refuses nothing."""

    model: ModelFiles
    spec: LoaderSpec
    options: Mapping[str, Any]
    memory: Memory
    shape: Shape | None = None
    known: bool = False

    def fits(self, available_bytes: int) -> bool:
        """Whether there is room, so that nothing has to be unloaded first."""
        return self.memory.at_load <= available_bytes

    def hopeless(self, machine: Machine) -> bool:
        """Whether it falls short by more than the estimate's error."""
        if not self.known:
            return False
        vram = sum(gpu.total_bytes for gpu in machine.gpus)
        return self.memory.at_load * (1 - ERROR) > machine.ram_available_bytes or self.memory.vram * (1 - ERROR) > vram


def need_of(model: ModelFiles, spec: LoaderSpec, options: Mapping[str, Any], machine: Machine) -> Need:
    """What loading `model` with complete `options` needs. A model whose headers can't be read is judged by its size: its load
    says what is wrong with it."""
    shape = Shape(model.format, model.architecture, model.size_bytes, model.parameters or 0, path=model.path)
    if estimator(spec) is None:
        return Need(model, spec, options, estimate(shape, spec, options, machine))
    try:
        shape = read_shape(model)
        return Need(model, spec, options, estimate(shape, spec, options, machine), shape, known=not shape.gap)
    except (AppError, OSError):
        return Need(model, spec, options, Memory(weights=model.size_bytes))


def refusal(need: Need, machine: Machine, specs: Iterable[LoaderSpec], environment: Environment) -> CannotFit:
    """The error for a load that can't fit: what it needs, what there is, and what would fit."""
    near = nearest_to(need, machine, specs, environment)
    return CannotFit(
        f"{need.model.id} does not fit with {need.spec.title} and these settings: it {_lacking(need.memory, machine)}.",
        hint=f"{in_words(near, need.spec)} To try it all the same, load it anyway.",
        detail={"nearest": to_wire(near) if near else None, "needed_bytes": need.memory.at_load},
    )


def _lacking(memory: Memory, machine: Machine) -> str:
    vram = sum(gpu.total_bytes for gpu in machine.gpus)
    if memory.vram > vram:
        return f"needs about {size(memory.vram)} of GPU memory, and there are {size(vram)}"
    return f"needs about {size(memory.at_load)} of memory, and {size(machine.ram_available_bytes)} are free"


def in_words(fit: Fit | None, spec: LoaderSpec) -> str:
    """The nearest fit as advice."""
    if fit is None:
        return "No setting of any backend fits: use a smaller model or quantisation, or a machine with more memory."
    made = {"convert": f" after converting it to {fit.quantization}", "quantize": f" after quantising it ({fit.quantization})"}
    how = made.get(fit.how, "")
    choices = ", ".join(f"{name} {value}" for name, value in fit.options.items())
    backend = f"{fit.title} with " if fit.loader != spec.name else ""
    memory = f" ({size(fit.ram_bytes)})" if fit.ram_bytes else ""
    return f"The nearest that fits is {backend}{choices or fit.title}{how}{memory}."


def nearest_to(need: Need, machine: Machine, specs: Iterable[LoaderSpec], environment: Environment) -> Fit | None:
    """The setting nearest to the one asked for: the same with a shorter context, else this loader's others, else another way."""
    if need.shape is None:
        return None
    spec = need.spec
    asked = {name: value for name, value in need.options.items() if (o := spec.option(name)) is None or value != o.default}
    for context in contexts(need.shape):
        tried = with_context(spec, asked, context)
        memory = estimate(need.shape, spec, complete(spec, tried), machine)
        if shortage(memory, machine) is None:
            setting = Setting(tried)
            return describe(need.shape, spec, setting, context, tried, memory, machine, installed=True, how="load")
    try:
        return nearest(plan(need.model, machine, specs, environment, shape=need.shape), spec.name)
    except LoadError:
        return None

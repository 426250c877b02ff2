"""Shape × Machine × loaders -> the ways to run a model here, the best first.

Each loader says what it needs (`estimate`) and which options are worth trying (`settings`); here they are tried, with the largest
context that fits, and put in order: what fits, what can start at once, what costs no quality, then context and speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from modules.plan.types import MIB, Fit, How, Machine, Memory, Setting, Shape, Verdict
from modules.registry import Choice, rank

if TYPE_CHECKING:
    from modules.registry import Environment
    from modules.schema import LoaderSpec, ModelFiles

ENOUGH_CONTEXT = 8192  # more is welcome, but not at the cost of speed or quality
LEAST_CONTEXT = 512
MOST_CONTEXT = 1 << 20
UNKNOWN_CONTEXT = 4096
TIGHT = 0.85  # of what is free: beyond it an estimate that errs by its 15 % would not fit
UNKNOWN_BASE = 300 * MIB
UNKNOWN_FACTOR = 1.15


class Estimator(Protocol):
    """The part of a loader's module that the planner uses. Both are pure: no file is read, no backend imported."""

    def estimate(self, shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
        """What a load with complete `options` needs; `ctx_size` 0 is the loader's own default. Raises InvalidParameter."""
        ...

    def settings(self, shape: Shape, machine: Machine) -> list[Setting]:
        """The options worth trying, without the context, best quality first."""
        ...


def estimator(spec: LoaderSpec) -> Estimator | None:
    """The loader's own estimate, None for one that has none."""
    try:
        module = importlib.import_module(spec.engine.partition(":")[0])
    except ModuleNotFoundError:
        return None
    return cast(Estimator, module) if hasattr(module, "estimate") else None


def estimate(shape: Shape, spec: LoaderSpec, options: Mapping[str, Any], machine: Machine) -> Memory:
    """What this loader needs for this model; a rough figure by the files' size where it has no estimate of its own."""
    own = estimator(spec)
    if own is None:
        return Memory(weights=int(shape.file_bytes * UNKNOWN_FACTOR), base=UNKNOWN_BASE)
    return own.estimate(shape, options, machine)


def plan(
    model: ModelFiles,
    machine: Machine,
    specs: Iterable[LoaderSpec],
    environment: Environment,
    *,
    shape: Shape | None = None,
) -> list[Fit]:
    """Every way to run `model` here that its loaders know, and what converting or quantising it would give, the best first.

    Raises LoadError's subclasses for headers that are wrong, OSError.
    """
    if shape is None:
        from modules.plan.shape import read_shape

        shape = read_shape(model)
    from modules.plan.routes import derived  # brings the converter's tables, which no command line needs

    specs = list(specs)
    fits = ways_of(model, shape, machine, specs, environment, "load")
    for files, made, route in derived(model, shape):
        for choice in _choices(files, specs, environment):
            # One way per file that would have to be made first: its variants are for when it is there.
            fits += sorted(_ways(made, choice, machine, route), key=_order)[:1]
    return order(fits)


def ways_of(
    model: ModelFiles, shape: Shape, machine: Machine, specs: Iterable[LoaderSpec], environment: Environment, how: How
) -> list[tuple[Fit, int]]:
    """The model's own ways, in no order, each with what its setting costs in quality."""
    found = []
    for choice in _choices(model, specs, environment):
        found += _ways(shape, choice, machine, how)
    return found


def order(ways: Iterable[tuple[Fit, int]]) -> list[Fit]:
    """The best first."""
    return [fit for fit, _ in sorted(ways, key=_order)]


def _choices(model: ModelFiles, specs: Iterable[LoaderSpec], environment: Environment) -> list[Choice]:
    return [choice for choice in rank(model, specs, environment) if choice.ok or not choice.installed]


def _ways(shape: Shape, choice: Choice, machine: Machine, how: How) -> list[tuple[Fit, int]]:
    own = estimator(choice.spec)
    if own is None or not hasattr(own, "settings"):
        return []
    found = []
    for setting in own.settings(shape, machine):
        fit = _largest(shape, choice, setting, machine, own, how)
        found.append((fit, setting.loss))
    return found


def contexts(shape: Shape) -> list[int]:
    """Context lengths worth trying, the longest first: the model's own, then powers of two below it."""
    most = min(shape.context or UNKNOWN_CONTEXT, MOST_CONTEXT)
    sizes = [most]
    power = 1 << (most - 1).bit_length() - 1 if most > 1 else 1
    while power >= LEAST_CONTEXT:
        if power < most:
            sizes.append(power)
        power //= 2
    return sizes


def complete(spec: LoaderSpec, options: Mapping[str, Any]) -> dict[str, Any]:
    """All of a loader's options with its defaults."""
    return {option.name: option.default for option in spec.options} | dict(options)


def with_context(spec: LoaderSpec, options: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The options with this context, under the loader's own name for it."""
    option = spec.option("ctx_size")
    return {**options, option.name: context} if option is not None else dict(options)


def _largest(shape: Shape, choice: Choice, setting: Setting, machine: Machine, own: Estimator, how: How) -> Fit:
    """The fit with the largest context that fits; with the smallest where none does."""
    spec = choice.spec
    tried: tuple[int, dict[str, Any], Memory] | None = None
    for context in contexts(shape):
        options = with_context(spec, setting.options, context)
        memory = own.estimate(shape, complete(spec, options), machine)
        tried = context, options, memory
        if shortage(memory, machine) is None:
            break
    assert tried is not None
    context, options, memory = tried
    return describe(shape, spec, setting, context, options, memory, machine, installed=choice.ok, how=how)


def describe(
    shape: Shape,
    spec: LoaderSpec,
    setting: Setting,
    context: int,
    options: dict[str, Any],
    memory: Memory,
    machine: Machine,
    *,
    installed: bool,
    how: How,
) -> Fit:
    lacking = shortage(memory, machine)
    cache = next((str(options[name]) for name in ("cache_type_k", "kv_cache") if name in options), None)
    speed = tokens_per_second(memory, machine) if lacking is None else None
    quantization = setting.quantization or (shape.quantization.method if shape.quantization else None)
    return Fit(
        loader=spec.name,
        title=spec.title,
        quantization=quantization,
        context_length=context,
        cache_type=cache,
        options=options,
        ram_bytes=None if shape.gap else memory.ram,
        vram_bytes=memory.vram,
        disk_bytes=memory.disk,
        tokens_per_second=speed,
        fits=lacking is None,
        installed=installed,
        how="install" if how == "load" and not installed else how,
        reason=_reason(shape, setting, memory, machine, lacking, speed, installed=installed, how=how),
    )


def shortage(memory: Memory, machine: Machine) -> str | None:
    """What is missing, in a few words; None when it fits."""
    if memory.vram > machine.vram_free_bytes:
        return f"needs {size(memory.vram)} of GPU memory, {size(machine.vram_free_bytes)} are free"
    if memory.ram > machine.ram_available_bytes:
        return f"needs {size(memory.ram)} of memory, {size(machine.ram_available_bytes)} are free"
    if memory.disk > machine.disk_free_bytes:
        return f"needs {size(memory.disk)} on disk, {size(machine.disk_free_bytes)} are free"
    return None


def tokens_per_second(memory: Memory, machine: Machine) -> float | None:
    """Of one chat: what a token reads over what the memory gives."""
    if not machine.bandwidth or memory.efficiency is None or not memory.read or memory.vram:
        return None
    return 1 / (memory.read / (machine.bandwidth * memory.efficiency) + memory.step_s)


def _reason(
    shape: Shape,
    setting: Setting,
    memory: Memory,
    machine: Machine,
    lacking: str | None,
    speed: float | None,
    *,
    installed: bool,
    how: How,
) -> str:
    parts = [setting.what] if setting.what else []
    if lacking is not None:
        parts.append(lacking)
    else:
        share = memory.ram / max(machine.ram_available_bytes, 1)
        parts.append(f"about {size(memory.ram)} of {size(machine.ram_available_bytes)} free{', tight' if share > TIGHT else ''}")
        if speed:
            parts.append(f"about {speed:.0f} tokens a second" if speed >= 2 else f"about {speed:.1f} tokens a second")
    if shape.gap:
        parts.append(f"at least: {shape.gap}")
    if not installed:
        parts.append("not installed yet")
    if how == "convert":
        parts.append("after `convert`")
    if how == "quantize":
        parts.append("after `quantize`")
    return f"{'; '.join(parts)}."


def _order(entry: tuple[Fit, int]) -> tuple[Any, ...]:
    """The best first. A loss of quality that is hardly seen weighs less than a context that is too short."""
    fit, loss = entry
    ready = {"load": 0, "download": 0, "install": 1, "convert": 1, "quantize": 2}[fit.how]
    enough = min(fit.context_length, ENOUGH_CONTEXT)
    speed = fit.tokens_per_second or 0.0
    usable = speed >= 1 or fit.tokens_per_second is None
    if not fit.fits:  # the least that is lacking first
        return (True, fit.vram_bytes, fit.ram_bytes or 0, fit.loader)
    return (False, not usable, ready, loss > 2, -enough, loss, -round(speed, 1), fit.loader)


def nearest(fits: Iterable[Fit], loader: str | None = None) -> Fit | None:
    """Of what fits, the nearest to what was asked for: the same loader before others, then the ranking's order."""
    fitting = [fit for fit in fits if fit.fits]
    return next((fit for fit in fitting if fit.loader == loader and fit.how == "load"), None) or next(iter(fitting), None)


def verdict(size_bytes: int, machine: Machine, shape: Shape | None = None) -> Verdict:
    """Whether weights of `size_bytes` would run here, from their size alone (or with the shape, where the header is known).

    Half of the model's context at 16 bits is added where the shape is known, a tenth of the size where not.
    """
    cache = 2 * shape.cache_elements(min(shape.context or UNKNOWN_CONTEXT, ENOUGH_CONTEXT)) if shape else size_bytes // 10
    needed = max(size_bytes, 0) + cache + UNKNOWN_BASE
    room = machine.ram_available_bytes + machine.vram_free_bytes
    whole = machine.ram_bytes + sum(gpu.total_bytes for gpu in machine.gpus)
    if size_bytes > machine.disk_free_bytes > 0:
        return Verdict("no", f"{size(size_bytes)}; the disk has {size(machine.disk_free_bytes)} free.")
    if needed <= TIGHT * room:
        return Verdict("fits", f"needs about {size(needed)}; {size(room)} are free.")
    if needed <= room:
        return Verdict("tight", f"needs about {size(needed)} of {size(room)} that are free.")
    if needed <= TIGHT * whole:
        return Verdict("tight", f"needs about {size(needed)}: other programs must give memory back, {size(room)} are free.")
    return Verdict("no", f"needs about {size(needed)}; this machine has {size(whole)}.")


def size(count: int) -> str:
    """Bytes as people read them: 850 MB, 2.3 GB."""
    if count < 0.95e9:
        return f"{max(count, 0) / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e15 else f"{count / 1e15:,.0f} PB"

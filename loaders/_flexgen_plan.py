"""FlexGen's settings from the loader's options: checked, and in one form. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from modules.detect.opt import OptShape

_PLACES = "GPU, CPU and disk"


@dataclass(frozen=True, slots=True)
class Plan:
    """`weights`, `cache` and `activations` are percentages on GPU, CPU and disk. `dtype` is what is kept on CPU and disk."""

    weights: tuple[float, float, float]
    cache: tuple[float, float, float]
    activations: tuple[float, float, float]
    gpu_batch_size: int
    num_gpu_batches: int
    compress_weight: bool
    compress_cache: bool
    pin_weight: bool
    overlap: bool
    sep_layer: bool
    cpu_cache_compute: bool
    dtype: str
    cuda: bool

    @property
    def slots(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches


def plan_of(options: dict[str, Any], cuda: bool) -> Plan:
    """The plan the options ask for. Raises InvalidParameter, naming the option."""
    six = str(options["percent"]).strip()
    if six:
        weights, cache, activations = _six(six)
    else:
        weights = _percentages(options["w_percent"], "w_percent")
        cache = _percentages(options["cache_percent"], "cache_percent")
        activations = _percentages(options["act_percent"], "act_percent")
    if 100 not in activations:
        raise InvalidParameter(
            "FlexGen keeps all activations in one place.",
            hint="Set act_percent to 100,0,0 (GPU), 0,100,0 (CPU) or 0,0,100 (disk).",
            param="act_percent",
        )
    if options["compress_cache"] and 100 not in cache:
        raise InvalidParameter(
            "A compressed cache can't be spread over devices.",
            hint="Set cache_percent to 100,0,0, 0,100,0 or 0,0,100, or leave compress_cache off.",
            param="cache_percent",
        )
    dtype = options["dtype"]
    if dtype == "float32" and (cuda or options["compress_weight"] or options["compress_cache"]):
        why = "FlexGen computes in float16 on a GPU" if cuda else "compression takes float16"
        raise InvalidParameter(f"dtype float32 is not possible here: {why}.", hint="Set dtype to auto.", param="dtype")
    return Plan(
        weights,
        cache,
        activations,
        options["gpu_batch_size"],
        options["num_gpu_batches"],
        options["compress_weight"],
        options["compress_cache"],
        options["pin_weight"],
        options["overlap"],
        options["sep_layer"],
        options["cpu_cache_compute"],
        "float16" if dtype == "auto" else dtype,
        cuda,
    )


def _numbers(text: Any, count: int, param: str) -> list[float]:
    parts = [part for part in re.split(r"[\s,;/]+", str(text).strip()) if part]
    try:
        values = [float(part.removesuffix("%")) for part in parts]
    except ValueError:
        values = []
    if len(values) != count or not all(0 <= value <= 100 for value in values):
        raise InvalidParameter(
            f"{param} must be {count} percentages from 0 to 100; it is {str(text)[:60]!r}.",
            hint=f"For example {'100,0,0' if count == 3 else '0 100 100 0 100 0'}.",
            param=param,
        )
    return values


def _percentages(text: Any, param: str) -> tuple[float, float, float]:
    gpu, cpu, disk = _numbers(text, 3, param)
    total = gpu + cpu + disk
    if abs(total - 100) > 1e-6:
        raise InvalidParameter(f"{param}: the percentages on {_PLACES} must add up to 100; {text} makes {total:g}.", param=param)
    return gpu, cpu, disk


def _six(text: str) -> tuple[tuple[float, float, float], ...]:
    """FlexGen's own form: GPU and CPU percent of weights, cache and activations; the rest of each is on disk."""
    values = _numbers(text, 6, "percent")
    found = []
    for name, gpu, cpu in zip(("weights", "cache", "activations"), values[::2], values[1::2], strict=True):
        if gpu + cpu > 100:
            problem = f"percent: {gpu:g} and {cpu:g} percent of the {name} are more than 100 together."
            raise InvalidParameter(problem, param="percent")
        found.append((gpu, cpu, 100 - gpu - cpu))
    return tuple(found)


# --- what a plan promises --------------------------------------------------------------------------------------------


def elements(sides: Sequence[int]) -> int:
    """How many numbers a tensor of these sides holds."""
    return math.prod(sides)


def cache_elements(shape: OptShape, plan: Plan) -> int:
    """Elements of one layer's keys for one GPU batch at full length: the largest thing the cache copies at once."""
    return shape.positions * plan.gpu_batch_size * shape.hidden


def weight_bytes(shape: OptShape, plan: Plan) -> dict[str, int]:
    """Bytes of weights on gpu, cpu and disk: what the percentages come to, since FlexGen places whole tensors, layer by layer.

    The embedding counts twice, once for each end of the model. Without CUDA the GPU's share is float32 in main memory."""
    kept = 4.0 if plan.dtype == "float32" else 0.5625 if plan.compress_weight else 2.0  # 4 bits; a scale and a minimum to 64
    ready = kept if plan.cuda or plan.compress_weight else 4.0
    counts = {"gpu": 0, "cpu": 0, "disk": 0}
    for sizes in _layers(shape):
        before = 0
        for size in sizes:
            counts[_home(plan.weights, 100 * (before + size / 2) / sum(sizes))] += size
            before += size
    return {home: int(count * (ready if home == "gpu" else kept)) for home, count in counts.items()}


def _layers(shape: OptShape) -> Iterator[list[int]]:
    """The tensors' sizes of each of FlexGen's layers, in its order: it cuts a decoder block in two."""
    tensors = {name: elements(sides) for name, sides in shape.tensors().items()}
    embedding, positions = (tensors.pop(f"decoder.embed_{name}.weight") for name in ("tokens", "positions"))
    yield [embedding, positions]
    for number in range(shape.layers):
        block = {name: size for name, size in tensors.items() if name.startswith(f"decoder.layers.{number}.")}
        yield [size for name, size in block.items() if ".self_attn" in name]
        yield [size for name, size in block.items() if ".self_attn" not in name]
    yield [tensors["decoder.layer_norm.weight"], tensors["decoder.layer_norm.bias"], embedding]


def _home(percents: tuple[float, float, float], middle: float) -> str:
    """Where FlexGen puts the tensor whose middle lies at `middle` percent of its layer: the disk's share comes first."""
    _, cpu, disk = percents
    return "disk" if middle < disk else "cpu" if middle < disk + cpu else "gpu"


def main_memory_bytes(shape: OptShape, plan: Plan, rows: int, prompt: int, tokens: int) -> int:
    """Main memory that a block of `rows` sequences of `prompt` + `tokens` needs under this plan, without CUDA.

    The weights' share, the two parts of the model that are expanded at a time, the cache's share and what of it is expanded,
    and the activations."""
    homes = weight_bytes(shape, plan)
    h, f = shape.hidden, shape.ffn
    embedding, attention, mlp = (shape.vocab + shape.positions) * h, 4 * h * h, 2 * h * f
    pairs = (embedding + attention, attention + mlp, mlp + shape.vocab * h)
    expanded = 0 if plan.weights[0] == 100 and not plan.compress_weight else 4 * max(pairs)
    layer = 2 * rows * (prompt + tokens) * h
    gpu, cpu = plan.cache[0] / 100, plan.cache[1] / 100
    kept = 4 if plan.dtype == "float32" else 2
    cache = int(shape.layers * layer * (4 * gpu + kept * cpu)) + (0 if plan.cache[0] == 100 else 4 * 2 * layer)
    size = min(rows, plan.gpu_batch_size)
    activations = 4 * rows * prompt * h + 4 * size * prompt * (f + 6 * h) + 4 * 2 * size * shape.vocab
    return homes["gpu"] + homes["cpu"] + expanded + cache + activations

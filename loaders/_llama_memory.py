"""What llama.cpp needs for a GGUF: weights mapped from the file or repacked for this processor, the KV cache, its buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.detect.ggml_types import TENSOR_TYPES
from modules.plan.types import MIB, Machine, Memory, Setting, Shape

MOST_CONTEXT_BY_DEFAULT = 8192
BASE = 50 * MIB
_CELLS = 256  # the cache is made in steps of so many tokens
_PER_TOKEN_OF_VOCABULARY = 330  # the texts of the tokens, in llama.cpp and in Python
# Types whose matrices are copied into another order for the processor's wide instructions; the file's own pages then idle.
_REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})
_REPACKED_AMX = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})
_BLOCKS = {name.lower(): size / count for name, count, size in TENSOR_TYPES.values()}
EFFICIENCY, _LAYER_S = 0.6, 0.0001


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator. Measured on a CPU; with layers on a GPU it is arithmetic only."""
    context = int(options["ctx_size"] or min(shape.context or MOST_CONTEXT_BY_DEFAULT, MOST_CONTEXT_BY_DEFAULT))
    cells = -(-context // _CELLS) * _CELLS
    keys, values = _BLOCKS[options["cache_type_k"]], _BLOCKS[options["cache_type_v"]]
    steps = min(int(options["ubatch_size"]), int(options["batch_size"]))
    window = min(cells, -(-(shape.window + steps) // _CELLS) * _CELLS) if shape.window and not options["swa_full"] else cells
    cache = int(cells * (shape.keys * keys + shape.values * values) + window * shape.windowed * (keys + values) / 2) + shape.state
    weights = sum(shape.stored.values()) or shape.file_bytes
    gpu = _gpu_share(shape, options, machine)
    moved = _repacked(shape, machine) if not gpu else 0
    own = weights if options["no_mmap"] else moved
    compute = _buffers(shape, steps, context, flash=options["flash_attn"] != "off")
    sight = 0 if options["no_mmproj"] else shape.sight  # read into memory of its own
    if sight:
        compute = max(compute, shape.sight_buffers)
    looked_up = 0 if shape.tied else shape.embedding_bytes  # a row for each token
    read = int((weights - looked_up) * shape.active) + cache // 2
    on_gpu = int(weights * gpu) + (0 if options["no_kv_offload"] else int(cache * gpu)) + (2 * compute + sight if gpu else 0)
    return Memory(
        weights=own + shape.vocab * _PER_TOKEN_OF_VOCABULARY + (0 if gpu else sight),
        mapped=0 if options["no_mmap"] else int((weights - moved - looked_up) * (1 - gpu)),
        cache=int(cache * (1 - gpu)) if not options["no_kv_offload"] else cache,
        compute=compute,
        base=BASE,
        grows=False,
        vram=on_gpu,
        read=read,
        efficiency=EFFICIENCY,
        step_s=_LAYER_S * shape.layers,
    )


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    """The cache at 16, 8 and 4 bits; with a GPU that can't hold everything, as many layers there as fit, and none."""
    caches = [
        Setting({}, "16-bit cache"),
        Setting({"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attn": "on"}, "8-bit cache", loss=1),
        Setting({"cache_type_k": "q4_0", "cache_type_v": "q4_0", "flash_attn": "on"}, "4-bit cache", loss=3),
    ]
    if shape.sight:
        caches.append(Setting({"no_mmproj": True}, "without images", loss=3))
    if not machine.gpus:
        return caches
    weights = sum(shape.stored.values()) or shape.file_bytes
    layers = max(shape.layers, 1) + 1
    room = machine.vram_free_bytes - 512 * MIB
    some = max(min(layers - 1, int(layers * room / max(weights * 1.1, 1))), 0)
    partly = [Setting({"gpu_layers": some}, f"{some} of {layers} layers on the GPU")] if some else []
    return [*caches[:2], *partly, Setting({"gpu_layers": 0}, "on the CPU")]


def _gpu_share(shape: Shape, options: Mapping[str, Any], machine: Machine) -> float:
    layers = max(shape.layers, 1) + 1
    wanted = int(options["gpu_layers"])
    if not machine.gpus or wanted == 0:
        return 0.0
    return 1.0 if wanted < 0 else min(wanted, layers) / layers


def _repacked(shape: Shape, machine: Machine) -> int:
    """Bytes of matrices that are copied; the input embedding is looked up where it lies."""
    if "amx_int8" in machine.instructions:
        types = _REPACKED_AMX
    else:
        types = _REPACKED if {"avx2", "asimd"} & set(machine.instructions) else frozenset()
    sizes = sum(size for name, size in shape.stored.items() if name in types)
    main = max(shape.stored, key=lambda name: shape.stored[name], default="")
    return max(sizes - (shape.embedding_bytes if main in types else 0), 0)


def _buffers(shape: Shape, tokens: int, context: int, *, flash: bool) -> int:
    """What a step touches of the compute buffer: its widest tensors in float32. Room for every token's logits stays empty."""
    wide = tokens * (2 * (shape.ffn or 4 * shape.hidden) + 4 * shape.hidden)
    scores = 0 if flash else tokens * context * shape.heads
    return 4 * (max(wide, scores) + shape.vocab) + 2 * tokens * context

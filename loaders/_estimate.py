"""What the loaders' estimates share. Standard library only.

The constants are measured: `benchmarks/plan_error.py` loads each model in its worker and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.plan.types import MIB, Shape

DEFAULT_CONTEXT = 4096
# Resident memory of a worker that has imported its libraries and opened no model.
TRANSFORMERS_BASE = 367 * MIB
FLOAT32_SHARE = 0.6  # of the free memory: where the weights take less as float32, Transformers on a CPU computes in it
# GPTQ matrices as float32: below it the exact way is fast enough, and greedy text is then the reference's own.
SMALL_BYTES = 256 * MIB


def context_of(shape: Shape, options: Mapping[str, Any]) -> int:
    """The context that `ctx_size` asks for: 0 is the model's own."""
    return int(options.get("ctx_size") or shape.context or DEFAULT_CONTEXT)


def prefill_bytes(shape: Shape, tokens: int, context: int) -> int:
    """Activations of one prefill step of `tokens` in float32: the widest moment is the feed-forward's, or the attention's mask
    and its copies of the keys and values of one layer for all heads; then one row of logits."""
    hidden, ffn = shape.hidden, shape.ffn or 4 * shape.hidden
    feed_forward = tokens * (3 * ffn + 3 * hidden)
    attention = tokens * (6 * hidden + context) + 2 * context * shape.heads * shape.head_dim
    return 4 * (max(feed_forward, attention) + 2 * shape.vocab)


def layer_cache(shape: Shape, context: int, width: int) -> int:
    """Bytes of one layer's cache, which is copied when it grows."""
    return shape.cache_elements(context) * width // max(shape.layers, 1)

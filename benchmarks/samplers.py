"""What the shared sampler costs per token: one core, one row of logits of a 32,000 vocabulary, presets people use.

Run in any environment with numpy. Aim: at most 0.5 ms for a typical preset, 5 ms with every sampler on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import report

from modules.samplers import SamplerChain

PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "typical preset (temperature, top_p, top_k, repetition penalty)": {
        "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.15, "repetition_penalty_range": 1024,
    },
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "dry and xtc": {"temperature": 1.0, "min_p": 0.02, "dry_multiplier": 0.8, "xtc_probability": 0.5},
    "all samplers": {
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "dry_multiplier": 0.8,
        "top_n_sigma": 3.0, "temperature": 0.9, "smoothing_factor": 0.2, "top_k": 5000, "top_p": 0.99, "typical_p": 0.99,
        "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "tfs": 0.99, "top_a": 0.01, "min_p": 0.001, "xtc_probability": 0.5,
        "encoder_repetition_penalty": 1.05, "no_repeat_ngram_size": 4, "logit_bias": {"5": 1.0},
    },
}  # fmt: skip


def cost_ms(params: dict[str, Any], vocabulary: int, tokens: int) -> dict[str, float]:
    """Milliseconds of CPU time a token: median and 95th percentile, after 2,000 tokens of text."""
    rng = np.random.default_rng(1)
    rows = [(rng.standard_normal(vocabulary) * 3).astype(np.float32) for _ in range(16)]
    chain = SamplerChain(params | {"seed": 1}, rng.integers(0, vocabulary, 2000).tolist(), vocabulary)
    times = []
    for index in range(tokens + 20):
        begun = time.thread_time()
        chain.sample(rows[index % 16])
        times.append(1000 * (time.thread_time() - begun))
    times = sorted(times[20:])
    return {"median_ms": round(statistics.median(times), 4), "p95_ms": round(times[int(0.95 * len(times))], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    with report("samplers") as figures:
        figures["vocabulary"] = arguments.vocabulary
        for name, params in PRESETS.items():
            figures[name] = cost_ms(params, arguments.vocabulary, arguments.tokens)


if __name__ == "__main__":
    main()

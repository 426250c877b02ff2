"""Our samplers against llama.cpp's own, in its environment: the same candidates kept, the same logits left."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from modules.registry import load_spec
from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

SCRIPT = """
import ctypes, json, sys
import numpy as np
from loaders._llama_capi import LogitBias, TokenDataArray, open_library
from modules import sampler_math as sm

lib = open_library(sys.argv[1])
V = 300
rng = np.random.default_rng(1)
logits = rng.normal(0, 2.5, V).astype(np.float32)
ids = np.arange(V)
RECORD = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]

def native(sampler, history=()):
    records = np.zeros(V, dtype=RECORD)
    records["id"], records["logit"] = ids, logits
    array = TokenDataArray(records.ctypes.data, V, -1, False)
    for token in history:
        lib.llama_sampler_accept(sampler, token)
    lib.llama_sampler_apply(sampler, ctypes.byref(array))
    lib.llama_sampler_free(sampler)
    start = (array.data - records.ctypes.data) // records.itemsize  # XTC moves the pointer past what it drops
    return {int(r["id"]): float(r["logit"]) for r in records[start : start + array.size] if np.isfinite(r["logit"])}

def same_set(sampler, kept):
    return sorted(native(sampler)) == sorted(kept.tolist())

def same_logits(sampler, ours, history=()):
    theirs = np.array([native_result[i] for i in ids]) if (native_result := native(sampler, history)) else None
    return float(np.abs((theirs - theirs.max()) - (ours - ours.max())).max()) < 1e-4

def penalised(repeat, presence, frequency, history):
    seen, counts = np.unique(history, return_counts=True)
    return sm.additive_penalty(sm.repetition_penalty(logits, seen, repeat), seen, counts, presence, frequency)

history = [3, 5, 3, 9]
bias = (LogitBias * 2)(LogitBias(4, 2.0), LogitBias(7, -3.0))
biased = logits.copy(); biased[4] += 2; biased[7] -= 3
results = {
    "top_k": same_set(lib.llama_sampler_init_top_k(7), sm.top_k(logits, 7)),
    "top_p": same_set(lib.llama_sampler_init_top_p(0.8, 1), sm.top_p(logits, 0.8)),
    "min_p": same_set(lib.llama_sampler_init_min_p(0.1, 1), sm.min_p(logits, 0.1)),
    "typical_p": same_set(lib.llama_sampler_init_typical(0.6, 1), sm.typical_p(logits, 0.6)),
    "top_n_sigma": same_set(lib.llama_sampler_init_top_n_sigma(1.3), sm.top_n_sigma(logits, 1.3)),
    "xtc": same_set(lib.llama_sampler_init_xtc(1.0, 0.03, 1, 1), sm.xtc(logits, 0.03, ())),
    "temperature": same_logits(lib.llama_sampler_init_temp(0.7), logits / 0.7),
    "dynamic_temperature": same_logits(
        lib.llama_sampler_init_temp_ext(1.25, 0.75, 1.3), sm.dynamic_temperature(logits, 0.5, 2.0, 1.3)
    ),
    "adaptive_p": same_logits(
        lib.llama_sampler_init_adaptive_p(0.2, 0.9, 7), sm.adaptive_p(logits, sm.adaptive_target(0.2, 0.2 / 0.1, 1 / 0.1))
    ),
    "repetition": same_logits(
        lib.llama_sampler_init_penalties(V, 64, 1.3, 0.0, 0.0), penalised(1.3, 0, 0, history), history
    ),
    "presence_frequency": same_logits(
        lib.llama_sampler_init_penalties(V, 64, 1.0, 0.2, 0.4), penalised(1.0, 0.4, 0.2, history), history
    ),
    "penalty_window": same_logits(
        lib.llama_sampler_init_penalties(V, 2, 1.3, 0.0, 0.0), penalised(1.3, 0, 0, history[-2:]), history
    ),
    "logit_bias": same_logits(lib.llama_sampler_init_logit_bias(V, 2, bias), biased),
}
# The test of the test: a wrong value is noticed.
results["notices a difference"] = not same_set(lib.llama_sampler_init_top_p(0.8, 1), sm.top_p(logits, 0.7))
print(json.dumps(results))
"""


@pytest.mark.parametrize("engine", ["llama_cpp", "xllamacpp"])
def test_our_samplers_equal_llama_cpps(engine: str, overlays: Overlays) -> None:
    spec = load_spec("llamacpp")
    missing = overlays.unavailable(spec)
    if missing:
        pytest.skip(missing)
    if not overlays.has_module(spec.overlay, engine):
        pytest.skip(f"{engine} is not in the {spec.overlay} environment")
    run = subprocess.run(
        [str(overlays.python(spec.overlay)), "-c", SCRIPT, engine],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert [name for name, same in results.items() if not same] == []
    assert len(results) == 14

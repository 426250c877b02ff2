"""The loaders on a real GPU, each against the same weights on the CPU. See README.md here."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modules.errors import ContextLengthExceeded
from modules.quantize.process import QuantizeJob, quantize
from modules.quantize.settings import QuantizeSettings
from modules.schema import StopParams
from tests.conftest import ROOT
from tests.gpu.conftest import WREN, Start
from tests.unit.lab import Lab, run_lab

if TYPE_CHECKING:
    import asyncio

    from modules.overlays import Overlays
    from tests.contract.conftest import Bench

STORY = "Once upon a time there was a little girl named Lily. She loved to play with her toys. One day, she saw a big box."
LONG = StopParams(max_tokens=40, ignore_eos=True)
# float16 against float32 on a model of six million parameters: nats per token, the mean over a text.
HALF = 0.02


def scores(bench: Bench, text: str = STORY) -> list[float]:
    return list(bench.run(bench.client.score(bench.run(bench.client.encode(text, add_special=True)))))


def apart(one: list[float], other: list[float]) -> float:
    """The mean difference of log-probabilities, in nats per token."""
    assert len(one) == len(other) > 10
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def on_gpu(bench: Bench) -> None:
    info = bench.client.info
    assert info is not None
    share = sum(part for device, part in info.device_map.items() if device.startswith("cuda"))
    assert share > 0.5, info.device_map


# --- Triton -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(gpu: None, overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not overlays.has_module("transformers", "transformers"):
        pytest.skip("the Transformers environment is not installed")
    with run_lab(overlays, "transformers", "gpu_lab.py", tmp_path_factory.mktemp("gpu lab")) as run:
        yield run


def test_torch_sees_the_card(lab: Lab) -> None:
    found = lab("card")
    assert found["available"], f"torch {found['torch']} is built for CUDA {found['cuda']}: reinstall with --torch cu130 or cu126"


def test_triton_kernels_are_right(lab: Lab) -> None:
    rows = lab("triton")
    assert len(rows) >= 24
    for row in rows:
        assert row["why_not"] is None and not row["fell_back"], row
        assert row["error"] < 0.02, row


def test_what_triton_does_not_run_is_exact_all_the_same(lab: Lab) -> None:
    for row in lab("triton_leaves"):
        assert row["why_not"] and row["error"] < 1e-3, row


# --- quantising ---------------------------------------------------------------------------------------------------


def test_quantising_on_the_gpu_is_as_good_as_on_the_cpu(
    gpu: None, overlays: Overlays, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    settings = QuantizeSettings(bits=3, group_size=128, nsamples=8, seqlen=256)
    losses = {}
    for device in ("cpu", "cuda"):
        job = QuantizeJob(WREN, tmp_path / device, settings, device=device)
        losses[device] = loop.run_until_complete(quantize(job, lambda _: None, overlays)).mean_loss
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


# --- loaders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"bits": 4}, {"bits": 4, "group_size": 32, "desc_act": True}, {"bits": 8}, {"bits": 2}, {"bits": 3}], ids=str
)
def test_gptq_for_llama(start: Start, checkpoint: Callable[..., Path], values: dict[str, Any]) -> None:
    path = checkpoint(**values)
    bench = start("gptq_for_llama", path)
    on_gpu(bench)
    assert ("Triton" in str(bench.client.info and bench.client.info.engine)) == (values["bits"] != 3)
    assert apart(scores(bench), scores(start("gptq_for_llama", path, cpu=True, kernel="dense"))) < HALF
    assert len(bench.generate(STORY, stop=LONG).ids) == 40


@pytest.mark.parametrize("kernel", ["auto", "package"])
def test_autogptq(start: Start, checkpoint: Callable[..., Path], kernel: str) -> None:
    path = checkpoint(bits=4)
    bench = start("autogptq", path, kernel=kernel)
    on_gpu(bench)
    assert apart(scores(bench), scores(start("gptq_for_llama", path, cpu=True, kernel="dense"))) < HALF


def test_transformers(start: Start) -> None:
    bench = start("transformers", WREN, dtype="float16")
    on_gpu(bench)
    assert apart(scores(bench), scores(start("transformers", WREN, cpu=True, dtype="float32"))) < HALF


@pytest.mark.parametrize("percent", ["100 0 100 0 100 0", "50 50 50 50 100 0", "0 100 0 100 100 0"])
def test_flexgen(start: Start, percent: str) -> None:
    model = ROOT / "models" / "wren-opt-6m"
    if not (model / "config.json").is_file():
        pytest.skip("the bundled OPT model is not here")
    bench = start("flexgen", model, percent=percent)
    assert apart(scores(bench), scores(start("flexgen", model, cpu=True, dtype="float32"))) < HALF
    assert len(bench.generate(STORY, stop=LONG).ids) == 40


# --- ExLlama ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "tolerance"), [("fp16", HALF), ("q8", 0.05), ("q6", 0.1), ("q4", 0.3)])
def test_exllama_scores_what_the_weights_say(start: Start, checkpoint: Callable[..., Path], cache: str, tolerance: float) -> None:
    path = checkpoint(bits=4)
    bench = start("exllama", path, kv_cache=cache)
    on_gpu(bench)
    assert apart(scores(bench), scores(start("gptq_for_llama", path, cpu=True, kernel="dense"))) < tolerance


def test_exllama_act_order(start: Start, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(bits=4, group_size=64, desc_act=True)
    bench = start("exllama", path)
    assert apart(scores(bench), scores(start("gptq_for_llama", path, cpu=True, kernel="dense"))) < HALF


def converse(bench: Bench) -> None:
    """Prefix cache, an answer scored in its middle, abort, overflow: what the one shared KV cache could get wrong."""
    first = bench.generate("Once upon a time", stop=LONG)
    second = "Once upon a time" + first.text + " And then"
    warm = bench.generate(second, stop=LONG)
    assert warm.end.usage.cached_tokens > 4
    bench.generate("The dog", stop=StopParams(max_tokens=2))
    assert bench.generate(second, stop=LONG).text == warm.text
    echoed = bench.generate(second, echo=True, logprobs=0, stop=LONG)
    assert echoed.text == second + warm.text
    assert (
        bench.generate(second, abort_after=3, stop=StopParams(max_tokens=500, ignore_eos=True)).end.finish_reason == "cancelled"
    )
    with pytest.raises(ContextLengthExceeded):
        bench.generate(second * 200)
    assert bench.generate(second, stop=LONG).text == warm.text


def test_exllama_converses(start: Start, checkpoint: Callable[..., Path]) -> None:
    bench = start("exllama", checkpoint(bits=4), prefill_chunk=16)
    converse(bench)
    sampled = bench.generate(STORY, sampling={"temperature": 0.8, "dry_multiplier": 0.8, "seed": 7}, stop=LONG)
    assert sampled.text == bench.generate(STORY, sampling={"temperature": 0.8, "dry_multiplier": 0.8, "seed": 7}, stop=LONG).text


def converted(overlays: Overlays, tmp_path: Path, package: str) -> Path:
    """Wren as EXL2 or EXL3, by the package's own converter."""
    out, work = tmp_path / package, tmp_path / "work"
    work.mkdir()
    few = ["-b", "6.0", "-hb", "8"]
    arguments = {
        "exllamav2": ["convert_exl2", "-o", work, "-cf", out, *few, "-r", "8", "-l", "512", "-mr", "4", "-ml", "512"],
        "exllamav3": ["convert_model", "-o", out, "-w", work, *few, "-cr", "16", "-cc", "512"],
    }[package]
    arguments = [f"{package}.conversion.{arguments[0]}", "-i", WREN, *arguments[1:]]
    done = subprocess.run(
        [str(overlays.python("exllama")), "-m", *map(str, arguments)],
        env=overlays.worker_env("exllama"), capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=1800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-1500:])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (out / name).exists():
            shutil.copyfile(WREN / name, out / name)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaForCausalLM"]
    return out


@pytest.mark.parametrize("package", ["exllamav2", "exllamav3"])
def test_exllamas_own_formats(start: Start, overlays: Overlays, tmp_path: Path, package: str) -> None:
    if not overlays.has_module("exllama", package):
        pytest.skip(f"{package} is not in the exllama environment")
    bench = start("exllama", converted(overlays, tmp_path, package))
    assert bench.client.info is not None and bench.client.info.format == package.replace("exllamav", "exl")
    assert apart(scores(bench), scores(start("transformers", WREN, cpu=True, dtype="float32"))) < 0.15
    converse(bench)

"""The quantiser and the runtime on real tensors: experiments of tests/quantize_lab.py, run in the Transformers environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modules.errors import BackendUnavailable
from modules.overlays import Overlays
from modules.quantize.process import QuantizeJob, quantize
from modules.quantize.settings import QuantizeSettings
from tests.conftest import ROOT
from tests.unit.lab import Lab, run_lab


@pytest.fixture(scope="module")
def lab(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Run an experiment once, all in one process; a later test of this module gets the same result."""
    if not overlays.has_module("transformers", "transformers"):
        pytest.skip("the Transformers environment is not installed")
    # glibc gives large blocks back at once: what is asked for is then what the process takes, in out_of_memory
    blocks = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    with run_lab(overlays, "transformers", "quantize_lab.py", tmp_path_factory.mktemp("lab mödel"), **blocks) as run:
        yield run


# --- one layer -------------------------------------------------------------------------------------------------


def test_gptq_beats_rounding_on_correlated_inputs(lab: Lab) -> None:
    for row in lab("layers"):
        assert row["gptq"] < 0.75 * row["rtn"], row["case"]
        assert row["gptq"] == pytest.approx(row["measured"], rel=0.01), row["case"]


def test_codes_zero_points_and_groups_are_in_range(lab: Lab) -> None:
    for row in lab("layers"):
        bits = int(row["case"][0])
        assert row["codes"][0] >= 0 and row["codes"][1] < 1 << bits
        assert row["zeros"][0] >= 1 and row["zeros"][1] < 1 << bits, "0 can't be told from 2^bits in a v1 file"
        assert row["groups"][1:] == [0, row["groups"][0] - 1]


def test_act_order_needs_g_idx_unless_groups_are_static(lab: Lab) -> None:
    for row in lab("layers"):
        assert row["order_is_plain"] == ("desc_act" not in row["case"] or "static_groups" in row["case"]), row["case"]


def test_layers_at_the_edge(lab: Lab) -> None:
    found = lab("odd_layers")
    assert found["dead"] == 0 and found["zero"] == 0
    assert found["positive_zeros"] == [1, 1] and found["positive_loss"] < 0.01
    assert found["singular"][0] < 0.01
    assert found["nan"][0] == "incompatible_model" and found["huge"][0] == "corrupt_model"


# --- kernels ---------------------------------------------------------------------------------------------------


def test_kernels_multiply_right(lab: Lab) -> None:
    found = lab("kernels")
    kinds = {row["kernel"] for row in found["results"]}
    assert {"dense", "unpack"} <= kinds and ("int4" in kinds) == found["int4"]
    for row in found["results"]:
        assert row["error"] < (0.015 if row["kernel"] == "int4" else 2e-6), row


def test_triton_kernel_in_the_interpreter(lab: Lab) -> None:
    found = lab("triton")
    if found is None:
        pytest.skip("Triton is not installed (it comes with torch's CUDA builds)")
    assert len(found) == 18
    for case, (error, used) in found.items():
        assert error < 2e-6 and used, case


# --- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_architecture(lab: Lab) -> None:
    """Layers found from the module tree; the runtime's logits equal those of the base model with dequantised weights."""
    found = lab("architectures")
    assert set(found) == {"llama", "mistral", "qwen2", "gpt_neox", "opt", "bloom", "gpt2"}
    for name, row in found.items():
        assert row["errors"]["dense"] < 1e-4 and row["errors"]["unpack"] < 1e-4, name
        assert row["errors"]["int4"] < 0.05, name
    assert found["llama"]["order"] == [
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert found["gpt2"]["order"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert {name: row["layers"] for name, row in found.items()} == {
        **dict.fromkeys(("llama", "mistral", "qwen2"), 14),
        **dict.fromkeys(("gpt_neox", "bloom", "gpt2"), 8),
        "opt": 12,
    }


@pytest.mark.slow
def test_every_width_through_files(lab: Lab) -> None:
    found = lab("variants")
    assert len(found) == 20
    for case, error in found.items():
        assert error < 1e-4, case


@pytest.mark.slow
def test_perplexity_is_ordered_on_a_trained_model(lab: Lab) -> None:
    ppl = lab("trained")
    assert ppl["fp"] < 20, "the model has learned something"
    assert ppl["fp"] <= ppl["gptq8"] * 1.001
    assert ppl["gptq8"] <= ppl["gptq4"] * 1.0005
    assert ppl["gptq4"] < ppl["rtn4"] and ppl["gptq3"] < ppl["rtn3"]
    assert ppl["gptq4"] - ppl["fp"] <= 0.5 * (ppl["rtn4"] - ppl["fp"])
    assert ppl["gptq3"] - ppl["fp"] <= 0.5 * (ppl["rtn3"] - ppl["fp"])


@pytest.mark.slow
def test_the_same_greedy_text_as_the_dequantised_reference(lab: Lab) -> None:
    """Exact kernels: token for token what transformers' generate() gives. int4 (bfloat16): perplexity within 1 %."""
    found = lab("trained")
    assert all(found["greedy"]["dense"]) and all(found["greedy"]["unpack"])
    assert found["int4 kernel"] == pytest.approx(found["gptq4"], rel=0.01)


def test_an_interrupted_run_goes_on(lab: Lab) -> None:
    found = lab("interrupted")
    assert not found["visible"], "nothing half-made has the model's name"
    assert found["work"] == ["block-0000.json", "block-0000.safetensors", "state.json"]
    assert found["same"] and found["fresh_layers"] == 7
    assert any("1 blocks are done" in note for note in found["notes"])
    assert any("starting over" in note for note in found["changed"])
    assert found["left"] == []


def test_memory_that_runs_out_in_a_layer(lab: Lab) -> None:
    found = lab("out_of_memory")
    if found is None:
        pytest.skip("this system can't limit a process's memory")
    assert found["code"] == "out_of_memory_load" and "--nsamples" in found["hint"]
    assert not found["visible"] and found["same"] and found["fresh"] == 7, "block 1 was not made again"


def test_a_full_disk(lab: Lab) -> None:
    rows = lab("full_disk")
    for case, found in rows.items():
        assert found["code"] == "storage_full" and "again" in found["hint"], case
        assert not found["visible"] and found["partial"] == [] and found["same"], case
    assert [found["fresh"] for found in rows.values()] == [14, 7, 0, 0]


def test_bad_input_to_the_quantiser(lab: Lab) -> None:
    found = lab("bad_input")
    expected = {
        "ffn": ("incompatible_model", "172"),
        "group": ("incompatible_model", "--group-size 32 or 64 or -1"),
        "bits": ("invalid_parameter", "bits"),
        "short": ("invalid_parameter", "9 tokens"),
        "missing text": ("invalid_parameter", "nowhere.txt"),
        "nan": ("corrupt_model", "layers.1.mlp.up_proj"),
        "cut": ("corrupt_model", "model.safetensors"),
        "twice": ("conflict", "--overwrite"),
        "quantised": ("incompatible_model", "quantised already"),
        "no room": ("storage_full", "needs about"),
    }
    assert {name: row[0] for name, row in found.items() if name != "made"} == {name: row[0] for name, row in expected.items()}
    for name, (_, words) in expected.items():
        assert words in found[name][1], found[name]
    assert found["made"] == []


def test_older_layouts_give_the_same_logits(lab: Lab) -> None:
    reads = lab("damaged")["reads"]
    assert reads == dict.fromkeys(reads, True) and len(reads) == 6


def test_broken_checkpoints_are_refused(lab: Lab) -> None:
    bad = lab("damaged")["bad"]
    codes = {name: row[0] for name, row in bad.items()}
    assert codes == {
        **dict.fromkeys(bad, "corrupt_model"),
        "marlin": "incompatible_model",
        "pickle": "unsafe_model",
    }
    for name, words in {
        "nan scales": "up_proj.scales",
        "no scales": "up_proj.scales",
        "no qzeros": "up_proj.qzeros",
        "no norm": "input_layernorm",
        "bad g_idx": "group 99",
        "wrong zeros": "gptq_v2",
        "foreign layer": "in_proj",
    }.items():
        assert words in bad[name][1], bad[name]


# --- the child process -----------------------------------------------------------------------------------------


def make_base(overlays: Overlays, folder: Path, layers: int = 2) -> Path:
    if not overlays.has_module("transformers", "transformers"):
        pytest.skip("the Transformers environment is not installed")
    script = "import sys; sys.path[:0] = ['.', 'tests']; import models_lab as q; from pathlib import Path\n"
    script += "c = q.configs()['llama']; c.num_hidden_layers = int(sys.argv[2]); q.make_model(Path(sys.argv[1]), c)"
    subprocess.run(
        [str(overlays.python("transformers")), "-c", script, str(folder), str(layers)],
        cwd=ROOT,
        env=overlays.worker_env("transformers"),
        capture_output=True,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def base(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(overlays, tmp_path_factory.mktemp("child") / "tiny llama ü")


def test_cancel_kills_the_child_and_the_same_job_goes_on(overlays: Overlays, base: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(group_size=32, nsamples=16, seqlen=64)
    job = QuantizeJob(base, tmp_path / "out", settings, device="cpu", threads=1)

    async def cancelled() -> None:
        second = asyncio.Event()
        task = asyncio.ensure_future(quantize(job, lambda event: second.set() if event.get("block") == 2 else None, overlays))
        waiting = asyncio.ensure_future(second.wait())
        await asyncio.wait({task, waiting}, timeout=240, return_when=asyncio.FIRST_COMPLETED)
        assert second.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    events: list[dict[str, Any]] = []
    assert not job.out.exists() and (tmp_path / ".out.part" / "block-0000.json").is_file()
    done = asyncio.run(quantize(job, events.append, overlays))
    assert done.path == job.out and done.layers == 14 and 0 < done.mean_loss < 0.1
    assert not (tmp_path / ".out.part").exists()
    layers = [event for event in events if "layer" in event]
    assert {event["block"] for event in layers} == {2}
    assert layers[-1]["fraction"] == 1.0 and layers[-1]["eta_s"] == 0.0
    provenance = json.loads((job.out / "switchyard_quantization.json").read_text(encoding="utf-8"))
    assert len(provenance["base"]["sha256"]["model.safetensors"]) == 64
    assert provenance["calibration"]["name"] == "bundled" and len(provenance["layers"]) == 14
    from modules.detect import check

    files = check(job.out)
    assert files.format == "gptq" and files.quantization is not None
    assert (files.quantization.bits, files.quantization.group_size, files.quantization.desc_act) == (4, 32, False)


@pytest.mark.skipif(os.name != "posix", reason="a signal to one process")
def test_ctrl_c_at_the_command_line(overlays: Overlays, tmp_path: Path) -> None:
    """The command stops with its own exit status, the same command goes on, and --show tells how the result was made."""
    base = make_base(overlays, tmp_path / "base", layers=10)
    command = [sys.executable, "server.py", "quantize", str(base), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--group-size", "32", "--nsamples", "16", "--seqlen", "64", "--desc-act", "--static-groups", "--mse", "--asym"]
    environment = os.environ | {"SWITCHYARD_SET": str(overlays.set_dir), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
        "env": environment,
        "cwd": ROOT,
    }
    # A shell's background jobs ignore SIGINT, and so would their children.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **pipes, preexec_fn=heard) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "block 2/10" in line:
                process.send_signal(signal.SIGINT)
                break
        assert "goes on after the last finished block" in process.stderr.read()
    assert process.returncode == 130
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.part" / "block-0000.json").is_file()
    done = subprocess.run(command, **pipes, check=True)
    assert "Going on where" in done.stdout and "block 1/10" not in done.stdout and "100%" in done.stdout
    shown = subprocess.run([*command[:3], str(tmp_path / "out"), "--show"], **pipes, check=True).stdout
    for part in (
        "GPTQ, 4 bits, groups of 32, with zero points, desc-act",
        "static-groups",
        "mse",
        "bundled: 16 windows of 64",
        "sha256",
    ):
        assert part in shown
    assert shown.count("mlp.down_proj") == 10
    refused = subprocess.run([*command[:3], str(base), "--show"], **pipes, check=False)
    assert refused.returncode == 1 and "does not say how it was made" in refused.stderr


def test_without_the_environment_the_fix_is_named(tmp_path: Path) -> None:
    job = QuantizeJob(tmp_path, tmp_path / "out", QuantizeSettings())
    with pytest.raises(BackendUnavailable, match="install"):
        asyncio.run(quantize(job, lambda _: None, Overlays(tmp_path, ROOT)))

"""The planner: shapes from headers (lying ones too), what fits and what is nearest, what a repository's file would need."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from modules.config import Config
from modules.detect import inspect, weights
from modules.download.hub import Hub
from modules.errors import AppError, CannotFit
from modules.plan import Fit, Machine, Memory, Shape, nearest, plan, verdict
from modules.plan.admission import Need, need_of, refusal
from modules.plan.cli import add_parser, run
from modules.plan.machine import instruction_sets, known_bandwidth, measure_bandwidth, parse_gpus, usable_cores
from modules.plan.planner import complete, contexts, estimate, estimator, size, tokens_per_second
from modules.plan.repository import plan_repository
from modules.plan.shape import read_shape
from modules.plan.types import Gpu
from modules.registry import discover
from modules.schema import LoaderSpec, ModelFiles
from tests.unit.hub_server import FakeHub
from tests.unit.model_files import LLAMA as LLAMA_CONFIG
from tests.unit.model_files import gguf_bytes, gguf_keys, gguf_tensors, hf_folder, llama_tensors, safetensors_bytes, write_json

GB = 10**9
MACHINE = Machine(ram_bytes=32 * GB, ram_available_bytes=20 * GB, cores=8, disk_free_bytes=500 * GB, bandwidth=20e9)
SPECS = discover()
# A Llama of 1.1 billion parameters.
LLAMA = Shape(
    "hf", "LlamaForCausalLM", 2_200_000_000, 1_100_048_384, stored={"BF16": 2_200_000_000}, layers=22, hidden=2048, heads=32,
    head_dim=64, ffn=5632, vocab=32000, context=2048, embedding=65_536_000, output=65_536_000, embedding_bytes=131_072_000,
    output_bytes=131_072_000, largest=11_534_336, keys=22 * 256, values=22 * 256,
)  # fmt: skip
FILES = ModelFiles("llama", "/models/llama", "hf", 2_200_000_000, "LlamaForCausalLM")


class Installed:
    def unavailable(self, spec: LoaderSpec) -> str | None:
        return None


def small(gigabytes: float, **changes: Any) -> Machine:
    return dataclasses.replace(MACHINE, ram_bytes=int(gigabytes * GB), ram_available_bytes=int(gigabytes * GB), **changes)


# --- shapes --------------------------------------------------------------------------------------------------------


def test_a_folders_shape(tmp_path: Path) -> None:
    shape = read_shape(inspect(hf_folder(tmp_path / "llama")))
    assert (shape.layers, shape.hidden, shape.heads, shape.head_dim, shape.ffn, shape.context) == (2, 16, 4, 4, 24, 64)
    assert (shape.keys, shape.values, shape.windowed) == (2 * 8, 2 * 8, 0)  # two layers of 2 heads of 4
    assert shape.embedding == shape.output == 32 * 16 and not shape.tied
    assert shape.largest == 24 * 16 and shape.stored == {"F16": 2 * shape.parameters} and not shape.gap


def test_windows_and_states_are_counted_apart(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    shape = read_shape(inspect(hf_folder(tmp_path / "a", {"layer_types": kinds, "sliding_window": 8})))
    assert (shape.keys, shape.values, shape.windowed, shape.window) == (8, 8, 16, 8)
    assert shape.cache_elements(64) == 64 * 16 + 8 * 16
    shape = read_shape(inspect(hf_folder(tmp_path / "b", {"layer_types": ["linear_attention", "full_attention"]})))
    assert (shape.keys, shape.windowed) == (8, 0) and shape.state > 0


@pytest.mark.parametrize(
    "change,gap",
    [
        ({"num_hidden_layers": 10**15, "model_type": "other"}, "num_hidden_layers is 1000000000000000"),
        ({"num_attention_heads": -4, "model_type": "other"}, "num_attention_heads is -4"),
        ({"hidden_size": "many", "model_type": "other"}, "hidden_size is many"),
        ({"num_hidden_layers": None, "model_type": "other"}, "no num_hidden_layers"),
    ],
)
def test_a_lying_config_leaves_a_gap_and_no_more(tmp_path: Path, change: dict[str, Any], gap: str) -> None:
    model = dataclasses.replace(inspect(hf_folder(tmp_path / "x")), problem=None)
    write_json(tmp_path / "x" / "config.json", json.loads((tmp_path / "x" / "config.json").read_text()) | change)
    shape = read_shape(model)
    assert gap in shape.gap
    fits = plan(model, MACHINE, SPECS.values(), Installed(), shape=shape)
    assert all(fit.ram_bytes is None and gap in fit.reason for fit in fits if fit.loader == "transformers")


def test_a_ggufs_shape_is_by_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = gguf_keys(llama__attention__head_count=(4, 4), llama__attention__head_count_kv=(4, 2**31), llama__block_count=(4, 1))
    tensors = {
        "token_embd.weight": ((32, 4), 0, 512),
        "blk.0.attn_k.weight": ((32, 16), 0, 2048),
        "blk.0.attn_v.weight": ((32, 16), 0, 2048),
        "output_norm.weight": ((32,), 0, 128),
    }
    path.write_bytes(gguf_bytes(keys, tensors))
    shape = read_shape(inspect(path))
    assert (shape.keys, shape.values, shape.layers, shape.tied, shape.gap) == (16, 16, 1, True, "")
    assert shape.stored == {"F32": 512 + 4096 + 128} and shape.embedding_bytes == 512


# --- what each loader needs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPECS if name != "remote"])
def test_every_loader_estimates_and_says_what_to_try(name: str) -> None:
    own = estimator(SPECS[name])
    assert own is not None
    config = {
        "model_type": "opt", "num_hidden_layers": 22, "hidden_size": 2048, "num_attention_heads": 32, "ffn_dim": 5632,
        "max_position_embeddings": 2048, "vocab_size": 32000,
    }  # fmt: skip
    shape = dataclasses.replace(LLAMA, config=config, packed=LLAMA.matrices, packed_bytes=LLAMA.matrices // 2, group_size=128)
    for setting in own.settings(shape, MACHINE):
        options = complete(SPECS[name], setting.options)
        memory = own.estimate(shape, options, MACHINE)
        assert 0 < memory.at_load <= memory.ram < 10 * GB
        if "ctx_size" in options and name not in ("rwkv", "exllama"):
            longer = own.estimate(shape, options | {"ctx_size": 2048}, MACHINE)
            shorter = own.estimate(shape, options | {"ctx_size": 512}, MACHINE)
            assert shorter.ram <= longer.ram


def test_a_smaller_cache_type_and_number_format_need_less() -> None:
    llama = SPECS["llamacpp"]
    shape = dataclasses.replace(LLAMA, format="gguf", context=32768, stored={"Q8_0": 1_200_000_000})
    full, eight, four = (
        estimate(shape, llama, complete(llama, {"ctx_size": 32768, "cache_type_k": kind, "cache_type_v": kind}), MACHINE)
        for kind in ("f16", "q8_0", "q4_0")
    )
    assert full.cache == 32768 * 22 * 512 * 2
    assert full.cache > eight.cache > four.cache and eight.cache == full.cache * 34 // 64
    hf = SPECS["transformers"]
    half = dataclasses.replace(LLAMA, stored={"F16": 2 * LLAMA.parameters})
    sizes = [
        estimate(half, hf, complete(hf, options), MACHINE).weights
        for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"load_in_8bit": True}, {"load_in_4bit": True})
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4 * LLAMA.parameters
    in_file = estimate(LLAMA, hf, complete(hf, {"dtype": "bfloat16"}), MACHINE)
    assert (in_file.weights, in_file.mapped) == (0, 2 * (LLAMA.parameters - LLAMA.embedding))


def test_transformers_leaves_on_the_cpu_what_a_gpu_has_no_room_for() -> None:
    spec = SPECS["transformers"]
    card = dataclasses.replace(MACHINE, gpus=(Gpu("card", 2 * GB, 2 * GB),))
    whole = estimate(LLAMA, spec, complete(spec, {}), dataclasses.replace(MACHINE, gpus=(Gpu("card", 8 * GB, 8 * GB),)))
    parted = estimate(LLAMA, spec, complete(spec, {}), card)
    assert parted.vram == 2 * GB and parted.weights == whole.vram - 2 * GB > 0 == whole.weights
    need = Need(FILES, spec, {}, parted, LLAMA, known=True)
    assert not need.hopeless(card)
    assert not estimate(LLAMA, spec, complete(spec, {"load_in_8bit": True}), card).weights


def test_the_time_of_a_token() -> None:
    memory = Memory(weights=0, read=10 * GB, efficiency=0.5)
    assert tokens_per_second(memory, MACHINE) == pytest.approx(1.0)
    assert tokens_per_second(memory, dataclasses.replace(MACHINE, bandwidth=None)) is None
    assert tokens_per_second(Memory(weights=0, read=1), MACHINE) is None


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_ranked_and_ready_to_apply() -> None:
    fits = plan(FILES, MACHINE, SPECS.values(), Installed(), shape=LLAMA)
    assert fits[0].fits and fits[0].how == "load" and fits[0].loader == "transformers"
    assert {"load", "convert", "quantize"} == {fit.how for fit in fits}
    assert [fit.fits for fit in fits] == sorted((fit.fits for fit in fits), reverse=True)
    for fit in fits:
        assert set(fit.options) <= {option.name for option in SPECS[fit.loader].options}
        assert fit.reason.endswith(".") and "\n" not in fit.reason


def test_short_memory_takes_the_context_then_the_format() -> None:
    long = dataclasses.replace(LLAMA, context=131072)
    fits = plan(FILES, small(4), SPECS.values(), Installed(), shape=long)
    formats = {fit.options.get("dtype"): fit for fit in fits if fit.loader == "transformers" and fit.how == "load"}
    assert not formats["float32"].fits and "needs" in formats["float32"].reason
    assert formats["bfloat16"].fits and formats["bfloat16"].context_length < 131072
    assert all(fit.ram_bytes is not None and fit.ram_bytes <= 4 * GB for fit in fits if fit.fits)


def test_nothing_fits_a_machine_that_is_too_small() -> None:
    fits = plan(FILES, small(0.01), SPECS.values(), Installed(), shape=LLAMA)
    assert fits and not any(fit.fits for fit in fits) and nearest(fits) is None


def test_contexts_halve() -> None:
    assert contexts(dataclasses.replace(LLAMA, context=5000)) == [5000, 4096, 2048, 1024, 512]
    assert contexts(dataclasses.replace(LLAMA, context=300)) == [300]
    assert len(contexts(dataclasses.replace(LLAMA, context=2**31))) < 20


def test_an_environment_that_is_not_there_is_said() -> None:
    class Missing:
        def unavailable(self, spec: LoaderSpec) -> str | None:
            return "not installed: ./start_linux.sh install x"

    fits = plan(FILES, MACHINE, SPECS.values(), Missing(), shape=LLAMA)
    assert fits and all(not fit.installed for fit in fits)
    assert all("not installed yet" in fit.reason for fit in fits)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_nearest_that_fits(tmp_path: Path) -> None:
    model = inspect(hf_folder(tmp_path / "m"))
    shape = dataclasses.replace(LLAMA, context=2048)
    spec = SPECS["llamacpp"]
    options = complete(spec, {"ctx_size": 1_000_000})
    need = dataclasses.replace(need_of(model, spec, options, MACHINE), shape=shape, known=True)
    need = dataclasses.replace(need, memory=estimate(shape, spec, options, MACHINE))
    assert need.hopeless(MACHINE) and not need.fits(MACHINE.ram_available_bytes)
    error = refusal(need, MACHINE, SPECS.values(), Installed())
    assert isinstance(error, CannotFit) and error.code == "cannot_fit"
    assert error.detail["nearest"]["options"] == {"ctx_size": 2048} and "ctx_size 2048" in error.hint


def test_a_shortage_within_the_estimates_error_is_no_refusal() -> None:
    spec = SPECS["transformers"]
    options = complete(spec, {"dtype": "float32"})
    memory = estimate(LLAMA, spec, options, MACHINE)
    need = dataclasses.replace(need_of(FILES, spec, options, MACHINE), memory=memory, known=True)
    assert not need.hopeless(small(memory.at_load * 0.9 / GB))
    assert need.hopeless(small(memory.at_load * 0.8 / GB))
    assert not dataclasses.replace(need, known=False).hopeless(small(0.001))


# --- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes,level", [(4, "fits"), (16.4, "tight"), (22, "tight"), (40, "no"), (600, "no")])
def test_the_verdict_on_a_file_that_is_not_here(gigabytes: float, level: str) -> None:
    assert verdict(int(gigabytes * GB), MACHINE).level == level


def test_absurd_sizes_are_only_large_numbers() -> None:
    assert verdict(2**63, MACHINE).level == "no"
    assert verdict(0, MACHINE).level == "fits"
    assert size(2**70).endswith("PB")


def test_gpus_as_the_driver_lists_them() -> None:
    found = parse_gpus("NVIDIA A, B, 24564, 20000\nbroken\n[N/A], [N/A], [N/A]\n")
    assert [(gpu.name, gpu.free_bytes >> 20) for gpu in found] == [("NVIDIA A, B", 20000)]


def test_the_bandwidth_is_the_best_of_three_occasions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([5e9, 20e9, 7e9])
    monkeypatch.setattr("modules.plan.machine.measure_bandwidth", lambda: next(measured))
    assert known_bandwidth(tmp_path, measure=False) is None
    assert [known_bandwidth(tmp_path) for _ in range(5)] == [5e9, 20e9, 20e9, 20e9, 20e9]
    assert known_bandwidth(tmp_path, measure=False) == 20e9
    (tmp_path / "machine.json").write_text('{"processor": "another", "bandwidth": -1, "occasions": "x"}', encoding="utf-8")
    assert known_bandwidth(tmp_path, measure=False) is None


def test_the_bandwidth_of_this_machine_is_measured() -> None:
    assert 1e8 < measure_bandwidth() < 1e13


# --- a repository --------------------------------------------------------------------------------------------------


def plan_from(files: dict[str, bytes]) -> tuple[list[Fit], int]:
    """The fits of a repository with these files, and how many files were asked for."""
    with FakeHub(files) as hub:
        fits = asyncio.run(plan_repository(Hub(hub.url), "owner/name", None, MACHINE, SPECS.values(), Installed()))
        return fits, sum(path.startswith("/cdn/") for path, _ in hub.requests)


def test_a_repositorys_safetensors_are_planned_by_their_headers() -> None:
    files = {
        "config.json": json.dumps({**LLAMA_CONFIG, "vocab_size": 4096, "hidden_size": 64}).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors_bytes(llama_tensors({"vocab_size": 4096, "hidden_size": 64})),
        "evil.py": b"print(1)",
    }
    fits, asked = plan_from(files)
    assert fits[0].how == "download" and fits[0].loader == "transformers" and fits[0].context_length == 64
    assert asked == 3


def test_a_repositorys_quantisations_share_one_header() -> None:
    whole = gguf_bytes(gguf_keys(), {**gguf_tensors(), "blk.0.attn_k.weight": ((32, 16), 0, 2048)})
    larger = gguf_bytes(gguf_keys(), {**gguf_tensors(), "blk.0.attn_k.weight": ((32, 64), 0, 8192)})
    files = {"m-Q4_K_M.gguf": whole, "m-Q8_0.gguf": larger, "mmproj-m-F16.gguf": whole}
    fits, asked = plan_from(files)
    assert {fit.quantization for fit in fits} == {"Q4_K_M", "Q8_0"}
    assert asked == 1


@pytest.mark.parametrize("weights", [b"", b"GGUF", b"<html>log in</html>", b"\xff" * 5000])
def test_a_repository_with_broken_weights_is_a_typed_problem(weights: bytes) -> None:
    for name in ("m-Q4_0.gguf", "model.safetensors"):
        with pytest.raises(AppError):
            plan_from({"config.json": json.dumps(LLAMA_CONFIG).encode(), name: weights})


@pytest.mark.skipif(sys.platform == "win32", reason="a file is sparse there only when it is asked for")
def test_a_hundred_gigabytes_are_planned_by_their_header(tmp_path: Path) -> None:
    """A sparse file of the true size: nothing but the header is there to be read."""
    config = {**LLAMA_CONFIG, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    tensors = {name: (kind, list(shape)) for name, (kind, shape) in llama_tensors(config).items()}
    header, at = {}, 0
    for name, (kind, sides) in tensors.items():
        end = at + 2 * math.prod(sides)
        header[name] = {"dtype": kind, "shape": sides, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    write_json(tmp_path / "config.json", config)
    with (tmp_path / "model.safetensors").open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + at)
    model = inspect(tmp_path)
    assert model.problem is None and model.size_bytes > 130 * GB
    fits = plan(model, MACHINE, SPECS.values(), Installed())
    assert fits and not any(fit.fits for fit in fits if fit.how == "load")


# --- the command ---------------------------------------------------------------------------------------------------


def command(folder: Path, name: str, *flags: str, data: Path | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    config = Config(model_dir=folder, user_data_dir=data or folder / "data")
    return run(parser.parse_args(["plan", name, *flags]), config)


@pytest.fixture
def measured(tmp_path: Path) -> None:
    """A bandwidth that is known, so that the command measures none."""
    key = f"{platform.machine()}, {usable_cores()} cores, {'+'.join(instruction_sets())}"
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "machine.json", {"processor": key, "bandwidth": 20_000_000_000, "occasions": 3})


@pytest.mark.usefixtures("measured")
def test_the_command_shows_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_folder(tmp_path / "tiny")
    assert command(tmp_path, "tiny") == 0
    shown = capsys.readouterr().out
    assert "memory read at about 20 GB/s" in shown and "Transformers" in shown and "float32" in shown
    assert command(tmp_path, "tiny", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["nearest"] == made["fits"][0] and made["machine"]["bandwidth"] == 2e10


@pytest.mark.usefixtures("measured")
def test_the_command_reads_each_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ninety thousand tensors that is a second."""
    folder = hf_folder(tmp_path / "elsewhere" / "sharded")
    (folder / "model.safetensors").unlink()
    names = list(llama_tensors())
    files = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file, part in files.items():
        (folder / file).write_bytes(safetensors_bytes({name: llama_tensors()[name] for name in part}))
    write_json(folder / weights.INDEX, {"weight_map": {name: file for file, part in files.items() for name in part}})
    read: list[str] = []
    real_json, real_header = weights.read_json, weights.read_safetensors_header
    monkeypatch.setattr(weights, "read_json", lambda path, *limit: (read.append(path.name), real_json(path, *limit))[1])
    monkeypatch.setattr(weights, "read_safetensors_header", lambda path: (read.append(path.name), real_header(path))[1])
    (tmp_path / "models").mkdir()
    assert command(tmp_path / "models", str(folder), data=tmp_path / "data") == 0
    assert sorted(name for name in read if name in (*files, weights.INDEX)) == sorted((*files, weights.INDEX))


def test_headers_that_are_kept_are_read_again_when_the_file_is_another(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    with weights.headers_kept():
        first = weights.read_weights(folder, ["model.safetensors"])[0]
        assert weights.read_weights(folder, ["model.safetensors"])[0] is first
        (folder / "model.safetensors").write_bytes(safetensors_bytes(llama_tensors({"num_hidden_layers": 3})))
        assert len(weights.read_weights(folder, ["model.safetensors"])[0]) > len(first)
    assert weights.read_weights(folder, ["model.safetensors"])[0] is not first


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kind", ["empty", "cut", "beyond", "overflow", "no config", "no weights", "layers"])
def test_a_broken_model_is_a_typed_problem(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_folder(tmp_path / "m") if kind in ("no config", "no weights", "layers") else tmp_path
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "layers":
        write_json(folder / "config.json", {**LLAMA_CONFIG, "num_hidden_layers": 10**12})
    else:
        tensors = gguf_tensors()
        if kind == "beyond":
            tensors["blk.0.attn_q.weight"] = ((32, 1 << 30), 0, 4096)
        if kind == "overflow":
            tensors["blk.0.attn_q.weight"] = ((32, 1 << 40, 1 << 40), 0, 4096)
        raw = gguf_bytes(gguf_keys(), tensors)
        (folder / "m.gguf").write_bytes({"empty": b"", "cut": raw[:200]}.get(kind, raw))
    assert command(tmp_path, "m") == 1
    said = capsys.readouterr().err
    assert said.startswith("Switchyard: ") and said.count("\n") == 1

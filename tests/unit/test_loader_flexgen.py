"""FlexGen: its options, its package and its files checked; the experiments of tests/flexgen_lab.py in its environment."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loaders._flexgen_package import FINGERPRINTS, changed_functions, check_package
from loaders._flexgen_plan import main_memory_bytes, plan_of, weight_bytes
from loaders.flexgen import SPEC, FlexGenEngine, refusal
from modules.detect.opt import opt_shape, source_name
from modules.errors import BackendUnavailable, CorruptModel, IncompatibleModel, InvalidParameter, UnsafeModel
from modules.opt_weights import open_weights
from modules.schema import ModelFiles
from tests.conftest import ROOT
from tests.unit.model_files import safetensors_bytes, write_json

if TYPE_CHECKING:
    from modules.overlays import Overlays

OPT: dict[str, Any] = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 30,
    "vocab_size": 40,
}


# --- options -----------------------------------------------------------------------------------------------------


def plan(cuda: bool = False, **options: Any) -> Any:
    return plan_of({o.name: o.default for o in SPEC.options} | options, cuda)


def test_percentages() -> None:
    made = plan(w_percent="20, 30, 50", cache_percent="0/100/0", act_percent="0 0 100%", gpu_batch_size=3, num_gpu_batches=5)
    assert (made.weights, made.cache, made.activations) == ((20, 30, 50), (0, 100, 0), (0, 0, 100))
    assert made.slots == 15 and made.dtype == "float16"


def test_flexgens_own_six_numbers() -> None:
    made = plan(percent="0 100 25 50 0 0", w_percent="100,0,0")
    assert (made.weights, made.cache, made.activations) == ((0, 100, 0), (25, 50, 25), (0, 0, 100))


@pytest.mark.parametrize(
    "options,param,words",
    [
        ({"w_percent": "50,20,20"}, "w_percent", "must add up to 100; 50,20,20 makes 90"),
        ({"cache_percent": "100"}, "cache_percent", "must be 3 percentages"),
        ({"w_percent": "150,-50,0"}, "w_percent", "from 0 to 100"),
        ({"w_percent": "a,b,c"}, "w_percent", "must be 3 percentages"),
        ({"w_percent": "nan,0,100"}, "w_percent", "from 0 to 100"),
        ({"percent": "60 60 0 100 0 100"}, "percent", "60 and 60 percent of the weights are more than 100"),
        ({"percent": "0 100 0"}, "percent", "must be 6 percentages"),
        ({"act_percent": "50,50,0"}, "act_percent", "keeps all activations in one place"),
        ({"cache_percent": "50,50,0", "compress_cache": True}, "cache_percent", "can't be spread"),
        ({"dtype": "float32", "compress_weight": True}, "dtype", "compression takes float16"),
        ({"dtype": "float32", "cuda": True}, "dtype", "float16 on a GPU"),
    ],
)
def test_what_does_not_work_is_told(options: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=re.escape(words)) as caught:
        plan(**options)
    assert caught.value.param == param


def test_what_the_percentages_promise() -> None:
    shape = opt_shape(OPT)
    elements = sum(int(np.prod(s)) for s in shape.tensors().values()) + 40 * 8
    half = weight_bytes(shape, plan(w_percent="0,50,50"))
    assert (half["gpu"], half["cpu"] + half["disk"]) == (0, 2 * elements) and 0.4 < half["cpu"] / (2 * elements) < 0.6
    assert weight_bytes(shape, plan()) == {"gpu": 4 * elements, "cpu": 0, "disk": 0}
    assert weight_bytes(shape, plan(cuda=True))["gpu"] == 2 * elements
    on_disk, in_memory = plan(w_percent="0,0,100"), plan(w_percent="0,100,0")
    needs = [main_memory_bytes(shape, made, 4, 10, 10) for made in (on_disk, in_memory, plan())]
    assert needs[1] - needs[0] == 2 * elements and needs == sorted(needs)


def test_samplers() -> None:
    native = FlexGenEngine.to_native({"temperature": 0.5, "top_k": 3, "penalty_alpha": 0.6})
    assert native["sampler"] == {"temperature": 0.5, "top_k": 3} and list(native["ignored"]) == ["penalty_alpha"]


def test_a_llama_is_not_offered_to_flexgen(tmp_path: Path) -> None:
    def files(architecture: str | None, **config: Any) -> ModelFiles:
        write_json(tmp_path / "config.json", OPT | config)
        return ModelFiles("m", str(tmp_path), "hf", architecture=architecture)

    assert refusal(files("OPTForCausalLM")) is None
    assert refusal(files("LlamaForCausalLM")) == "runs OPT and Galactica models; this is LlamaForCausalLM."
    assert "opt-350m" in str(refusal(files("OPTForCausalLM", word_embed_proj_dim=4)))
    assert refusal(ModelFiles("m", str(tmp_path), "flexgen")) is None


# --- the shape ---------------------------------------------------------------------------------------------------


def test_shapes_from_config() -> None:
    tensors = opt_shape(OPT).tensors()
    assert tensors["decoder.embed_positions.weight"] == (32, 8) and tensors["decoder.layers.1.fc1.weight"] == (24, 8)
    assert len(tensors) == 2 + 2 * 16 + 2
    galactica = opt_shape(OPT | {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False})
    assert galactica.activation == "gelu"
    assert galactica.default("decoder.layers.0.fc1.bias") == 0 and galactica.default("decoder.layer_norm.weight") == 1
    assert galactica.default("decoder.layers.0.fc1.weight") is None


@pytest.mark.parametrize(
    "changes,error,words",
    [
        ({"model_type": "llama"}, IncompatibleModel, "OPT and Galactica models; this is llama"),
        ({"model_type": None}, IncompatibleModel, "unknown architecture"),
        ({"word_embed_proj_dim": 4}, IncompatibleModel, "opt-350m"),
        ({"do_layer_norm_before": False}, IncompatibleModel, "opt-350m"),
        ({"tie_word_embeddings": False}, IncompatibleModel, "tied"),
        ({"activation_function": "silu"}, IncompatibleModel, "'silu'"),
        ({"num_hidden_layers": "two"}, CorruptModel, "no usable num_hidden_layers"),
        ({"num_attention_heads": 3}, CorruptModel, "no multiple"),
    ],
)
def test_what_flexgen_cannot_compute(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        opt_shape(OPT | changes)


def test_names_of_the_checkpoints_tensors() -> None:
    final = "model.decoder.final_layer_norm.bias"
    assert source_name("decoder.layer_norm.bias", {final}) == final
    assert source_name("decoder.embed_tokens.weight", {"decoder.embed_tokens.weight"}) == "decoder.embed_tokens.weight"
    assert source_name("decoder.embed_tokens.weight", {"lm_head.weight"}) is None


# --- files -------------------------------------------------------------------------------------------------------


def arrays(folder: Path, **changes: Any) -> Path:
    """FlexGen's folder of random arrays."""
    folder.mkdir()
    config = OPT | changes
    write_json(folder / "config.json", config)
    for name, shape in opt_shape(config).tensors().items():
        with (folder / name).open("wb") as file:
            np.save(file, np.random.default_rng(len(name)).normal(size=shape).astype(np.float16))
    return folder


def test_arrays_are_read(tmp_path: Path) -> None:
    weights = open_weights(arrays(tmp_path / "öpt-np"))
    name = "decoder.layers.1.fc2.weight"
    assert weights.array(name).shape == (8, 24) and weights.array(name).dtype == np.float16
    assert weights.file(name) == tmp_path / "öpt-np" / name


def test_safetensors_are_read_in_every_number_format(tmp_path: Path) -> None:
    folder = tmp_path / "öpt"
    folder.mkdir()
    write_json(folder / "config.json", OPT)
    shapes = {f"model.{n}".replace(".layer_norm.", ".final_layer_norm."): s for n, s in opt_shape(OPT).tensors().items()}
    for dtype, expected in (("F16", np.float16), ("F32", np.float32), ("BF16", np.float32)):
        (folder / "model.safetensors").write_bytes(safetensors_bytes({name: (dtype, s) for name, s in shapes.items()}))
        values = open_weights(folder).array("decoder.layer_norm.bias")
        assert values.shape == (8,) and values.dtype == expected
    (folder / "model.safetensors").write_bytes(safetensors_bytes({name: ("I8", s) for name, s in shapes.items()}))
    with pytest.raises(IncompatibleModel, match="full-precision weights only"):
        open_weights(folder)
    shapes.pop("model.decoder.layers.0.fc1.bias")
    (folder / "model.safetensors").write_bytes(safetensors_bytes({name: ("F16", s) for name, s in shapes.items()}))
    with pytest.raises(CorruptModel, match=r"fc1\.bias is missing"):
        open_weights(folder)


def test_galacticas_missing_biases_are_filled(tmp_path: Path) -> None:
    folder = arrays(tmp_path / "g", enable_bias=False, layer_norm_elementwise_affine=False)
    for name in ("decoder.layers.0.fc1.bias", "decoder.layer_norm.weight"):
        (folder / name).unlink()
    weights = open_weights(folder)
    assert not weights.array("decoder.layers.0.fc1.bias").any() and (weights.array("decoder.layer_norm.weight") == 1).all()


@pytest.mark.parametrize("fault", ["missing", "cut", "shape", "objects", "dtype", "config", "code"])
def test_broken_arrays_are_refused(tmp_path: Path, fault: str) -> None:
    folder = arrays(tmp_path / "broken")
    path = folder / "decoder.layers.1.fc1.weight"
    error: type[Exception] = CorruptModel
    words = r"fc1\.weight"
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-5])
        words = "file incomplete"
    elif fault == "shape":
        with path.open("wb") as file:
            np.save(file, np.zeros((8, 24), np.float16))
        words = "8 × 24, but config.json says 24 × 8"
    elif fault == "objects":
        with path.open("wb") as file:
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        error, words = UnsafeModel, "Python objects"
    elif fault == "dtype":
        with path.open("wb") as file:
            np.save(file, np.zeros((24, 8), np.int16))
        words = "float16 and float32"
    elif fault == "config":
        (folder / "config.json").unlink()
        words = r"no config\.json"
    else:
        write_json(folder / "config.json", OPT | {"auto_map": {"AutoModel": "evil.Model"}})
        error, words = UnsafeModel, "auto_map"
    with pytest.raises(error, match=words):
        open_weights(folder)


# --- the package -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(overlays: Overlays) -> Overlays:
    missing = overlays.unavailable(SPEC)
    if missing:
        pytest.skip(f"FlexGen: {missing}")
    return overlays


def test_the_package_is_the_one_that_is_patched(environment: Overlays, tmp_path: Path) -> None:
    """Every function this loader replaces or relies upon, by the hash of its source."""
    site = next(site for site in environment.layers("flexgen") if (site / "flexgen").is_dir())
    assert changed_functions(site / "flexgen") == [], "flexgen changed: look at what loaders/_flexgen_*.py replace in it"
    for name in FINGERPRINTS:
        text = (site / "flexgen" / name).read_text(encoding="utf-8")
        head = "def map_to_torch_tensor(tensor, indices):"
        (tmp_path / name).write_text(text.replace(head, f"{head}\n    pass"), encoding="utf-8")
    assert changed_functions(tmp_path) == ["pytorch_backend.py:map_to_torch_tensor"]
    with pytest.raises(BackendUnavailable, match="map_to_torch_tensor"):
        check_package(tmp_path)


@pytest.fixture(scope="module")
def lab(environment: Overlays) -> Any:
    """All experiments, run once. On the bundled OPT where it is there, else on a random one."""
    bundled = ROOT / "models" / "wren-opt-6m"
    with tempfile.TemporaryDirectory(prefix="flexgen läb ") as folder:
        done = subprocess.run(
            [
                str(environment.python("flexgen")),
                str(ROOT / "tests" / "flexgen_lab.py"),
                folder,
                str(bundled) if (bundled / "config.json").is_file() else "",
            ],
            env=environment.worker_env("flexgen"),
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])


PLACEMENTS = (
    "all on the GPU's side",
    "all on CPU",
    "mixed, several GPU batches",
    "all on disk",
    "on disk without overlap, whole layers",
    "float32 on CPU, several GPU batches",
)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_greedy_tokens_are_transformers_own(lab: Any, placement: str) -> None:
    assert lab["placements"][placement] == lab["reference"]
    assert set(lab["placements"]) == set(PLACEMENTS)


def test_the_weights_are_where_the_plan_says(lab: Any) -> None:
    for found, promised in lab["homes"]:
        assert found == promised


def test_galacticas_activation_and_missing_biases(lab: Any) -> None:
    assert lab["galactica"]["ours"] == pytest.approx(lab["galactica"]["reference"], abs=2e-3)


def test_compression_stays_close(lab: Any) -> None:
    """4 bits cost quality; a wrong unpacking would cost everything."""
    plain, weights = np.array(lab["4 bit"]["plain"]), np.array(lab["4 bit"]["weights"])
    assert 0 < abs(plain.mean() - weights.mean()) < 0.5
    cache = lab["4 bit"]["cache"]
    assert lab["4 bit"]["cache on disk"] == cache
    same = sum(a == b for ours, theirs in zip(cache, lab["reference"], strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.5 * sum(len(tokens) for tokens in cache)


def test_a_block_grows_beyond_its_first_cache(lab: Any) -> None:
    assert lab["grown"]["gpu"] == lab["grown"]["mixed"] == lab["grown"]["disk"]
    assert [len(tokens) for tokens in lab["grown"]["gpu"]] == [140, 140]


def test_a_converted_model_is_the_same_model(lab: Any) -> None:
    assert lab["converted"]["before"] == lab["converted"]["after"] == pytest.approx(lab["converted"]["from disk"], abs=1e-5)


def test_scoring_between_two_steps_disturbs_neither(lab: Any) -> None:
    assert lab["aside"]["scores"] == [True] * 8 and lab["aside"]["tokens"] == lab["aside"]["expected"]


def test_a_cancelled_request_leaves_the_others_alone(lab: Any) -> None:
    found = lab["cancelled"]
    assert found["reasons"] == ["cancelled", "length"] and found["first"] <= 5
    assert found["second"] == found["whole"][1] and found["again"] == found["whole"]


def test_memory_of_expanded_weights_is_used_again_by_whoever_comes_next(lab: Any) -> None:
    assert lab["spares"] == {"apart": True, "reused": True, "freed": True}


def test_the_offload_folder_is_left_empty(lab: Any) -> None:
    assert lab["offload left"] == []

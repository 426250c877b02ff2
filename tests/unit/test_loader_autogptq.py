"""AutoGPTQ: which package is installed where, files of either transformers, and on real tensors (tests/autogptq_lab.py)
loading, our kernels beside the package's own, quantising through it, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from loaders import _hf_compat
from loaders._autogptq_package import parse_loss, parse_place, replaced
from loaders._autogptq_successor import plain_settings, without_refused
from loaders.autogptq import PACKAGE_KERNEL, SPEC
from modules.errors import BackendUnavailable, InvalidParameter
from modules.overlays import EnvSpec, Overlays
from modules.quantize.process import QuantizeJob, default_out, quantize
from modules.quantize.settings import QuantizeSettings, check_settings
from tests.conftest import ROOT
from tests.unit.lab import Lab, run_lab

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REQUIREMENTS = ROOT / "loaders" / "requirements" / "autogptq.txt"
MACHINES = [
    ("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("win32", "ARM64"), ("darwin", "arm64"), ("darwin", "x86_64"),
]  # fmt: skip


# --- what is installed where --------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    from packaging.requirements import Requirement

    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


@pytest.mark.parametrize("platform,machine", MACHINES)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_one_package_with_its_transformers_on_every_machine(python: str, platform: str, machine: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_machine": machine,
    }
    chosen = {r.name: str(r.specifier) for r in requirements() if r.marker is None or r.marker.evaluate(environment)}
    wheels = python in ("3.10", "3.11") and (platform, machine) in (("linux", "x86_64"), ("win32", "AMD64"))
    assert ("auto-gptq" in chosen, "gptqmodel" in chosen) == (wheels, not wheels)
    assert chosen["transformers"] == ("==4.53.3" if wheels else "==5.20.2" if python == "3.10" else "==5.23.0")
    assert all(pin.startswith("==") for pin in chosen.values())
    names = [r.name for r in requirements() if r.marker is None or r.marker.evaluate(environment)]
    assert len(names) == len(set(names)), "one line for each package"


def test_auto_gptq_is_never_compiled() -> None:
    assert re.search(r"^--only-binary auto-gptq$", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_packages_own_kernel_can_be_kept() -> None:
    option = SPEC.option("kernel")
    assert option is not None and PACKAGE_KERNEL in option.choices and option.default == "auto"


# --- files of transformers 4 and 5 --------------------------------------------------------------------------------


def test_names_of_transformers_5_are_put_back() -> None:
    new = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "hidden_size": 64}
    assert _hf_compat.config_for_4(new) == {
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "hidden_size": 64,
    }
    assert _hf_compat.config_for_4({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == {"rope_theta": 1e6}
    assert _hf_compat.config_for_4({"text_config": {"dtype": "float16"}}) == {"text_config": {"torch_dtype": "float16"}}


def test_what_stands_in_the_old_names_stays() -> None:
    old = {"torch_dtype": "float16", "rope_theta": 1e4, "rope_scaling": None}
    assert _hf_compat.config_for_4(old) == old
    both = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.5}}
    assert _hf_compat.config_for_4(both) == {"rope_theta": 1e4, "partial_rotary_factor": 0.5}


def test_rope_settings_per_kind_of_layer_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="kinds of layers"):
        _hf_compat.config_for_4({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})


def test_a_models_own_cache_is_asked_for() -> None:
    own = SimpleNamespace(croppable=False)
    assert _hf_compat.new_cache(SimpleNamespace(new_cache=lambda: own)) is own
    assert _hf_compat.can_crop(own) is False and _hf_compat.can_crop(SimpleNamespace(croppable=True)) is True


# --- around the packages ------------------------------------------------------------------------------------------


def test_the_packages_log_is_read() -> None:
    assert parse_place("Quantizing self_attn.q_proj in layer 3/32...") == (3, 32, "self_attn.q_proj")
    assert parse_loss("avg loss: 0.0125") == 0.0125
    for line in ("Start quantizing layer 1/2", "duration: 0.5", "Quantizing x in layer a/b...", "avg loss: none", ""):
        assert parse_place(line) is None and parse_loss(line) is None


def test_what_is_replaced_comes_back_even_after_an_error() -> None:
    module = ModuleType("m")
    module.name = "old"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError), replaced(module, name="new"):
        assert module.name == "new"
        raise RuntimeError
    assert module.name == "old"


def test_gptqmodel_gets_settings_without_the_keys_it_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "mödel"
    folder.mkdir()
    inner = {"bits": 4, "quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": inner}), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    with plain_settings(folder) as same:
        assert same == folder
    (folder / "quantize_config.json").write_text(json.dumps({**inner, "is_marlin_format": False}), encoding="utf-8")
    assert json.loads(without_refused(folder / "quantize_config.json") or "") == inner
    with plain_settings(folder) as view:
        assert view != folder and view.name == folder.name
        assert json.loads((view / "quantize_config.json").read_text(encoding="utf-8")) == inner
        assert (view / "model.safetensors").read_bytes() == b"weights"
    assert not view.exists() and (folder / "model.safetensors").exists()


# --- the quantiser's engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"method": "rtn"}, {"mse": True}])
def test_what_auto_gptq_can_not_do_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_settings(QuantizeSettings(engine="auto-gptq", **values))
    assert caught.value.param == "engine"
    with pytest.raises(InvalidParameter, match="engine"):
        check_settings(QuantizeSettings(engine="other"))


def test_results_of_the_two_engines_have_names_of_their_own(tmp_path: Path) -> None:
    names = {default_out(tmp_path / "m", QuantizeSettings(engine=engine)).name for engine in ("switchyard", "auto-gptq")}
    assert names == {"m-GPTQ-4bit-128g", "m-AutoGPTQ-4bit-128g"}


def test_without_its_environment_it_says_what_to_install(tmp_path: Path) -> None:
    import asyncio

    job = QuantizeJob(tmp_path, tmp_path / "out", QuantizeSettings(engine="auto-gptq"))
    with pytest.raises(BackendUnavailable) as caught:
        asyncio.run(quantize(job, lambda _: None, Overlays(tmp_path / "set", ROOT)))
    assert "install autogptq" in (caught.value.hint or "")


def test_an_environment_that_needs_cuda_is_of_no_use_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = EnvSpec("e", tmp_path / "e.txt", "E", needs="cuda")
    monkeypatch.setattr("modules.overlays.nvidia_present", lambda: False)
    assert spec.problem() == "needs an NVIDIA GPU with CUDA; none was found here."
    monkeypatch.setattr("modules.overlays.nvidia_present", lambda: True)
    assert spec.problem() is None and EnvSpec("e", tmp_path / "e.txt", "E").problem() is None


# --- on real tensors ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not overlays.has_module("autogptq", "auto_gptq"):
        pytest.skip("auto-gptq is not in the autogptq environment: it has wheels for Python 3.10 and 3.11 on x86-64 only")
    with run_lab(overlays, "autogptq", "autogptq_lab.py", tmp_path_factory.mktemp("lab mödel")) as run:
        yield run


def test_both_kernels_give_the_dequantised_weights_logits(lab: Lab) -> None:
    found = lab("bundled")
    assert found["ours"] < 1e-4 and found["package"] < 1e-4 and found["same_greedy"]
    assert found["package_layers_left"] == 0 and found["package_layers_from"] == ["auto_gptq"]
    assert all(engine.startswith("auto-gptq 0.7.1") for engine in found["engines"]) and "package" in found["engines"][1]
    assert any("slow" in note for note in found["notes"])


def test_files_of_transformers_5_load_the_same(lab: Lab) -> None:
    found = lab("newer_files")
    assert found["same"] and found["template"] and found["eos"][0] == found["eos"][1]


def test_quantising_through_the_package(lab: Lab) -> None:
    for row in lab("quantised"):
        assert row["layers"] == [14, 14, 14], row["case"]
        assert row["fractions"] == sorted(row["fractions"]) and row["fractions"][-1] == 1.0
        assert all(loss >= 0 for loss in row["losses"]) and any(row["losses"])
        assert row["ours"] < 1e-4 and row["package"] < 2e-3, row
        assert row["quantizer"] == ["auto_gptq:0.7.1"]
        assert {"config.json", "quantize_config.json", "model.safetensors", "tokenizer.json"} <= set(row["files"])
        assert row["left"] == []
    assert [row["quantization"] for row in lab("quantised")] == [
        [4, 32, False, True], [3, 32, True, False], [8, -1, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case,kind,says",
    [
        ("two widths", "IncompatibleModel", "4 and 8 bits"),
        ("no norm", "CorruptModel", "model.norm.weight"),
        ("no zeros", "CorruptModel", "qzeros"),
        ("v2 by the package", "IncompatibleModel", "gptq_v2"),
        ("marlin", "IncompatibleModel", "Marlin"),
        ("architecture", "IncompatibleModel", "stablelm"),
        ("nothing", "CorruptModel", "no config.json"),
    ],
)
def test_refusals_are_typed(lab: Lab, case: str, kind: str, says: str) -> None:
    found, message, hint = lab("refusals")[case]
    assert found == kind and says in message and hint, (found, message)

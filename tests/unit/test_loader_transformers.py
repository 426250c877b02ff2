"""The Transformers loader without Transformers: its mapping, the checks before loading, the reading of errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from loaders import _hf_load
from loaders._hf_contrast import MOST_CANDIDATES, settings
from loaders._lora import lora_weights
from loaders.transformers import SPEC, TransformersEngine
from modules import sampling
from modules.errors import CorruptModel, IncompatibleModel, InvalidParameter, LoadError, LoadOutOfMemory, UnsafeModel
from modules.load_options import complete_options

if TYPE_CHECKING:
    from pathlib import Path


def native(**values: Any) -> dict[str, Any]:
    return TransformersEngine.to_native(sampling.check(values))


def test_samplers_go_to_the_chain() -> None:
    made = native(temperature=0.7, top_p=0.9, dry_multiplier=0.8, num_beams=1, length_penalty=2.0)
    assert made == {"sampler": {"temperature": 0.7, "top_p": 0.9, "dry_multiplier": 0.8}, "ignored": {}}


def test_beams_go_to_generate_and_samplers_are_reported() -> None:
    made = native(num_beams=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3, temperature=0.7, seed=3)
    assert made["generate"] == {
        "num_beams": 4,
        "do_sample": False,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
    }
    assert set(made["ignored"]) == {"temperature"}


def test_contrastive_search_says_what_it_leaves_aside() -> None:
    chosen, left, ignored = settings(
        sampling.check({"penalty_alpha": 0.6, "top_k": 4, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2})
    )
    assert chosen == (0.6, 4) and left == {"repetition_penalty": 1.2, "temperature": 0.0}
    assert set(ignored) == {"temperature", "top_p"} and all(ignored.values())
    assert settings(sampling.check({"penalty_alpha": 0.6, "top_k": 1000}))[0] == (0.6, MOST_CANDIDATES)
    for few in ({}, {"top_k": 1}, {"top_k": 0}):
        chosen, left, ignored = settings(sampling.check({"penalty_alpha": 0.6, **few}))
        assert chosen is None and "top_k" in ignored["penalty_alpha"]
    assert settings({"top_k": 4}) == (None, {"top_k": 4}, {})


def test_every_parameter_is_honoured_or_reported() -> None:
    """No active parameter may vanish: it is in the chain's or generate's arguments, or ignored with a reason."""
    for parameter in sampling.PARAMETERS.values():
        value = {"float": parameter.maximum, "int": 2, "bool": not parameter.neutral, "bias": {"1": 2.0}}.get(parameter.kind)
        if value is None or not sampling.active({parameter.name: value}):
            continue
        made = native(**{parameter.name: value})
        taken = made.get("sampler", {}) | made.get("generate", {})
        assert parameter.name in taken or parameter.name in made["ignored"], parameter.name


def test_options_take_the_names_people_know() -> None:
    options = complete_options(SPEC, {"n_ctx": 1024, "load-in-4bit": True, "lora": ["a"]})
    assert options["ctx_size"] == 1024 and options["load_in_4bit"] is True and options["lora"] == ["a"]


@pytest.mark.parametrize(
    ("gpu", "cpu", "gpus", "expected"),
    [
        ("", 0, 1, {}),
        ("10, 8.5", 0, 2, {0: 10 << 30, 1: 17 << 29}),
        ("10,8", 4, 1, {0: 10 << 30, "cpu": 4 << 30}),
        ("", 2, 1, {0: 1 << 40, "cpu": 2 << 30}),
        ("10", 2, 0, {"cpu": 2 << 30}),
    ],
)
def test_memory_limits(gpu: str, cpu: float, gpus: int, expected: dict[Any, int]) -> None:
    assert _hf_load.max_memory(gpu, cpu, gpus) == expected


def test_memory_limits_are_numbers() -> None:
    with pytest.raises(InvalidParameter, match="gpu_memory"):
        _hf_load.max_memory("10GiB", 0, 1)


def test_lora_weights() -> None:
    two = {"lora": ["a", "b"]}
    assert lora_weights(two | {"lora_weights": ""}) == [1.0, 1.0]
    assert lora_weights(two | {"lora_scale": "1, 0.5"}, "lora_scale") == [1.0, 0.5]
    for bad in ("1", "1,2,3", "one,two"):
        with pytest.raises(InvalidParameter, match=r"lora_weights|adapters"):
            lora_weights(two | {"lora_weights": bad})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes every check before loading."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_a_good_folder_passes(folder: Path) -> None:
    assert _hf_load.check_folder(folder) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("remove", "error", "match"),
    [
        ("config.json", CorruptModel, "config.json"),
        ("model.safetensors", CorruptModel, "safetensors"),
        ("tokenizer.json", CorruptModel, "tokenizer"),
    ],
)
def test_a_missing_file_is_named(folder: Path, remove: str, error: type[LoadError], match: str) -> None:
    (folder / remove).unlink()
    with pytest.raises(error, match=match) as caught:
        _hf_load.check_folder(folder)
    assert caught.value.hint


def test_pickles_only_is_unsafe(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeModel, match="pickles"):
        _hf_load.check_folder(folder)


def test_remote_code_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}), encoding="utf-8")
    with pytest.raises(UnsafeModel, match="auto_map"):
        _hf_load.check_folder(folder)


@pytest.mark.parametrize("content", ["[]", "{", "nothing"])
def test_config_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorruptModel):
        _hf_load.check_folder(folder)


def test_report_of_a_full_load_passes() -> None:
    _hf_load.check_report({"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"x"}})


def test_first_mismatching_tensor_is_named() -> None:
    report = {"mismatched_keys": {("layers.1.w", (3, 2), (2, 2)), ("layers.0.w", (4, 2), (2, 2))}}
    with pytest.raises(CorruptModel, match=r"layers\.0\.w has the shape \[4, 2\], config\.json wants \[2, 2\] \(2 tensors"):
        _hf_load.check_report(report)


def test_missing_tensors_are_an_error() -> None:
    with pytest.raises(CorruptModel, match=r"2 tensors are missing, the first is a\.w"):
        _hf_load.check_report({"missing_keys": {"b.w", "a.w"}})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), LoadOutOfMemory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), LoadOutOfMemory),
        (RuntimeError("CUDA error: out of memory"), LoadOutOfMemory),
        (
            ValueError("The checkpoint has model type `xyz` but Transformers does not recognize this architecture."),
            IncompatibleModel,
        ),
        (ValueError("Unrecognized configuration class <class 'BertConfig'> for this kind of AutoModel"), IncompatibleModel),
        (KeyError("hidden_size"), CorruptModel),
        (OSError("something else"), LoadError),
    ],
)
def test_errors_are_typed(error: Exception, expected: type[LoadError]) -> None:
    typed = _hf_load.typed(error, {"model_type": "xyz"}, "The file is odd")
    assert type(typed) is expected
    assert typed.hint


class _Tokenizer:
    eos_token_id = 2
    unk_token_id = 0
    chat_template: Any = "{{ m }}<|im_end|>"

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|im_end|>": 7}.get(token, 0)


def test_end_tokens_come_from_config_tokenizer_and_template() -> None:
    tokenizer = _Tokenizer()
    assert _hf_load.end_token_ids([5, 6], tokenizer) == {2, 5, 6, 7}
    tokenizer.chat_template = {"tool_use": "x", "default": "y"}
    assert _hf_load.end_token_ids(5, tokenizer) == {2, 5}
    assert _hf_load.chat_template(tokenizer) == "y"
    assert _hf_load.end_token_ids(None, tokenizer) == {2}

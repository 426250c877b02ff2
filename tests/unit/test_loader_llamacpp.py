"""The llama.cpp loader without llama.cpp: its mapping, the struct layout check, the reading of its log."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from loaders import _llama_capi as capi
from loaders import _llama_load as load
from loaders.llamacpp import SPEC, to_native
from modules import sampling
from modules.errors import BackendUnavailable, CorruptModel, IncompatibleModel, InvalidParameter, LoadError, LoadOutOfMemory
from modules.load_options import complete_options


def native(grammar: bool = False, **values: Any) -> dict[str, Any]:
    return to_native(sampling.check(values), grammar=grammar)


def names(made: dict[str, Any]) -> list[str]:
    return [name for name, _ in made["samplers"]]


def test_neutral_is_one_draw() -> None:
    assert native() == {"samplers": [("dist", {})], "applied": {}, "ignored": {}, "ours": False}


def test_greedy_drops_what_only_chooses_and_says_so() -> None:
    made = native(temperature=0, top_k=5, repetition_penalty=1.1)
    assert names(made) == ["penalties", "greedy"]
    assert set(made["ignored"]) == {"top_k"}
    assert made["applied"] == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_default_order_and_one_penalties_sampler() -> None:
    made = native(
        min_p=0.1, top_k=5, temperature=0.7, presence_penalty=0.5, repetition_penalty=1.1, dry_multiplier=0.8, xtc_probability=0.5
    )
    assert names(made) == ["penalties", "dry", "temp", "top_k", "min_p", "xtc", "dist"]
    assert made["samplers"][0][1] == {"last_n": 0, "repeat": 1.1, "presence": 0.5, "frequency": 0.0}


def test_order_can_be_chosen() -> None:
    made = native(min_p=0.1, top_k=5, temperature=0.7, sampler_priority=["min_p", "top_k"])
    assert names(made) == ["min_p", "top_k", "temp", "dist"]
    assert names(native(min_p=0.1, temperature=0.7, temperature_last=True)) == ["min_p", "temp", "dist"]


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_picks_and_so_comes_last(mode: int) -> None:
    made = native(mirostat_mode=mode, mirostat_tau=4.0, xtc_probability=0.5)
    assert names(made) == ["xtc", f"mirostat_{mode}"]
    assert made["samplers"][-1][1] == {"tau": 4.0, "eta": 0.1}


def test_adaptive_p_goes_before_mirostat() -> None:
    made = native(adaptive_target=0.3, mirostat_mode=2)
    assert names(made) == ["adaptive_p"]
    assert set(made["ignored"]) == {"mirostat_mode"}


def test_dynamic_temperature_is_a_middle_and_a_half_width() -> None:
    made = native(dynamic_temperature=True, dynatemp_low=0.5, dynatemp_high=2.0, temperature=0.7)
    assert made["samplers"][0] == ("temp_ext", {"t": 1.25, "delta": 0.75, "exponent": 1.0})
    assert set(made["ignored"]) == {"temperature"}


def test_bias_and_ban_are_one_sampler_in_front() -> None:
    made = native(logit_bias={"5": -100}, ban_eos_token=True, top_k=3)
    assert made["samplers"][0] == ("logit_bias", {"bias": {"5": -100.0}, "ban_ends": True})
    with_grammar = native(grammar=True, ban_eos_token=True)
    assert "ban_eos_token" in with_grammar["ignored"] and names(with_grammar) == ["dist"]


@pytest.mark.parametrize("name,value", [("tfs", 0.9), ("smoothing_factor", 0.3), ("no_repeat_ngram_size", 3), ("top_a", 0.2)])
def test_what_llama_cpp_lacks_is_sampled_by_ours(name: str, value: float) -> None:
    assert native(**{name: value})["ours"] is True


def test_every_parameter_is_honoured_or_reported() -> None:
    for parameter in sampling.PARAMETERS.values():
        value = {"float": parameter.maximum, "int": 2, "bool": not parameter.neutral, "bias": {"1": 2.0}}.get(parameter.kind)
        if value is None or parameter.name == "seed" or not sampling.active({parameter.name: value}):
            continue
        made = native(**{parameter.name: value})
        assert made["ours"] or parameter.name in made["applied"] or parameter.name in made["ignored"], parameter.name


def test_options_take_the_names_people_know() -> None:
    options = complete_options(SPEC, {"n-gpu-layers": 20, "n_ctx": 4096, "n_batch": 64})
    assert (options["gpu_layers"], options["ctx_size"], options["batch_size"]) == (20, 4096, 64)


# --- layout -------------------------------------------------------------------------------------------------------


def defaults(flags_at: int = 128) -> tuple[capi.Params, capi.Params]:
    """What a library's *_default_params give, with the context's flags at one place."""
    model, context = capi.Params(), capi.Params()
    for name, value in capi._EXPECTED_MODEL.items():
        model.set(*capi.MODEL[name], value)
    for name, value in capi._EXPECTED_CONTEXT.items():
        context.set(*capi.CONTEXT[name], value)
    for index, flag in enumerate(capi._FLAG_DEFAULTS):
        context.raw[flags_at + index] = flag
    return model, context


@pytest.mark.parametrize("at", [128, 136])
def test_flags_are_found_where_this_version_has_them(at: int) -> None:
    fields = capi.check_layout(*defaults(at))
    assert fields["offload_kqv"] == ("?", at + 1) and fields["kv_unified"] == ("?", at + 5)


def test_a_moved_field_is_refused() -> None:
    model, context = defaults()
    model.set("i", 16, 7)
    with pytest.raises(capi.NoLlamaLibrary, match="n_gpu_layers defaults to 7"):
        capi.check_layout(model, context)


def test_flags_that_are_nowhere_or_twice_are_refused() -> None:
    model, context = defaults()
    for index, flag in enumerate(capi._FLAG_DEFAULTS):
        context.raw[152 + index] = flag
    with pytest.raises(capi.NoLlamaLibrary, match="flags"):
        capi.check_layout(model, context)
    model, context = defaults(flags_at=300)
    with pytest.raises(capi.NoLlamaLibrary, match="flags"):
        capi.check_layout(model, context)


def test_fields_are_written_where_they_stand() -> None:
    params = capi.Params()
    params.set("f", 56, 0.5)
    assert struct.unpack_from("<f", bytes(params.raw), 56)[0] == 0.5
    assert params.get("f", 56) == 0.5


class _OldLibrary:
    """A library whose penalties sampler looks back over more than it was told."""

    def __init__(self, window: int) -> None:
        self.window, self.seen = window, []

    def llama_sampler_init_penalties(self, *_: Any) -> int:
        return 1

    def llama_sampler_accept(self, _: int, token: int) -> None:
        self.seen.append(token)

    def llama_sampler_apply(self, _: int, array: Any) -> None:
        records = ctypes.cast(array._obj.data, ctypes.POINTER(capi.TokenData))
        for token in self.seen[-self.window :]:
            records[token].logit /= 2

    def llama_sampler_free(self, _: int) -> None:
        pass


@pytest.mark.parametrize("window,agrees", [(1, True), (2, False)])
def test_another_penalties_interface_is_noticed(window: int, agrees: bool) -> None:
    assert capi.penalties_agree(_OldLibrary(window)) is agrees


def test_no_library_names_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(engine: str) -> Any:
        raise capi.NoLlamaLibrary(f"no {engine} here")

    monkeypatch.setattr(capi, "library_path", none)
    with pytest.raises(BackendUnavailable, match=r"llama_cpp: no llama_cpp here; xllamacpp: no xllamacpp here"):
        capi.open_library("auto")
    with pytest.raises(BackendUnavailable) as caught:
        capi.open_library("xllamacpp")
    assert "llama_cpp:" not in caught.value.message and caught.value.hint


# --- options and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no_mmap", "mlock", "expected"), [(False, False, 1), (True, False, 0), (True, True, 2), (False, True, 3)]
)
def test_load_mode(no_mmap: bool, mlock: bool, expected: int) -> None:
    assert load.load_mode(no_mmap, mlock) == expected


def test_tensor_split() -> None:
    assert load.tensor_split("", 4) == []
    assert load.tensor_split("60, 40", 4) == [60.0, 40.0, 0.0, 0.0]
    for bad in ("a,b", "1,2,3", "-1"):
        with pytest.raises(InvalidParameter):
            load.tensor_split(bad, 2)


@pytest.mark.parametrize(
    ("line", "expected", "said"),
    [
        ("llama_model_load: error loading model: unknown model architecture: 'zzz'", IncompatibleModel, "'zzz'"),
        (
            "llama_model_load: error loading model: error loading model vocabulary: unknown pre-tokenizer type: 'q'",
            IncompatibleModel,
            "'q'",
        ),
        (
            "llama_model_load: error loading model: tensor 'blk.0.attn_q.weight' has wrong shape; expected 64, 64, got 64, 65",
            CorruptModel,
            "blk.0.attn_q.weight",
        ),
        ("llama_model_load: error loading model: unable to allocate CPU buffer", LoadOutOfMemory, "memory"),
        ("gguf_init_from_file: invalid magic characters", CorruptModel, "invalid magic"),
    ],
)
def test_the_log_explains_a_failed_load(line: str, expected: type[LoadError], said: str) -> None:
    error = load.load_error([line, "llama_model_load_from_file_impl: failed to load model"])
    assert type(error) is expected
    assert said in error.message and error.hint


def test_an_empty_log_still_makes_a_sentence() -> None:
    assert "it gave no reason" in load.load_error([]).message


def test_log_keeps_warnings_and_drops_chatter(capsys: pytest.CaptureFixture[str]) -> None:
    log = load.Log()
    log._take(2, b"loading tensors\n", None)
    log._take(5, b"... still\n", None)
    log._take(4, b"f: it broke\n", None)
    log._take(5, b"and went on\n", None)
    assert list(log.lines) == ["f: it broke", "and went on"]
    assert capsys.readouterr().err == "f: it broke\nand went on\n"

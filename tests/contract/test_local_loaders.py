"""What the loaders that compute here must do beyond the contract: prefix cache, every sampler, grammars, adapters, bad files."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest

from modules import sampling
from modules.errors import (
    CorruptModel,
    IncompatibleModel,
    InvalidGrammar,
    InvalidParameter,
    LoadError,
    UnsafeModel,
    UnsupportedParameter,
)
from modules.schema import LoadProgress, PrefillProgress, StopParams
from tests.contract.conftest import Answer, Bench
from tests.contract.gguf_file import write_gguf
from tests.contract.rows import ROWS, STORY, Row

LOCAL = tuple(row for row in ROWS if row.loader in ("transformers", "llamacpp"))
LONG = StopParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module", params=LOCAL, ids=lambda row: row.id)
def row(request: pytest.FixtureRequest, overlays: Any) -> Row:
    reason = request.param.skip_reason(overlays)
    if reason:
        pytest.skip(reason)
    row: Row = request.param
    return row


def needs(bench: Bench, feature: str) -> None:
    if feature in bench.row.lacks:
        pytest.skip(f"this build lacks {feature}")


def model_path(bench: Bench) -> Path:
    path = bench.row.model()
    assert isinstance(path, Path)
    return path


# --- prefix cache -------------------------------------------------------------------------------------------------


def test_the_next_turn_reuses_the_prefix_and_changes_nothing(bench: Bench) -> None:
    first = bench.generate(STORY, stop=LONG)
    second = STORY + first.text + " And then"
    warm = bench.generate(second, stop=LONG)
    assert warm.end.usage.cached_tokens >= len(bench.run(bench.client.encode(STORY, add_special=True)))
    bench.generate("The dog", stop=StopParams(max_tokens=2))  # puts another text into the cache
    cold = bench.generate(second, stop=LONG)
    assert cold.end.usage.cached_tokens < warm.end.usage.cached_tokens
    assert cold.text == warm.text


def test_the_same_prompt_again_computes_one_token(bench: Bench) -> None:
    bench.generate(STORY, stop=LONG)
    usage = bench.generate(STORY, stop=LONG).end.usage
    assert usage.cached_tokens == usage.prompt_tokens - 1


def test_prefill_comes_in_steps_and_can_be_aborted(fresh: Bench) -> None:
    option = "prefill_chunk" if fresh.row.loader == "transformers" else "batch_size"
    fresh.load(**{option: 16})
    prompt = STORY + " there was a little dog." * 20
    request = fresh.request(prompt, stop=StopParams(max_tokens=400, ignore_eos=True))  # the abort may come late

    async def abort_early() -> Answer:
        answer = Answer()
        async for event in fresh.client.generate(request):
            if isinstance(event, PrefillProgress):
                answer.prefill.append(event)
                await fresh.client.abort(request.request_id)
            elif hasattr(event, "finish_reason"):
                answer.done = event
            else:
                answer.tokens.append(event)
        return answer

    aborted = fresh.run(abort_early())
    assert aborted.end.finish_reason == "cancelled"
    whole = fresh.generate(prompt, stop=LONG)
    steps = [event.done for event in whole.prefill]
    assert steps == sorted(steps) and steps[-1] == whole.prefill[-1].total == whole.end.usage.prompt_tokens
    assert fresh.generate(prompt, stop=LONG).text == whole.text


# --- samplers -----------------------------------------------------------------------------------------------------

ACTIVE: dict[str, Any] = {
    "temperature": 0.8, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
    "presence_penalty": 0.3, "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "dry_multiplier": 0.8,
    "top_n_sigma": 1.0, "typical_p": 0.7, "tfs": 0.8, "top_a": 0.2, "epsilon_cutoff": 5.0, "eta_cutoff": 5.0,
    "xtc_probability": 0.5, "dynamic_temperature": True, "smoothing_factor": 0.3, "mirostat_mode": 2, "adaptive_target": 0.3,
    "ban_eos_token": True, "logit_bias": {"5": -5.0},
}  # fmt: skip
NOT_IN_SERVER = {"encoder_repetition_penalty", "no_repeat_ngram_size", "tfs", "top_a", "epsilon_cutoff", "eta_cutoff"} | {
    "smoothing_factor"
}


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_every_sampler_runs_alone_and_repeats(bench: Bench, name: str) -> None:
    if name in NOT_IN_SERVER:
        needs(bench, "all_samplers")
    assert name in bench.spec.samplers
    values = sampling.check({name: ACTIVE[name], "seed": 11})
    first, second = (bench.generate(STORY, sampling=values, stop=LONG) for _ in range(2))
    assert first.text == second.text
    assert name in first.end.applied and not first.end.ignored


def test_all_samplers_at_once(bench: Bench) -> None:
    needs(bench, "all_samplers")
    values = sampling.check(ACTIVE | {"seed": 3, "dynatemp_low": 0.5, "dynatemp_high": 1.5})
    answer = bench.generate(STORY, sampling=values, stop=LONG)
    assert len(answer.ids) == 40
    assert set(answer.end.applied) | set(answer.end.ignored) >= set(ACTIVE)


def test_no_repeat_ngram_holds(bench: Bench) -> None:
    needs(bench, "all_samplers")
    values = sampling.check({"temperature": 0, "no_repeat_ngram_size": 2})
    answer = bench.generate(STORY, sampling=values, stop=StopParams(max_tokens=120, ignore_eos=True))
    ids = bench.run(bench.client.encode(STORY, add_special=True)) + answer.ids
    pairs = list(itertools.pairwise(ids))
    assert len(pairs) == len(set(pairs))


def test_a_bias_forces_a_token(bench: Bench) -> None:
    ids = bench.generate(STORY, stop=StopParams(max_tokens=1, ignore_eos=True)).ids
    other = next(i for i in range(20, 60) if i not in ids)
    values = sampling.check({"temperature": 0, "logit_bias": {str(other): 100}})
    assert bench.generate(STORY, sampling=values, stop=StopParams(max_tokens=3, ignore_eos=True)).ids == [other] * 3


@pytest.mark.rows(loader="transformers")
def test_beams(bench: Bench) -> None:
    answer = bench.generate(STORY, sampling=sampling.check({"num_beams": 3, "temperature": 0.5}), stop=LONG)
    assert len(answer.ids) == 40 and answer.end.applied["num_beams"] == 3
    assert set(answer.end.ignored) == {"temperature"}
    scores = {}
    for name, ids in (("beams", answer.ids), ("greedy", bench.generate(STORY, stop=LONG).ids)):
        prompt = bench.run(bench.client.encode(STORY, add_special=True))
        scores[name] = sum(bench.run(bench.client.score(prompt + ids)))
    assert scores["beams"] >= scores["greedy"] - 1e-3, "a wider search finds no less likely text"


# --- echo, grammar ------------------------------------------------------------------------------------------------


def test_echo_gives_the_prompt_with_its_logprobs(bench: Bench) -> None:
    needs(bench, "echo")
    answer = bench.generate(STORY, echo=True, logprobs=0, stop=StopParams(max_tokens=3, ignore_eos=True))
    plain = bench.generate(STORY, logprobs=0, stop=StopParams(max_tokens=3, ignore_eos=True))
    prompt_ids = bench.run(bench.client.encode(STORY, add_special=True))
    assert list(answer.tokens[0].token_ids) == prompt_ids and answer.tokens[0].text == STORY
    expected = bench.run(bench.client.score(prompt_ids))
    assert [lp.logprob for lp in answer.tokens[0].logprobs[1:]] == pytest.approx(expected, abs=1e-3)
    assert answer.ids[len(prompt_ids) :] == plain.ids


def test_logprobs_agree_with_scores(bench: Bench) -> None:
    needs(bench, "score")
    answer = bench.generate(STORY, logprobs=0, stop=StopParams(max_tokens=6, ignore_eos=True))
    prompt_ids = bench.run(bench.client.encode(STORY, add_special=True))
    scores = bench.run(bench.client.score(prompt_ids + answer.ids))[len(prompt_ids) - 1 :]
    found = [lp.logprob for event in answer.tokens for lp in event.logprobs]
    assert found == pytest.approx(scores, abs=2e-3)


@pytest.mark.parametrize(
    "values", [{"seed": 1}, {"temperature": 0}, {"seed": 1, "tfs": 0.9}, {"seed": 2, "repetition_penalty": 1.3}]
)
def test_grammar(bench: Bench, values: dict[str, Any]) -> None:
    needs(bench, "grammar")
    answer = bench.generate(STORY, grammar='root ::= ("yes" | "no") ("!" | " 你好")', sampling=sampling.check(values))
    assert answer.text in {"yes!", "no!", "yes 你好", "no 你好"}
    assert answer.end.finish_reason == "stop"


def test_pattern(bench: Bench) -> None:
    needs(bench, "regex")
    for seed in range(3):
        answer = bench.generate(STORY, regex=r"(Lily|Tim) is [1-9]\.", sampling={"seed": seed})
        assert re.fullmatch(r"(Lily|Tim) is [1-9]\.", answer.text)
        assert answer.end.finish_reason == "stop"


def test_bad_grammar_is_typed(bench: Bench) -> None:
    needs(bench, "grammar")
    for grammar in ("root ::= (", "start ::= 'x'", ""):
        with pytest.raises(InvalidGrammar):
            bench.generate(STORY, grammar=grammar)
    assert bench.generate(STORY).text


TOYS = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Lily", "Tim"]}, "age": {"type": "integer"}, "toys": TOYS},
    "required": ["name", "age", "toys"],
}


@pytest.mark.parametrize("seed", range(4))
def test_json_schema(bench: Bench, seed: int) -> None:
    needs(bench, "json_schema")
    answer = bench.generate(
        "JSON:", json_schema=SCHEMA, sampling={"temperature": 0.7, "seed": seed, "top_k": 40}, stop=StopParams(max_tokens=200)
    )
    assert answer.end.finish_reason == "stop"
    value = json.loads(answer.text)
    assert value["name"] in ("Lily", "Tim") and isinstance(value["age"], int) and len(value["toys"]) <= 2


@pytest.mark.rows(loader="transformers")
def test_beams_and_a_form_are_refused_together(bench: Bench) -> None:
    with pytest.raises(UnsupportedParameter):
        bench.generate(STORY, grammar='root ::= "yes"', sampling={"num_beams": 2})


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"seed": 3, "temperature": 0.9}])
def test_drafts_from_the_prompt_change_nothing(bench: Bench, values: dict[str, Any]) -> None:
    if "prompt_lookup_num_tokens" not in bench.spec.samplers:
        pytest.skip(f"{bench.spec.title} makes no drafts")
    plain = bench.generate(STORY * 3, sampling=values, stop=LONG)
    drafted = bench.generate(STORY * 3, sampling={**values, "prompt_lookup_num_tokens": 5}, stop=LONG)
    assert drafted.ids == plain.ids
    assert drafted.end.applied["prompt_lookup_num_tokens"] == 5
    assert bench.generate(STORY * 3, sampling=values, stop=LONG).ids == plain.ids  # and the cache is left as it should be


def test_guidance_leads_away_from_the_negative_prompt(bench: Bench) -> None:
    if "guidance_scale" not in bench.spec.samplers:
        pytest.skip(f"{bench.spec.title} has no guidance")
    needs(bench, "guidance")
    greedy = {"temperature": 0.0}
    plain = bench.generate(STORY, sampling=greedy, stop=LONG)
    same = bench.generate(
        STORY, sampling={**greedy, "guidance_scale": 2.0, "negative_prompt": STORY}, stop=StopParams(max_tokens=1)
    )
    assert same.ids == plain.ids[:1]  # both prompts alike: nothing to lead away from
    away = bench.generate(STORY, sampling={**greedy, "guidance_scale": 3.0, "negative_prompt": "The dog barked"}, stop=LONG)
    assert away.ids != plain.ids
    assert away.end.applied["guidance_scale"] == 3.0


def test_token_ids_outside_the_vocabulary(bench: Bench) -> None:
    for bad in (-1, 10**8):
        with pytest.raises(InvalidParameter):
            bench.generate(None, token_ids=(1, bad))
    assert bench.generate(STORY).text


# --- same model, two loaders --------------------------------------------------------------------------------------


@pytest.mark.rows(model="stories")
@pytest.mark.shared
def test_hf_and_gguf_give_the_same_greedy_text(bench: Bench, shared: Path) -> None:
    text = bench.generate(STORY, stop=StopParams(max_tokens=60)).text
    assert text == (
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
        "She wanted to play with it, but it was too high.\nLily"
    )


# --- embeddings, progress -----------------------------------------------------------------------------------------


def test_embeddings(bench: Bench) -> None:
    needs(bench, "embeddings")

    def embed(text: str) -> list[float]:
        return list(bench.run(bench.client.embed(bench.run(bench.client.encode(text, add_special=True)))))

    def likeness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    dog, again, puppy, law = map(embed, ("The dog ran home.", "The dog ran home.", "The dog ran to the park.", "Sum 4 + 4."))
    assert dog == again and likeness(dog, dog) == pytest.approx(1.0, abs=1e-4)
    assert likeness(dog, puppy) > likeness(dog, law)


def test_loading_tells_how_far_it_is(fresh: Bench) -> None:
    seen: list[LoadProgress] = []
    fresh.run(fresh.client.load(str(model_path(fresh)), fresh.options(), seen.append))
    assert all(event.stage for event in seen)
    reading = [event.fraction for event in seen if event.stage == "Reading weights" and event.fraction is not None]
    if "server" not in fresh.row.id:
        assert len(reading) > 2 and reading == sorted(reading) and reading[-1] > 0.8


# --- load options -------------------------------------------------------------------------------------------------


@pytest.mark.rows(loader="llamacpp")
@pytest.mark.parametrize(
    "options",
    [
        {"cache_type_k": "bf16", "cache_type_v": "f32", "flash_attn": "on"},
        {"no_mmap": True, "mlock": True, "threads": 1, "threads_batch": 1, "ubatch_size": 8, "batch_size": 8},
        {"rope_freq_base": 20000.0, "rope_freq_scale": 0.5, "rope_scaling": "linear"},
        {"gpu_layers": 0, "split_mode": "none", "numa": "distribute", "no_kv_offload": True, "check_tensors": True},
    ],
    ids=str,
)
def test_llamacpp_options(fresh: Bench, options: dict[str, Any]) -> None:
    fresh.load(**options)
    assert len(fresh.generate(STORY, stop=LONG).ids) == 40


@pytest.mark.rows(loader="llamacpp", model="stories")  # heads smaller than a quantisation block
def test_a_context_that_cannot_be_made_is_typed(fresh: Bench) -> None:
    with pytest.raises(IncompatibleModel, match="input params" if "server" in fresh.row.id else "q8_0"):
        fresh.load(cache_type_k="q8_0")
    fresh.load()
    assert fresh.generate(STORY).text


@pytest.mark.rows(loader="transformers")
@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "use_double_quant": True}, {"load_in_8bit": True}, {"dtype": "bfloat16"}], ids=str
)
def test_transformers_number_formats(fresh: Bench, options: dict[str, Any]) -> None:
    fresh.load(**options)
    assert fresh.client.info is not None
    quantization = fresh.client.info.quantization
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}.get(next(iter(options)))
    assert (quantization.bits if quantization else None) == bits
    assert len(fresh.generate(STORY, stop=LONG).ids) == 40


@pytest.mark.rows(loader="transformers")
def test_transformers_keeps_what_does_not_fit_on_disk(fresh: Bench, tmp_path: Path) -> None:
    fresh.load(cpu=True, cpu_memory=0.0005, disk=True, disk_cache_dir=str(tmp_path / "offload"))
    assert fresh.client.info is not None and "disk" in fresh.client.info.device_map
    assert fresh.generate(STORY, stop=StopParams(max_tokens=5, ignore_eos=True)).ids


# --- adapters -----------------------------------------------------------------------------------------------------


def _noise(count: int, scale: float) -> list[float]:
    rng = random.Random(5)
    return [rng.uniform(-scale, scale) for _ in range(count)]


@pytest.mark.rows(loader="llamacpp", model="stories")
def test_gguf_lora(fresh: Bench, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter ü.gguf"
    metadata: dict[str, str | float] = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    tensors = {
        "blk.0.attn_q.weight.lora_a": ((64, 4), _noise(256, 1)),
        "blk.0.attn_q.weight.lora_b": ((4, 64), _noise(256, 1)),
        "blk.2.attn_output.weight.lora_a": ((64, 4), _noise(256, 1)),
        "blk.2.attn_output.weight.lora_b": ((4, 64), _noise(256, 1)),
    }
    write_gguf(adapter, metadata | {"adapter.lora.alpha": 4.0}, tensors)
    fresh.load()
    base = fresh.generate(STORY, stop=LONG).text
    fresh.load(lora=[str(adapter)], lora_scale="0")
    assert fresh.generate(STORY, stop=LONG).text == base
    fresh.load(lora=[str(adapter)], lora_scale="2")
    assert fresh.generate(STORY, stop=LONG).text != base
    with pytest.raises(LoadError):
        fresh.load(lora=[str(model_path(fresh))])


def write_safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, (shape, values) in tensors.items():
        raw = array("f", values).tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode("utf-8")
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


@pytest.mark.rows(loader="transformers", model="stories")
def test_peft_lora(fresh: Bench, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter ü"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for layer in range(5):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = ((4, 64), _noise(256, 1))
        tensors[f"{prefix}.lora_B.weight"] = ((64, 4), _noise(256, 1))
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    fresh.load()
    base = fresh.generate(STORY, stop=LONG).text
    fresh.load(lora=[str(adapter), str(adapter)], lora_weights="0,0")
    assert fresh.generate(STORY, stop=LONG).text == base
    fresh.load(lora=[str(adapter)], lora_weights="2")
    assert fresh.generate(STORY, stop=LONG).text != base
    with pytest.raises(CorruptModel, match="no LoRA adapter"):
        fresh.load(lora=[str(model_path(fresh))])


# --- bad files ----------------------------------------------------------------------------------------------------


@pytest.mark.rows(loader="llamacpp")
def test_bad_gguf_files_are_typed_and_the_worker_lives(fresh: Bench, tmp_path: Path) -> None:
    good = model_path(fresh).read_bytes()
    bad = {
        "empty": b"",
        "page": b"<!DOCTYPE html><html>404</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "magic only": good[:4],
        "half header": good[:3000],
        "truncated": good[: len(good) * 2 // 3],
        "other architecture": good.replace(b"llama", b"lhama"),
        "random": random.Random(1).randbytes(5000),
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(LoadError) as caught:
            fresh.load(path)
        assert isinstance(caught.value, (CorruptModel, IncompatibleModel)), name
        assert caught.value.hint and "gave no reason" not in caught.value.message, name
    fresh.load()
    assert fresh.generate(STORY).text


@pytest.mark.rows(loader="transformers")
def test_bad_folders_are_typed_and_the_worker_lives(fresh: Bench, tmp_path: Path) -> None:
    source = model_path(fresh)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))

    def broken(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        return target

    def with_config(name: str, **changes: Any) -> Path:
        target = broken(name)
        (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return target

    truncated = broken("truncated")
    weights = next(truncated.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    no_tokenizer = broken("no tokenizer")
    for file in no_tokenizer.glob("tokenizer.*"):
        file.unlink()
    bad_tokenizer = broken("bad tokenizer")
    (bad_tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
    hidden = int(config["hidden_size"])
    cases: list[tuple[Path, type[LoadError], str]] = [
        (truncated, CorruptModel, ""),
        (no_tokenizer, CorruptModel, "tokenizer"),
        (bad_tokenizer, CorruptModel, "tokenizer"),
        (with_config("shape", hidden_size=2 * hidden, head_dim=hidden), CorruptModel, "has the shape"),
        (with_config("layers", num_hidden_layers=config["num_hidden_layers"] + 1), CorruptModel, "missing"),
        (with_config("architecture", model_type="lhama", architectures=["Lhama"]), IncompatibleModel, "lhama"),
        (with_config("no text", model_type="vit", architectures=["ViTModel"]), IncompatibleModel, "vit"),
        (with_config("code", auto_map={"AutoModelForCausalLM": "modeling.Evil"}), UnsafeModel, "auto_map"),
    ]
    for path, error, said in cases:
        with pytest.raises(LoadError) as caught:
            fresh.load(path)
        assert type(caught.value) is error, f"{path.name}: {caught.value!r}"
        assert said in caught.value.message and caught.value.hint, path.name
    fresh.load()
    assert fresh.generate(STORY).text

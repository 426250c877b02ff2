"""What every loader must do, over a real worker process (modules.engine's contract)."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from modules import protocol
from modules.errors import ContextLengthExceeded, EngineDead, LoadError, ModelNotFound, ProtocolError
from modules.registry import discover
from modules.sampling import PARAMETERS, active
from modules.schema import StopParams
from tests.contract.rows import ROWS, STORY, Row

if TYPE_CHECKING:
    from tests.contract.conftest import Bench

LONG = StopParams(max_tokens=40, ignore_eos=True)
SEEDED = {"temperature": 1.0, "seed": 1234}


def test_every_loader_has_a_row() -> None:
    assert {row.loader for row in ROWS} == set(discover()), "add a row for the new loader in tests/contract/rows.py"


def test_handshake(bench: Bench) -> None:
    assert bench.client.versions["python"]
    assert set(bench.client.versions) > {"python"}, "the engine names its backend's version"
    assert bench.client.pid and psutil.pid_exists(bench.client.pid)


def test_other_protocol_version_is_refused(fresh: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PROTOCOL_VERSION", 99)
    with pytest.raises(ProtocolError, match="protocol 99"):
        fresh.start()


def test_model_info(bench: Bench) -> None:
    info = bench.client.info
    assert info is not None
    assert info.loader == bench.spec.name and info.format in bench.spec.formats
    assert info.context_length > 0 and info.vocab_size > 0
    assert info.architecture and info.engine and info.eos_token_ids and info.device_map


def test_greedy_is_deterministic(bench: Bench) -> None:
    assert bench.generate(STORY).text == bench.generate(STORY).text != ""


def test_same_seed_same_text(bench: Bench) -> None:
    def sample(seed: int) -> str:
        prompt = "[[echo random=1 tokens=40]] words" if bench.row.loader == "echo" else STORY
        return bench.generate(prompt, sampling={"temperature": 1.0, "seed": seed}, stop=LONG).text

    sample(1)  # the prompt is cached from here on: llama.cpp's batches of different widths differ in the last bits
    assert sample(1234) == sample(1234)
    assert len({sample(seed) for seed in range(5)}) > 1, "the seed has no effect"


def test_seed_is_reported(bench: Bench) -> None:
    assert bench.generate(STORY, sampling=SEEDED).end.seed == 1234
    drawn = bench.generate(STORY, sampling={"temperature": 1.0}).end.seed
    assert drawn is not None and drawn >= 0


def test_stream_joins_to_the_decoded_ids(bench: Bench) -> None:
    answer = bench.generate(STORY, stop=LONG)
    prompt_ids = bench.run(bench.client.encode(STORY, add_special=True))
    whole = bench.run(bench.client.decode(prompt_ids + answer.ids))
    prompt = bench.run(bench.client.decode(prompt_ids))
    assert whole.removeprefix(prompt).rstrip("\ufffd") == answer.text.rstrip("\ufffd")


@pytest.mark.parametrize("text", ["Zürich 🙂🙃 naïve", "你好，世界 — こんにちは", "👩‍👩‍👧‍👦 family", "שלום مرحبا"])
def test_no_split_code_point(bench: Bench, text: str) -> None:
    answer = bench.generate(text, stop=StopParams(max_tokens=24, ignore_eos=True), sampling=SEEDED)
    for event in answer.tokens[:-1]:
        event.text.encode("utf-8")  # no lone surrogate
    if bench.row.byte_exact:
        assert "\ufffd" not in "".join(e.text for e in answer.tokens[:-1])
        assert text[:5] in answer.text


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces ", "tab\tnew\nline", "Zürich 🙂 你好"])
def test_encode_decode_round_trip(bench: Bench, text: str) -> None:
    ids = bench.run(bench.client.encode(text))
    assert bench.run(bench.client.decode(ids)).strip() == text.strip()


@pytest.mark.parametrize("start,length", [(3, 1), (8, 4), (15, 9)])
def test_stop_string_never_leaks(bench: Bench, start: int, length: int) -> None:
    full = bench.generate(STORY, stop=LONG).text
    stop = full[start : start + length]
    answer = bench.generate(STORY, stop=StopParams(max_tokens=40, ignore_eos=True, stop=(stop, "never there")))
    assert answer.text == full[: full.index(stop)]
    assert answer.end.finish_reason == "stop" and answer.end.stop_match == stop


@pytest.mark.parametrize("count", [1, 2, 17])
def test_exact_max_tokens(bench: Bench, count: int) -> None:
    answer = bench.generate(STORY, stop=StopParams(max_tokens=count, ignore_eos=True))
    assert len(answer.ids) == count == answer.end.usage.completion_tokens
    assert answer.end.finish_reason == "length"


def test_stop_token_id(bench: Bench) -> None:
    ids = bench.generate(STORY, stop=LONG).ids
    wanted = ids[5]
    answer = bench.generate(STORY, stop=StopParams(max_tokens=40, ignore_eos=True, stop_token_ids=(wanted,)))
    assert answer.ids == ids[: ids.index(wanted)]
    assert answer.end.finish_reason == "stop"


def test_usage_equals_encode(bench: Bench) -> None:
    prompt_ids = bench.run(bench.client.encode(STORY, add_special=True))
    usage = bench.generate(STORY).end.usage
    assert usage.prompt_tokens == len(prompt_ids)


def test_token_ids_prompt_equals_text_prompt(bench: Bench) -> None:
    ids = bench.run(bench.client.encode(STORY, add_special=True))
    by_text = bench.generate(STORY)
    by_ids = bench.generate(None, token_ids=tuple(ids))
    assert by_ids.text == by_text.text


def test_prefill_is_announced_before_tokens(bench: Bench) -> None:
    answer = bench.generate(STORY + " there was a dog." * 5)
    assert answer.prefill and answer.prefill[-1].done == answer.prefill[-1].total


def test_timings(bench: Bench) -> None:
    timings = bench.generate(STORY, stop=LONG).end.timings
    assert timings.prefill_s > 0 and timings.decode_s > 0


def test_abort_within_two_tokens_then_next_request(bench: Bench) -> None:
    prompt = "[[echo tokens=4000 rate=200]]" if bench.row.loader == "echo" else STORY
    before = bench.generate(STORY).text
    answer = bench.generate(prompt, abort_after=3, stop=StopParams(max_tokens=400, ignore_eos=True), sampling=SEEDED)
    assert answer.end.finish_reason == "cancelled"
    assert 3 <= len(answer.tokens) <= 400
    assert bench.generate(STORY).text == before


def test_leaving_the_stream_aborts_it(bench: Bench) -> None:
    async def leave() -> None:
        events = bench.client.generate(bench.request(STORY, stop=StopParams(max_tokens=100_000, ignore_eos=True)))
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]

    bench.run(leave())
    assert bench.generate(STORY).end.finish_reason in ("stop", "length")


def test_context_overflow_is_typed(bench: Bench) -> None:
    assert bench.client.info is not None
    too_long = "word " * (bench.client.info.context_length + 10)
    with pytest.raises(ContextLengthExceeded):
        bench.generate(too_long)
    assert bench.generate(STORY).text


def test_generation_ends_at_the_context(fresh: Bench) -> None:
    option = fresh.spec.option("n_ctx") or fresh.spec.option("ctx_size")
    assert option is not None, "every loader can set its context length"
    fresh.load(**{option.name: 64})
    answer = fresh.generate(STORY, stop=StopParams(ignore_eos=True))
    usage = answer.end.usage
    assert answer.end.finish_reason == "length"
    assert usage.prompt_tokens + usage.completion_tokens in (63, 64, 65)


# A value that does something, for each parameter that some loader lacks and whose limits are no such value.
LACKING = {"num_beams": 2, "early_stopping": True, "negative_prompt": "No.", "guidance_scale": 1.5, "prompt_lookup_num_tokens": 3}


def test_unsupported_parameters_are_reported(bench: Bench) -> None:
    wanted: dict[str, Any] = {"temperature": 0.0}
    for parameter in PARAMETERS.values():
        if parameter.name not in bench.spec.samplers:
            limit = parameter.maximum if parameter.neutral != parameter.maximum else parameter.minimum
            if (value := LACKING.get(parameter.name, limit)) is not None:
                wanted[parameter.name] = value
    asked = set(active(wanted)) - {"temperature"}
    answer = bench.generate(STORY, sampling=wanted)
    assert answer.ids and asked <= set(answer.end.ignored), "a parameter vanished"
    assert all(answer.end.ignored.values()), "each has a reason"


def test_applied_parameters_are_reported(bench: Bench) -> None:
    applied = bench.generate(STORY, sampling={"temperature": 0.5, "top_k": 7, "seed": 3}).end.applied
    assert applied.get("temperature") == 0.5 and applied.get("top_k") == 7


def test_top_k_one_equals_greedy(bench: Bench) -> None:
    if bench.row.loader == "echo":
        pytest.skip("echo has no distribution")
    assert bench.generate(STORY, sampling={"temperature": 1.0, "top_k": 1}).text == bench.generate(STORY).text


def test_empty_prompt(bench: Bench) -> None:
    answer = bench.generate("", stop=StopParams(max_tokens=4))
    assert answer.end.finish_reason in ("stop", "length")


def test_min_tokens(bench: Bench) -> None:
    if "min_tokens" in bench.row.lacks:
        pytest.skip("this build has no minimum length")
    answer = bench.generate(STORY, stop=StopParams(max_tokens=60, min_tokens=50))
    assert answer.end.usage.completion_tokens >= 50


def test_unicode_path(row: Row, fresh: Bench, tmp_path: Path) -> None:
    source = row.model()
    if not isinstance(source, Path):
        pytest.skip("this loader's model is no file")
    target = tmp_path / "mödel ü 模型" / source.name
    target.parent.mkdir()
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    fresh.load(target)
    assert fresh.generate(STORY, stop=StopParams(max_tokens=4, ignore_eos=True)).ids


def test_unload_ends_the_process(fresh: Bench) -> None:
    fresh.load()
    pid = fresh.client.pid
    assert pid is not None and (fresh.client.memory_bytes() or 0) > 0
    fresh.close()
    assert not psutil.pid_exists(pid)


def test_two_requests_keep_apart(bench: Bench) -> None:
    async def both() -> tuple[str, str]:
        requests = [bench.request(prompt, stop=LONG) for prompt in (STORY, "The little dog")]
        first, second = await asyncio.gather(*(bench.collect(r) for r in requests))
        return first.text, second.text

    alone = (bench.generate(STORY, stop=LONG).text, bench.generate("The little dog", stop=LONG).text)
    assert bench.run(both()) == alone


def test_killed_worker_is_a_typed_error_and_a_reload_works(fresh: Bench) -> None:
    fresh.load()

    async def kill_in_mid_stream() -> None:
        count = 0
        async for _ in fresh.client.generate(fresh.request(STORY, stop=StopParams(max_tokens=100_000, ignore_eos=True))):
            count += 1
            if count == 3:
                assert fresh.client.pid is not None
                psutil.Process(fresh.client.pid).kill()

    with pytest.raises(EngineDead) as caught:
        fresh.run(kill_in_mid_stream())
    assert caught.value.detail["signal"] == "SIGKILL"
    fresh.client = fresh.start()
    fresh.load()
    assert fresh.generate(STORY).text


def test_missing_model_is_typed(fresh: Bench, tmp_path: Path) -> None:
    if fresh.row.loader == "echo":
        pytest.skip("echo reads no file")
    with pytest.raises((LoadError, ModelNotFound)):
        fresh.load(tmp_path / "nothing here.gguf")


def test_nothing_but_frames_on_the_pipe(bench: Bench) -> None:
    """A stray byte on the pipe is fatal to the client, so a live client after all the above has seen none."""
    assert bench.client.dead is None


def test_logprobs(bench: Bench) -> None:
    if "logprobs" not in bench.spec.features:
        pytest.skip(f"{bench.spec.title} gives no log-probabilities")
    answer = bench.generate(STORY, logprobs=3, stop=StopParams(max_tokens=5, ignore_eos=True))
    values: list[Any] = [lp for event in answer.tokens for lp in event.logprobs]
    assert [lp.token_id for lp in values] == answer.ids
    for lp in values:
        assert lp.logprob <= 0 and len(lp.top) == 3
        assert lp.top[0][0] == lp.token_id, "greedy picks the likeliest"
        assert lp.top[0][2] >= lp.top[1][2] >= lp.top[2][2]


def test_score(bench: Bench) -> None:
    if "score" not in bench.spec.features - bench.row.lacks:
        pytest.skip(f"{bench.spec.title} can't score")
    ids = bench.run(bench.client.encode(STORY + ", there was a little girl named Lily.", add_special=True))
    scores = bench.run(bench.client.score(ids))
    assert len(scores) == len(ids) - 1 and all(s <= 1e-6 for s in scores)
    shuffled = [ids[0], *reversed(ids[1:])]
    assert sum(scores) > sum(bench.run(bench.client.score(shuffled)))

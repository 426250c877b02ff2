"""RWKV over a real worker: every version against a plain forward pass, states that rewind, files that are no RWKV."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np  # noqa: TID253 - a test, not the server
import pytest

from loaders.rwkv import SPEC
from modules.convert.unpickle import convert_pickle
from modules.errors import CorruptModel, IncompatibleModel, InvalidParameter, UnsafeModel
from modules.schema import StopParams
from tests.conftest import ROOT
from tests.contract.conftest import Bench
from tests.contract.rows import Row

if TYPE_CHECKING:
    from modules.overlays import Overlays

Array = Any  # of numpy, float64
Weights = dict[str, Array]
LAYERS, HIDDEN, HEADS, SIDE, INNER, VOCAB = 2, 32, 2, 16, 64, 256
IDS = [int(i) for i in np.random.default_rng(5).integers(0, VOCAB, 40)]
STATES = StopParams(max_tokens=12, ignore_eos=True)


# --- random models and their plain forward pass ---------------------------------------------------------------------


def random_weights(version: str) -> Weights:
    """A small model of random weights under the names and in the shapes of the training code's files."""
    rng = np.random.default_rng(int(version))

    def normal(*shape: int, scale: float = 0.3) -> Array:
        return rng.normal(0, scale, shape)

    def share(*shape: int) -> Array:
        return rng.uniform(0, 1, shape)

    weights: Weights = {"emb.weight": normal(VOCAB, HIDDEN), "head.weight": normal(VOCAB, HIDDEN)}

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + normal(HIDDEN, scale=0.1), normal(HIDDEN, scale=0.1)

    norm("ln_out")
    norm("blocks.0.ln0")
    for layer in range(LAYERS):
        block, att, ffn = f"blocks.{layer}", f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for name in (f"{block}.ln1", f"{block}.ln2", f"{att}ln_x"):
            norm(name)
        for name in ("receptance", "key", "value", "output"):
            weights[f"{att}{name}.weight"] = normal(HIDDEN, HIDDEN)
        weights[f"{ffn}key.weight"], weights[f"{ffn}value.weight"] = normal(INNER, HIDDEN), normal(HIDDEN, INNER)
        if version == "7":
            for name in "rwkvag":
                weights[f"{att}x_{name}"] = share(1, 1, HIDDEN)
            weights[f"{ffn}x_k"] = share(1, 1, HIDDEN)
            for name, rank in ({"w": 8, "a": 8, "g": 16} | ({"v": 4} if layer else {})).items():
                weights[f"{att}{name}1"], weights[f"{att}{name}2"] = normal(HIDDEN, rank), normal(rank, HIDDEN)
                if name != "g":
                    weights[f"{att}{name}0"] = normal(1, 1, HIDDEN)
            weights[f"{att}k_k"], weights[f"{att}k_a"] = share(1, 1, HIDDEN), share(1, 1, HIDDEN)
            weights[f"{att}r_k"] = normal(HEADS, SIDE)
        else:
            weights[f"{att}gate.weight"], weights[f"{ffn}receptance.weight"] = normal(HIDDEN, HIDDEN), normal(HIDDEN, HIDDEN)
            for name in "xwkvrg":
                weights[f"{att}time_maa_{name}"] = share(1, 1, HIDDEN)
            for name in "kr":
                weights[f"{ffn}time_maa_{name}"] = share(1, 1, HIDDEN)
            weights[f"{att}time_maa_w1"], weights[f"{att}time_maa_w2"] = normal(HIDDEN, 5 * 4), normal(5, 4, HIDDEN)
            weights[f"{att}time_decay"] = normal(1, 1, HIDDEN) - 1
            weights[f"{att}time_decay_w1"], weights[f"{att}time_decay_w2"] = normal(HIDDEN, 8), normal(8, HIDDEN)
            weights[f"{att}time_faaaa"] = normal(HEADS, SIDE)
    return {name: value.astype(np.float32).astype(np.float64) for name, value in weights.items()}


def layer_norm(x: Array, weights: Weights, name: str) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def head_norm(x: Array, weights: Weights, name: str) -> Array:
    heads = x.reshape(HEADS, SIDE)
    scaled = (heads - heads.mean(1, keepdims=True)) / np.sqrt(heads.var(1, keepdims=True) + 64e-5)
    return scaled.ravel() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def relu_squared(x: Array) -> Array:
    return np.square(np.maximum(x, 0))


Memory = dict[str, Array]  # what a layer remembers: the last inputs, the state of the heads, the first layer's values


def time_mix_7(x: Array, w: Weights, layer: int, memory: Memory) -> Array:
    """Peng et al. 2025 (arXiv:2503.14456), equations of the time mixing, one token."""
    att = f"blocks.{layer}.att."
    last = memory.get(f"{att}x", np.zeros(HIDDEN))
    memory[f"{att}x"] = x
    mixed = {name: x + (last - x) * w[f"{att}x_{name}"].ravel() for name in "rwkvag"}
    r, k, v = (w[f"{att}{name}.weight"] @ mixed[name[0]] for name in ("receptance", "key", "value"))
    decay = np.exp(-np.exp(-0.5) * sigmoid(w[f"{att}w0"].ravel() + np.tanh(mixed["w"] @ w[f"{att}w1"]) @ w[f"{att}w2"]))
    rate = sigmoid(w[f"{att}a0"].ravel() + mixed["a"] @ w[f"{att}a1"] @ w[f"{att}a2"])
    gate = sigmoid(mixed["g"] @ w[f"{att}g1"]) @ w[f"{att}g2"]
    removal = (k * w[f"{att}k_k"].ravel()).reshape(HEADS, SIDE)
    removal /= np.linalg.norm(removal, axis=1, keepdims=True)
    k = k * (1 + (rate - 1) * w[f"{att}k_a"].ravel())
    if layer == 0:
        memory["first"] = v
    else:
        v = v + (memory["first"] - v) * sigmoid(w[f"{att}v0"].ravel() + mixed["v"] @ w[f"{att}v1"] @ w[f"{att}v2"])
    state = memory.get(f"{att}state", np.zeros((HEADS, SIDE, SIDE)))
    out = np.zeros((HEADS, SIDE))
    for h in range(HEADS):
        part = slice(h * SIDE, (h + 1) * SIDE)
        change = np.diag(decay[part]) - np.outer(removal[h], removal[h] * rate[part])
        state[h] = state[h] @ change + np.outer(v[part], k[part])
        out[h] = state[h] @ r[part]
    memory[f"{att}state"] = state
    bonus = (r * k * w[f"{att}r_k"].ravel()).reshape(HEADS, SIDE).sum(1, keepdims=True) * v.reshape(HEADS, SIDE)
    return w[f"{att}output.weight"] @ ((head_norm(out.ravel(), w, f"{att}ln_x") + bonus.ravel()) * gate)


def channel_mix_7(x: Array, w: Weights, layer: int, memory: Memory) -> Array:
    ffn = f"blocks.{layer}.ffn."
    last = memory.get(f"{ffn}x", np.zeros(HIDDEN))
    memory[f"{ffn}x"] = x
    return w[f"{ffn}value.weight"] @ relu_squared(w[f"{ffn}key.weight"] @ (x + (last - x) * w[f"{ffn}x_k"].ravel()))


def time_mix_6(x: Array, w: Weights, layer: int, memory: Memory) -> Array:
    """Peng et al. 2024 (arXiv:2404.05892), "Finch": decay and mixing that depend on the data, one token."""
    att = f"blocks.{layer}.att."
    last = memory.get(f"{att}x", np.zeros(HIDDEN))
    memory[f"{att}x"] = x
    base = x + (last - x) * w[f"{att}time_maa_x"].ravel()
    low = np.tanh(base @ w[f"{att}time_maa_w1"]).reshape(5, -1)
    shifts = {name: low[i] @ w[f"{att}time_maa_w2"][i] for i, name in enumerate("wkvrg")}
    mixed = {name: x + (last - x) * (w[f"{att}time_maa_{name}"].ravel() + shift) for name, shift in shifts.items()}
    r, k, v, g = (w[f"{att}{name}.weight"] @ mixed[name[0]] for name in ("receptance", "key", "value", "gate"))
    decay = w[f"{att}time_decay"].ravel() + np.tanh(mixed["w"] @ w[f"{att}time_decay_w1"]) @ w[f"{att}time_decay_w2"]
    decay = np.exp(-np.exp(decay))
    state = memory.get(f"{att}state", np.zeros((HEADS, SIDE, SIDE)))
    out = np.zeros((HEADS, SIDE))
    for h in range(HEADS):
        part = slice(h * SIDE, (h + 1) * SIDE)
        new = np.outer(k[part], v[part])
        out[h] = r[part] @ (w[f"{att}time_faaaa"][h][:, None] * new + state[h])
        state[h] = new + decay[part][:, None] * state[h]
    memory[f"{att}state"] = state
    return w[f"{att}output.weight"] @ (head_norm(out.ravel(), w, f"{att}ln_x") * g * sigmoid(g))


def channel_mix_6(x: Array, w: Weights, layer: int, memory: Memory) -> Array:
    ffn = f"blocks.{layer}.ffn."
    last = memory.get(f"{ffn}x", np.zeros(HIDDEN))
    memory[f"{ffn}x"] = x
    k, r = (x + (last - x) * w[f"{ffn}time_maa_{name}"].ravel() for name in "kr")
    return sigmoid(w[f"{ffn}receptance.weight"] @ r) * (w[f"{ffn}value.weight"] @ relu_squared(w[f"{ffn}key.weight"] @ k))


MIXES: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "6": (time_mix_6, channel_mix_6),
    "7": (time_mix_7, channel_mix_7),
}


def scores(weights: Weights, version: str, ids: list[int]) -> list[float]:
    """Log-probability of each token after the first, by a forward pass of one token after the other in float64."""
    memory: Memory = {}
    time_mix, channel_mix = MIXES[version]
    found = []
    for token, following in itertools.pairwise(ids):
        x = layer_norm(weights["emb.weight"][token], weights, "blocks.0.ln0")
        for layer in range(LAYERS):
            x = x + time_mix(layer_norm(x, weights, f"blocks.{layer}.ln1"), weights, layer, memory)
            x = x + channel_mix(layer_norm(x, weights, f"blocks.{layer}.ln2"), weights, layer, memory)
        logits = weights["head.weight"] @ layer_norm(x, weights, "ln_out")
        found.append(float(logits[following] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()))
    return found


def write_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    header: dict[str, Any] = {}
    body = b""
    for name, value in tensors.items():
        raw = np.asarray(value, dtype="<f4").tobytes()
        shape = list(np.shape(value))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# --- a worker -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(overlays: Overlays, loop: asyncio.AbstractEventLoop) -> Iterator[Bench]:
    """A worker of the RWKV environment, nothing loaded yet."""
    row = Row("rwkv", "rwkv", lambda: None, {"threads": 1})
    if reason := overlays.unavailable(SPEC):
        pytest.skip(f"RWKV: {reason}")
    bench = Bench(row, overlays, loop)
    yield bench
    bench.close()


@pytest.mark.parametrize("version", sorted(MIXES))
def test_a_forward_pass_is_what_the_papers_say(worker: Bench, tmp_path: Path, version: str) -> None:
    weights = random_weights(version)
    worker.load(write_safetensors(tmp_path / "any.safetensors", weights), prefill_chunk=16)
    assert worker.client.info is not None and worker.client.info.architecture == f"RWKV v{version}"
    expected = scores(weights, version, IDS)
    assert list(worker.run(worker.client.score(IDS))) == pytest.approx(expected, abs=2e-4)
    # Token by token, too: the path of an answer.
    answer = worker.generate(None, token_ids=tuple(IDS), logprobs=0, stop=STATES)
    found = [entry.logprob for event in answer.tokens for entry in event.logprobs]
    assert found == pytest.approx(scores(weights, version, IDS + answer.ids)[len(IDS) - 1 :], abs=2e-4)


def test_every_state_gives_what_a_full_run_gives(worker: Bench, tmp_path: Path) -> None:
    """Regenerate, another turn, an edited message, a branch: the right state is found and changes nothing."""
    path = write_safetensors(tmp_path / "any.safetensors", random_weights("7"))
    worker.load(path, state_every=16, prefill_chunk=16)

    def ask(ids: list[int]) -> tuple[list[int], list[float], int]:
        answer = worker.generate(None, token_ids=tuple(ids), logprobs=0, stop=STATES)
        return answer.ids, [e.logprob for event in answer.tokens for e in event.logprobs], answer.end.usage.cached_tokens

    first, first_scores, cached = ask(IDS)
    assert cached == 0
    again = ask(IDS)
    assert again == (first, first_scores, len(IDS) - 1), "regenerating reads one token and gives bit-equal numbers"
    turn = IDS + first + [1, 2, 3]
    branch = IDS + first + [9, 8, 7]
    edited = [*IDS[:33], 4, 5, 6, 7]
    results = {"turn": ask(turn), "branch": ask(branch), "edited": ask(edited), "first": ask(IDS)}
    # The last token of an answer is given out, not read, so the state ends before it.
    assert results["turn"][2] == results["branch"][2] == len(IDS) + len(first) - 1
    assert results["edited"][2] == 32
    assert results["first"] == again
    worker.load(path, state_cache_mb=0)
    for name, ids in (("turn", turn), ("branch", branch), ("edited", edited)):
        cold = ask(ids)
        assert cold[0] == results[name][0] and cold[2] < results[name][2]
        assert cold[1] == pytest.approx(results[name][1], abs=1e-5)


def test_an_aborted_prefill_leaves_right_states(worker: Bench, tmp_path: Path) -> None:
    worker.load(write_safetensors(tmp_path / "any.safetensors", random_weights("6")), prefill_chunk=16)
    long = IDS * 8
    cancelled = worker.generate(None, abort_after=1, token_ids=tuple(long), stop=StopParams(max_tokens=200, ignore_eos=True))
    assert cancelled.end.finish_reason == "cancelled"
    steps = [event.done for event in cancelled.prefill]
    assert steps == sorted(steps) and len(steps) >= len(long) // 16
    warm = worker.generate(None, token_ids=(*long, 1), stop=STATES)
    assert warm.end.usage.cached_tokens >= len(long) - 1
    worker.load(tmp_path / "any.safetensors")
    assert worker.generate(None, token_ids=(*long, 1), stop=STATES).ids == warm.ids


@pytest.mark.shared
@pytest.mark.parametrize(("name", "eps"), [("4v0-660K", 0.0), ("5v2-730K", 1e-5)])
def test_the_logits_of_trained_models(
    worker: Bench, overlays: Overlays, shared: Path, tmp_path: Path, name: str, eps: float
) -> None:
    """The expected logits follow the prompt `"in`. Those of v5.2 were made with the epsilon of that time."""
    folder = shared / "models" / "tiny-rwkv"
    source = folder / f"converted-tiny-rwkv-{name}.pth"
    with pytest.raises(UnsafeModel, match="pickle") as refused:
        worker.load(source)
    assert f"convert {source.name} --to safetensors --allow-pickle" in (refused.value.hint or "")
    out = tmp_path / "tiny.safetensors"
    asyncio.run(convert_pickle(source, lambda _: None, allow_pickle=True, out=out, overlays=overlays))
    worker.load(out, ln_x_eps=eps)
    expected = np.fromfile(folder / f"expected-logits-{name}.bin", "<f4").astype(np.float64)
    expected -= np.log(np.exp(expected).sum())
    answer = worker.generate('"in', logprobs=VOCAB, stop=StopParams(max_tokens=1, ignore_eos=True))
    found = np.zeros(VOCAB)
    for token, _, value in answer.tokens[0].logprobs[0].top:
        found[token] = value
    assert found == pytest.approx(expected, abs=1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_no_rwkv_is_typed_and_the_worker_lives(worker: Bench, tmp_path: Path) -> None:
    whole = random_weights("7")
    path = write_safetensors(tmp_path / "any.safetensors", whole)
    for strategy, words in (("cpu fp32i8", "version 7"), ("cpu fp16", "fp16"), ("fast", "no strategy")):
        with pytest.raises(InvalidParameter, match=words):
            worker.load(path, strategy=strategy)
    with pytest.raises(IncompatibleModel, match="not RWKV"):
        worker.load(ROOT / "models" / "wren-6m" / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptModel):
        worker.load(cut)
    with pytest.raises(CorruptModel, match=r"blocks\.1\.att\.w2"):
        worker.load(write_safetensors(tmp_path / "less.safetensors", {k: v for k, v in whole.items() if k != "blocks.1.att.w2"}))
    odd = whole | {"emb.weight": whole["emb.weight"][:100], "head.weight": whole["head.weight"][:100]}
    with pytest.raises(IncompatibleModel, match="vocabulary of 100"):
        worker.load(write_safetensors(tmp_path / "odd.safetensors", odd))
    worker.load(path)
    assert worker.generate("abc", stop=STATES).ids


def test_eight_bit_weights_and_bfloat16(worker: Bench, tmp_path: Path) -> None:
    weights = random_weights("6")
    path = write_safetensors(tmp_path / "any.safetensors", weights)
    expected = np.mean(scores(weights, "6", IDS))
    for strategy, dtype in (("cpu fp32i8", "float32"), ("cpu bf16 *1 -> cpu fp32", "bfloat16")):
        worker.load(path, strategy=strategy)
        assert worker.client.info is not None and worker.client.info.dtype == dtype
        assert (worker.client.info.quantization is not None) == strategy.endswith("i8")
        assert np.mean(worker.run(worker.client.score(IDS))) == pytest.approx(expected, abs=0.5)


def test_bfloat16_of_version_7_is_a_rounding_away_in_both_paths(worker: Bench, tmp_path: Path) -> None:
    weights = random_weights("7")
    worker.load(write_safetensors(tmp_path / "any.safetensors", weights), strategy="cpu bf16")
    whole = worker.run(worker.client.score(IDS))
    assert whole == pytest.approx(scores(weights, "7", IDS), abs=0.2)
    answer = worker.generate(None, token_ids=tuple(IDS), logprobs=0, stop=STATES)  # token by token
    found = [entry.logprob for event in answer.tokens for entry in event.logprobs]
    assert found == pytest.approx(scores(weights, "7", IDS + answer.ids)[len(IDS) - 1 :], abs=0.2)

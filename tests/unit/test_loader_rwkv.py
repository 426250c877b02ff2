"""The RWKV loader without its package: versions from shapes, strategies, tokenizers, and which states are kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import _rwkv_load as load
from loaders._rwkv_states import StateCache
from loaders._rwkv_text import WORLD_SIZE, byte_codec, world_codec
from loaders.rwkv import SPEC, RwkvEngine
from modules import sampling
from modules.detect import inspect
from modules.detect.rwkv import RwkvShape, rwkv_shape
from modules.errors import CorruptModel, IncompatibleModel, InvalidParameter, UnsafeModel
from modules.load_options import complete_options
from tests.unit.model_files import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

SIDE, INNER, VOCAB = 8, 16, 256


def shapes(version: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model of `version`, as the training code writes them."""
    one, two = (1, 1, SIDE), (SIDE, SIDE)
    found: dict[str, tuple[int, ...]] = {"emb.weight": (VOCAB, SIDE), "head.weight": (VOCAB, SIDE)}
    for name in ("ln_out", "blocks.0.ln0"):
        found |= {f"{name}.weight": (SIDE,), f"{name}.bias": (SIDE,)}
    for layer in range(layers):
        part: dict[str, tuple[int, ...]] = {f"{n}.{w}": (SIDE,) for n in ("ln1", "ln2") for w in ("weight", "bias")}
        part |= {f"att.{n}.weight": two for n in ("key", "value", "receptance", "output")}
        part |= {"ffn.key.weight": (INNER, SIDE), "ffn.value.weight": (SIDE, INNER)}
        if version != "7":
            part["ffn.receptance.weight"] = two
        if version != "4":
            part |= {"att.ln_x.weight": (SIDE,), "att.ln_x.bias": (SIDE,)}
        if version in ("4", "5", "5.1", "5.2"):
            part |= {f"att.time_mix_{n}": one for n in "kvr"} | {f"ffn.time_mix_{n}": one for n in "kr"}
            part |= {"att.time_first": (2,), "att.time_decay": (2,)}
        if version in ("5.1", "5.2"):
            part |= {"att.gate.weight": two, "att.time_mix_g": one}
        if version == "5.2":
            part |= {"att.time_faaaa": (2, 4), "att.time_decay": (2, 4)}
            del part["att.time_first"]
        if version == "6":
            part |= {f"att.time_maa_{n}": one for n in "xwkvrg"} | {f"ffn.time_maa_{n}": one for n in "kr"}
            part |= {"att.gate.weight": two, "att.time_maa_w1": (SIDE, 20), "att.time_maa_w2": (5, 4, SIDE)}
            part |= {"att.time_decay": one, "att.time_decay_w1": (SIDE, 4), "att.time_decay_w2": (4, SIDE)}
            part |= {"att.time_faaaa": (2, 4)}
        if version == "7":
            part |= {f"att.x_{n}": one for n in "rwkvag"} | {f"att.{n}": one for n in ("w0", "a0", "k_k", "k_a")}
            part |= {f"att.{n}1": (SIDE, 4) for n in "wag"} | {f"att.{n}2": (4, SIDE) for n in "wag"}
            part |= {"ffn.x_k": one, "att.r_k": (2, 4)}
            if layer:
                part |= {"att.v0": one, "att.v1": (SIDE, 4), "att.v2": (4, SIDE)}
        found |= {f"blocks.{layer}.{name}": shape for name, shape in part.items()}
    return found


@pytest.mark.parametrize("version", ["4", "5", "5.1", "5.2", "6", "7"])
def test_the_version_is_in_the_tensors(version: str) -> None:
    heads = 0 if version == "4" else 2
    assert rwkv_shape(shapes(version)) == RwkvShape(version, 2, SIDE, VOCAB, heads)


@pytest.mark.parametrize("version", ["4", "5", "5.1", "5.2", "6", "7"])
def test_every_missing_tensor_is_noticed(version: str) -> None:
    """Without any one of its tensors a model is incomplete; never does an older version come out."""
    whole = shapes(version)
    for name in whole:
        less = {k: v for k, v in whole.items() if k != name}
        with pytest.raises((CorruptModel, IncompatibleModel)):
            found = rwkv_shape(less)
            pytest.fail(f"without {name}: {found}")


def test_shapes_must_fit() -> None:
    for name, shape in (("head.weight", (VOCAB, 9)), ("blocks.1.ln1.bias", (9,)), ("blocks.0.ffn.value.weight", (SIDE, 9))):
        with pytest.raises(CorruptModel, match=name.replace(".", r"\.")):
            rwkv_shape(shapes("7") | {name: shape})


def test_a_llama_is_no_rwkv() -> None:
    with pytest.raises(IncompatibleModel, match="not RWKV"):
        rwkv_shape({"model.embed_tokens.weight": (32, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)})


def test_a_folder_is_rwkv_whatever_its_config_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512}))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({k: ("F32", v) for k, v in shapes("7").items()}))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = inspect(tmp_path)
    assert (found.format, found.architecture, found.vocab_size, found.context_length) == ("rwkv", "rwkv7", VOCAB, 512)
    assert load.weights_file(tmp_path).name == "model.safetensors"


def test_a_pickle_is_refused_with_the_exact_command(tmp_path: Path) -> None:
    path = tmp_path / "my model.pth"
    with pytest.raises(UnsafeModel) as refused:
        load.weights_file(path)
    assert "`server.py convert 'my model.pth' --to safetensors --allow-pickle`" in refused.value.hint


# --- strategies -----------------------------------------------------------------------------------------------------


def strategy(text: str, version: str = "6", *, cuda: bool = False) -> str:
    return load.checked_strategy(text, RwkvShape(version, 24, 64, VOCAB, 1), cuda=cuda)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_auto_strategy(version: str) -> None:
    assert strategy("auto", version) == "cpu fp32"
    assert strategy("", version, cuda=True) == "cuda fp16"


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("cpu fp32", "cpu fp32"),
        ("  cpu   bf16 ", "cpu bf16"),
        ("cpu fp32i8", "cpu fp32i8"),
        ("cuda fp16i8 *10->cpu fp32", "cuda fp16i8 *10 -> cpu fp32"),
        ("cuda:0 fp16 *8 -> cuda:1 fp16 *8 -> cpu fp32", "cuda:0 fp16 *8 -> cuda:1 fp16 *8 -> cpu fp32"),
        ("cuda fp16i8 *6+", "cuda fp16i8 *6+"),
    ],
)
def test_strategies(text: str, made: str) -> None:
    assert strategy(text, cuda=True) == made


@pytest.mark.parametrize(
    ("text", "version", "words"),
    [
        ("fast", "6", "no strategy"),
        ("cpu", "6", "no strategy"),
        ("cpu fp32 -> ", "6", "no strategy"),
        ("cpu fp16", "6", "does not compute in fp16"),
        ("cuda fp16", "6", "there is none"),
        ("cpu fp32i4", "6", "no i4"),
        ("cpu fp32i8", "7", "version 7"),
        ("cpu fp32 *3 -> cpu bf16", "7", "version 7"),
        ("cpu fp32 *3 -> cpu bf16 *3+", "6", "stream"),
    ],
)
def test_strategies_that_cannot_be_followed(text: str, version: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as refused:
        strategy(text, version)
    assert refused.value.param == "strategy" and refused.value.hint


def test_names_people_know() -> None:
    options = complete_options(SPEC, {"rwkv_strategy": "cpu bf16", "rwkv_cuda_on": True, "n_ctx": 512})
    assert (options["strategy"], options["cuda_kernel"], options["ctx_size"]) == ("cpu bf16", True, 512)


def test_every_parameter_is_honoured_or_reported() -> None:
    for parameter in sampling.PARAMETERS.values():
        value = {"float": parameter.maximum, "int": 2, "bool": not parameter.neutral, "bias": {"1": 2.0}}.get(parameter.kind)
        if value is None or not sampling.active({parameter.name: value}):
            continue
        made = RwkvEngine.to_native(sampling.check({parameter.name: value}))
        assert (parameter.name in made["sampler"]) != (parameter.name in made["ignored"]), parameter.name


# --- tokenizers -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    codec = byte_codec()
    assert codec.encode(text, True) == list(text.encode("utf-8", "replace"))
    assert codec.decode(codec.encode(text, True)) == text.encode("utf-8", "replace").decode()


@pytest.fixture
def world(tmp_path: Path) -> Any:
    pieces = [bytes([i]) for i in range(256)] + [b"  ", b"ab", b"abc", b"abcde", "你".encode(), b"\n\n"]
    lines = [
        f"{i} {piece.decode()!r} {len(piece)}" if i > 256 else f"{i} {piece!r} {len(piece)}" for i, piece in enumerate(pieces, 1)
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return world_codec(path)


def test_the_longest_piece_wins(world: Any) -> None:
    texts = [world.piece(i) for i in world.encode("abcdabcdeab 你好\n\n", True)]
    assert texts[:5] == [b"abc", b"d", b"abcde", b"ab", b" "] and texts[5] == "你".encode() and texts[-1] == b"\n\n"
    assert world.bos_id == 0 and world.decode([0]) == "" and world.token_text(0) == "<|endoftext|>"
    assert world.decode([60_000]) == ""  # a row of the padding


@pytest.mark.parametrize("text", ["", "abab cde", "你好", "😀\n\n\n", "a\u0301"])
def test_world_round_trips(world: Any, text: str) -> None:
    assert world.decode(world.encode(text, False)) == text


@pytest.mark.parametrize("content", ["", "1 'a' 2\n", "1 __import__('os') 1\n", "x\n"])
def test_a_damaged_vocabulary_is_typed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(CorruptModel):
        world_codec(path)


def test_the_tokenizer_follows_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text, sidecars = load.read_text(path, 256, "auto")
    assert text.encode("hi", True) == [104, 105] and sidecars.eos_ids == {0}
    for vocab, choice, words in ((1000, "auto", "vocabulary of 1,000"), (300, "world", "'world'"), (50_277, "auto", "20B|Pile")):
        with pytest.raises(IncompatibleModel, match=words) as refused:
            load.read_text(path, vocab, choice)
        assert "tokenizer" in refused.value.hint
    assert WORLD_SIZE == 65_536


# --- states ---------------------------------------------------------------------------------------------------------


class Tensor:
    """As much of a tensor as the cache asks for; `value` is what has been read."""

    device = "here"

    def __init__(self, value: tuple[int, ...]) -> None:
        self.value = value

    def numel(self) -> int:
        return 25

    def element_size(self) -> int:
        return 4

    def to(self, device: str, *, copy: bool) -> Tensor:
        assert copy
        return Tensor(self.value)


def read(cache: StateCache, ids: list[int]) -> int:
    """What the runner does with a prompt; the number of ids that were not read again."""
    cached = cache.reuse(ids)
    assert cache.ids == ids[:cached]
    assert cache.state is None or cache.state[0].value == tuple(cache.ids)
    for i, token in enumerate(ids[cached:], cached + 1):
        cache.ids.append(token)
        cache.state = [Tensor(tuple(cache.ids))]
        if cache.due():
            cache.keep(place=True)
        if i == len(ids) - 1:
            cache.keep(place=False)
    return cached


def test_states_are_found_again() -> None:
    cache = StateCache(10**6, every=4)
    prompt = list(range(10))
    assert read(cache, prompt) == 0
    assert read(cache, prompt) == 9
    assert read(cache, [*prompt, 50, 51]) == 10, "the live state goes on"
    assert read(cache, [*prompt, 60]) == 10, "a branch finds where the answer began"
    assert read(cache, [*prompt[:6], 99]) == 4, "an edited message goes back to the last one kept before it"
    assert read(cache, [7, 8]) == 0
    assert read(cache, [*prompt, 50, 51, 52]) == 12


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30), st.integers(0, 1500), st.integers(1, 5))
def test_a_state_is_never_another_texts(prompts: list[list[int]], budget: int, every: int) -> None:
    cache = StateCache(budget, every)
    for prompt in prompts:
        assert read(cache, prompt) < len(prompt)
        assert cache.bytes <= budget


def test_ends_of_texts_outlive_places_inside() -> None:
    cache = StateCache(1200, every=1)
    read(cache, [1, 2, 3])
    read(cache, list(range(100, 140)))
    assert read(cache, [1, 2, 3]) == 2

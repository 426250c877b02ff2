"""Images in the llama.cpp loader without llama.cpp: the layout check, prompts with images, what the KV cache shares."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from loaders import _llama_mtmd as mtmd
from loaders._llama_capi import NoLlamaLibrary, Params
from loaders._llama_generate import LlamaRunner
from loaders._llama_vision import Prompt, Span, _stand_in
from modules.engine import CancelToken

MARKER = 0x7F00


def defaults(**changes: Any) -> Params:
    values = {
        "use_gpu": True,
        "print_timings": True,
        "n_threads": 4,
        "media_marker": MARKER,
        "flash_attn_type": -1,
        "warmup": True,
    }
    params = Params()
    for name, value in (values | {"image_min_tokens": -1, "image_max_tokens": -1} | changes).items():
        params.set(*mtmd._CONTEXT[name], value)
    return params


def test_the_layout_is_checked_by_the_librarys_own_defaults() -> None:
    mtmd.check_layout(defaults(), MARKER)
    for name, value in (("n_threads", 8), ("warmup", False), ("image_marker", 1), ("media_marker", MARKER + 8)):
        with pytest.raises(NoLlamaLibrary, match=name):
            mtmd.check_layout(defaults(**{name: value}), MARKER)
    moved = defaults()
    raw = bytes(moved.raw)
    struct.pack_into("96s", moved.raw, 8, raw[:96])
    with pytest.raises(NoLlamaLibrary):
        mtmd.check_layout(moved, MARKER)


def with_images(*parts: tuple[str, int, int]) -> Prompt:
    """Parts as (name, positions, tokens); a name of letters is words, one that begins with ! an image."""
    ids: list[int] = []
    spans: list[Span] = []
    for name, positions, tokens in parts:
        if name.startswith("!"):
            spans.append(Span(len(ids), len(ids) + positions, tokens, 1))
            ids += [_stand_in(name)] * positions
        else:
            ids += [ord(letter) for letter in name]
    return Prompt(ids, tuple(spans))


def words(text: str) -> tuple[str, int, int]:
    return text, 0, 0


def test_tokens_are_the_cells_of_the_cache() -> None:
    prompt = with_images(words("ab"), ("!red", 4, 8), words("cd"), ("!blue", 3, 3), words("e"))
    assert len(prompt.ids) == 12 and prompt.words == [ord(letter) for letter in "abcde"]
    assert [prompt.tokens(place) for place in (0, 2, 6, 8, 11, 12)] == [0, 2, 10, 12, 15, 16]
    assert with_images(words("abc")).tokens(2) == 2


class Memory:
    """llama.cpp's KV cache as the runner sees it."""

    def __init__(self, held: list[int]) -> None:
        self.removed: list[int] = []
        self.runner: Any = LlamaRunner.__new__(LlamaRunner)
        self.runner._ids, self.runner._memory = list(held), 0
        self.runner._lib = SimpleNamespace(llama_memory_seq_rm=self.remove, llama_memory_clear=lambda *_: self.removed.append(0))

    def remove(self, memory: int, sequence: int, start: int, end: int) -> bool:
        self.removed.append(start)
        return True


RED = with_images(words("see "), ("!red", 3, 9), words(" now"))


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        (RED, 10),  # all but the last token, whose logits are needed
        (with_images(words("see "), ("!red", 3, 9), words(" and")), 8),
        (with_images(words("see "), ("!blue", 3, 9), words(" now")), 4),
        (with_images(words("see the words")), 4),
        (with_images(words("say "), ("!red", 3, 9)), 1),
        (with_images(("!red", 3, 9), words("x")), 0),
        # Cut inside the image, as its last token must be read again: the image is read as a whole.
        (with_images(words("see "), ("!red", 3, 9)), 4),
    ],
)
def test_a_prefix_ends_before_an_image_that_is_another(prompt: Prompt, shared: int) -> None:
    memory = Memory(RED.ids)
    assert memory.runner._reuse(prompt) == shared
    assert memory.runner._ids == RED.ids[:shared] and memory.removed == [shared]


class Eyes:
    """A projector whose image is cancelled while it is read (`while_reading`), or while it is put into the cache."""

    def __init__(self, cancel: CancelToken, *, while_reading: bool) -> None:
        self.cancel, self.while_reading = cancel, while_reading
        self.decoded = 0

    def encode(self, span: Span) -> object:
        if self.while_reading:
            self.cancel.cancel()
        return object()

    def decode(self, span: Span, vectors: object) -> int:
        self.decoded += 1
        self.cancel.cancel()
        return 2  # llama_decode: aborted


@pytest.mark.parametrize("while_reading", [True, False])
def test_a_cancelled_image_leaves_nothing_of_itself(while_reading: bool) -> None:
    memory, cancel = Memory(RED.ids[:4]), CancelToken()
    eyes = Eyes(cancel, while_reading=while_reading)
    memory.runner._model = SimpleNamespace(vision=eyes, set_abort=lambda _: None, n_batch=512)
    assert list(memory.runner._prefill(RED, 4, cancel)) == [4]
    assert memory.runner._ids == RED.ids[:4], "the words before it are kept"
    assert (eyes.decoded, memory.removed) == ((0, []) if while_reading else (1, [4]))


def test_each_image_has_a_number_of_its_own() -> None:
    numbers = {_stand_in(name) for name in ("a 1 4 8", "a 2 4 8", "a 1 3 8", "b 1 4 8")}
    assert len(numbers) == 4 and all(number < 0 for number in numbers)

"""Classifier-free guidance for llama.cpp: a second context on the same weights reads the negative prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loaders._llama_capi import Token
from loaders._logits import guidance_of, negative_ids
from modules.errors import GenerateOutOfMemory, GenerationFailed, LoadError
from modules.sampler_math import guided

if TYPE_CHECKING:
    from loaders._llama_load import LlamaModel
    from modules.engine import CancelToken


class Guidance:
    """The guided row is written over llama.cpp's own logits of the last decode, so that every sampler and grammar works on it.
    Close it when done."""

    def __init__(self, model: LlamaModel, negative: Sequence[int], scale: float, length: int) -> None:
        self._model, self._lib, self._scale = model, model.lib, scale
        self._negative = list(negative)
        self._one = (Token * 1)()
        self._batch = self._lib.llama_batch_get_one(self._one, 1)
        try:
            self._ctx = model.new_context(length)
        except LoadError as error:
            raise GenerateOutOfMemory(
                "The memory is too small for a second context, which guidance needs.",
                hint="Leave guidance_scale out, or load the model with a smaller context.",
            ) from error

    def start(self, cancel: CancelToken) -> None:
        """Read the negative prompt; guide the logits after the prompt. Stops early when cancelled."""
        for start in range(0, len(self._negative), self._model.n_batch):
            if cancel.cancelled:
                return
            part = self._negative[start : start + self._model.n_batch]
            tokens = (Token * len(part))(*part)  # the batch only points at them
            self._decode(self._lib.llama_batch_get_one(tokens, len(part)))
        self._combine()

    def next(self, token: int) -> None:
        """Guide the logits after `token`, which the model's own context has read already."""
        self._one[0] = token
        self._decode(self._batch)
        self._combine()

    def close(self) -> None:
        self._lib.llama_free(self._ctx)

    def _decode(self, batch: Any) -> None:
        status = self._lib.llama_decode(self._ctx, batch)
        if status:
            raise GenerationFailed(f"llama.cpp could not read the negative prompt (code {status}).", hint="Try again.")

    def _combine(self) -> None:
        row = self._model.logits()
        row[:] = guided(row, self._model.logits(ctx=self._ctx), self._scale)


def guidance(
    model: LlamaModel, sampling: Mapping[str, Any], prompt: Sequence[int], answer: int
) -> tuple[Guidance | None, dict[str, Any]]:
    """(what guides this request, or None; its parameters for the receipt). `answer` is the longest answer in tokens."""
    on = guidance_of(sampling)
    if not on or answer <= 0:
        return None, on
    negative = negative_ids(on, model.encode, prompt, model.context_length, answer)
    return Guidance(model, negative, on["guidance_scale"], len(negative) + answer), on

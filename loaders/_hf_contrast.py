"""Contrastive search (Su et al. 2022, arXiv 2202.06417): the likely token that is the least like the text so far.

Of the k likeliest tokens v the one with the largest (1 - alpha) * p(v) - alpha * max over j of cos(h(v), h(j)) is taken, where
h(v) is the last hidden state after v and h(j) those of all tokens before it, the prompt's too. The k tokens are computed as one
batch on copies of the KV cache, so a token costs about one pass of k rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loaders import _hf_compat
from modules import sampling as table
from modules.samplers import CHOOSERS

if TYPE_CHECKING:
    from loaders._hf_generate import HfRunner
    from modules.engine import CancelToken
    from modules.samplers import SamplerChain

# Each candidate has a copy of the KV cache.
MOST_CANDIDATES = 32
_PICKS = "Contrastive search picks the token."
_ALONE = "Contrastive search reads one prompt and computes every token by itself."
_LOST = dict.fromkeys(CHOOSERS - {"top_k"} | {"temperature"}, _PICKS) | dict.fromkeys(
    ("guidance_scale", "negative_prompt", "prompt_lookup_num_tokens"), _ALONE
)


def settings(sampler: dict[str, Any], *, images: bool = False) -> tuple[tuple[float, int] | None, dict[str, Any], dict[str, str]]:
    """((alpha, k) or None for another way to pick, the parameters for `SamplerChain`, what is ignored and why)."""
    on = table.active(sampler)
    if "penalty_alpha" not in on:
        return None, sampler, {}
    if images:
        return None, sampler, {"penalty_alpha": "Contrastive search reads no images."}
    count = min(int(on.get("top_k", 0)), MOST_CANDIDATES)
    if count < 2:
        return None, sampler, {"penalty_alpha": "Contrastive search needs a top_k of 2 or more."}
    left = {name: value for name, value in sampler.items() if name not in _LOST and name not in ("penalty_alpha", "top_k")}
    ignored = {name: reason for name, reason in _LOST.items() if name in on and (name, on[name]) != ("temperature", 0)}
    return (float(on["penalty_alpha"]), count), left | {"temperature": 0.0}, ignored


class ContrastiveSearch:
    """One generation's search, with a KV cache of its own: it needs the hidden states of the whole text, which the cache kept
    between requests does not hold. Penalties, biases and grammars work on the logits before the k likeliest are taken."""

    def __init__(self, runner: HfRunner, alpha: float, count: int) -> None:
        import torch

        self._torch = torch
        self._runner, self._alpha, self._count = runner, alpha, count
        self._decoder = _hf_compat.decoder_of(runner.model)
        self._cache = _hf_compat.new_cache(runner.model)
        self._past: Any = None  # [capacity, width], of length 1 each
        self._length = 0
        self._row: Any = None  # the logits after the token taken last
        self._taken: int | None = None  # its row in the cache

    def prefill(self, ids: list[int], chunk: int, cancel: CancelToken) -> Iterator[tuple[int, Any]]:
        """(tokens read, logits of the last of them) after each chunk; stops early when cancelled."""
        for start in range(0, len(ids), chunk):
            if cancel.cancelled:
                return
            part = ids[start : start + chunk]
            logits, states = self._forward([part])
            self._remember(states[0])
            yield start + len(part), logits[0] if start + len(part) == len(ids) else None

    def start(self, logits: Any) -> Any:
        return logits

    def pick(self, chain: SamplerChain, row: Any, ban_ends: bool) -> int:
        """The next token from one row of logits (numpy, [vocab])."""
        torch = self._torch
        tokens, chances = chain.likeliest(row, self._count, ban_ends=ban_ends)
        rows = torch.full((len(tokens),), self._taken or 0)
        self._cache.reorder_cache(rows)  # one copy of the text so far for each candidate
        logits, states = self._forward([[int(token)] for token in tokens])
        states = self._scaled(states[:, -1])
        likeness = (states @ self._past[: self._length].T).amax(dim=1).cpu()
        scores = (1 - self._alpha) * torch.as_tensor(chances, dtype=torch.float32) - self._alpha * likeness
        best = int(scores.argmax())
        self._taken, self._row = best, logits[best]
        self._remember(states[best : best + 1])
        token = int(tokens[best])
        chain.accept(token)
        return token

    def next(self, token: int) -> Any:
        """The logits after the token that was picked: they are there already."""
        return self._row

    def close(self) -> None:
        self._cache = self._past = self._row = None

    def _forward(self, rows: list[list[int]]) -> tuple[Any, Any]:
        """(logits [rows, vocab] of each row's last token, last hidden states [rows, tokens, width]) after the cache."""
        caught: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            caught.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

        hook = self._decoder.register_forward_hook(keep)
        try:
            logits = self._runner.run_model(rows, self._cache, 1)
        finally:
            hook.remove()
        return logits[:, -1], caught[-1]

    def _scaled(self, states: Any) -> Any:
        return self._torch.nn.functional.normalize(states.float(), dim=-1)

    def _remember(self, states: Any) -> None:
        needed = self._length + len(states)
        if self._past is None or needed > len(self._past):
            grown = states.new_empty((max(needed, 2 * self._length, 256), states.shape[-1]), dtype=self._torch.float32)
            if self._past is not None:
                grown[: self._length] = self._past[: self._length]
            self._past = grown
        self._past[self._length : needed] = self._scaled(states)
        self._length = needed

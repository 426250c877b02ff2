"""The KV cache kept between requests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from loaders import _hf_compat


class PrefixCache:
    """The KV cache of the last request and the ids it holds, so that the next turn computes only what is new."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.cache: Any = None
        self.ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache down to what it shares with `prompt`; the number of tokens that need not be computed again.

        At least the last token is left over: its logits are needed.
        """
        shared = 0
        limit = min(len(self.ids), len(prompt) - 1)
        while shared < limit and self.ids[shared] == prompt[shared]:
            shared += 1
        if self.cache is None or shared == 0 or not self.cut(shared):
            self.reset()
            return 0
        return shared

    def can_cut(self) -> bool:
        """Whether `cut` works for this model's cache."""
        return self.cache is not None and _hf_compat.can_crop(self.cache)

    def cut(self, length: int) -> bool:
        """Forget what is behind the first `length` tokens; False where that is not possible."""
        surplus = len(self.ids) - length
        if surplus:
            if not _hf_compat.can_crop(self.cache):
                return False
            try:
                self.cache.crop(-surplus)
            except (RuntimeError, ValueError) as error:
                print(f"prefix cache: {error}", file=sys.stderr)
                return False
            del self.ids[length:]
        return True

    def reset(self) -> None:
        self.cache = _hf_compat.new_cache(self._model)
        self.ids = []

"""Ways to decode that need the model, not only its logits: guidance by a second prompt, and drafts looked up in the text.

Both stand between the decode loop and `HfRunner.forward`: `next(token)` gives the logits that the next token is picked from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders._hf_generate import HfRunner

# The longest end of the text that is looked for earlier in it, then shorter ones.
LONGEST_NGRAM = 3


class Guidance:
    """Classifier-free guidance (Sanchez et al. 2023): log-probabilities pushed away from those after the negative prompt.

    guided = negative + scale * (positive - negative), on log-softmax scores. Without a negative prompt the prompt's last token
    alone stands for it, as in HF transformers. Costs a second forward pass and a second KV cache.
    """

    def __init__(self, runner: HfRunner, negative_ids: list[int], scale: float, cache: Any) -> None:
        self._runner, self._scale, self._cache = runner, scale, cache
        self._waiting = list(negative_ids)

    def start(self, logits: Any) -> Any:
        """The guided row for the positive prompt's `logits` [vocab]."""
        chunk = self._runner.chunk
        for start in range(0, len(self._waiting), chunk):
            negative = self._runner.forward(self._cache, self._waiting[start : start + chunk], 1)
        self._waiting = []
        calm = negative.float().log_softmax(dim=-1)
        return calm + self._scale * (logits.float().log_softmax(dim=-1) - calm)

    def next(self, token: int) -> Any:
        self._waiting = [token]
        return self.start(self._runner.forward(self._runner.prefix, [token], 1))

    def close(self) -> None:
        """Nothing to put back: the second cache goes with this object."""


class PromptLookup:
    """Prompt-lookup decoding (Saxena 2023): what followed the same words earlier is tried as a draft, several tokens in one
    pass. Only tokens that are picked anyway are kept, so the text is the same; it comes faster where the text repeats itself.
    """

    def __init__(self, runner: HfRunner, ids: list[int], length: int, room: int) -> None:
        self._runner, self._length, self._room = runner, length, room
        self._text = list(ids)
        self._draft: list[int] = []  # in the KV cache, not picked yet
        self._rows: list[Any] = []  # the logits after each of them
        self.accepted = 0

    def start(self, logits: Any) -> Any:
        return logits

    def next(self, token: int) -> Any:
        self._text.append(token)
        self._room -= 1
        if self._draft and self._draft[0] == token:
            self._draft.pop(0)
            self.accepted += 1
            return self._rows.pop(0)
        self.close()
        self._draft = self._look_up()
        rows = self._runner.forward(self._runner.prefix, [token, *self._draft], 1 + len(self._draft))
        if not self._draft:
            return rows
        self._rows = list(rows[1:])
        return rows[0]

    def close(self) -> None:
        """Take the draft that was not picked out of the KV cache."""
        if self._draft and not self._runner.prefix.cut(len(self._runner.prefix.ids) - len(self._draft)):
            raise RuntimeError("The KV cache could not be cut back.")
        self._draft, self._rows = [], []

    def _look_up(self) -> list[int]:
        text = self._text
        limit = min(self._length, self._room - 1)
        if limit <= 0:
            return []
        for size in range(min(LONGEST_NGRAM, len(text) - 1), 0, -1):
            end = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == end:
                    return text[start + size : start + size + limit]
        return []

"""Tokens -> events: detokenising, stop sequences and length limits, once for every loader that yields token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modules.schema import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from modules.stopping import StopMatcher

if TYPE_CHECKING:
    from modules.detokenize import Detokenizer
    from modules.grammar import Constraint


class TokenAssembler:
    """Give it each sampled token; it gives the event to yield and says when to stop.

    `eos_ids` end the text and are not shown; `room` is the number of tokens the context still holds, `limit` the most there may
    be. `constraint` ends the text where its grammar does, and only there: a minimum length or ignore_eos mean nothing beside it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        eos_ids: frozenset[int],
        room: int,
        constraint: Constraint | None = None,
    ) -> None:
        stop = request.stop
        self._constraint = constraint
        self._request_id = request.request_id
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop.stop)
        self.limit = room if stop.max_tokens is None else min(stop.max_tokens, room)
        self._min_tokens = stop.min_tokens if constraint is None else 0
        ends_itself = constraint is not None or not stop.ignore_eos
        self._ends = frozenset(stop.stop_token_ids) | (eos_ids if ends_itself else frozenset())
        self._pending_ids: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []
        self.count = 0
        self.finish_reason: FinishReason | None = "length" if self.limit <= 0 else None

    @property
    def stop_match(self) -> str | None:
        return self._matcher.match

    @property
    def may_end(self) -> bool:
        """False while min_tokens forbids an end: the sampler should then ban the end tokens."""
        return self.count >= self._min_tokens

    @property
    def end_ids(self) -> frozenset[int]:
        return self._ends

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> TokenEvent | None:
        """The event for this token, or None where it only ended the text. Sets `finish_reason` when generation is over."""
        self.count += 1
        if token_id in self._ends and self.count > self._min_tokens:
            self.finish_reason = "stop"
            return self._event(self._end_text())
        self._pending_ids.append(token_id)
        if logprob is not None:
            self._pending_logprobs.append(logprob)
        text = self._matcher.feed(self._detokenizer.push(token_id))
        if self._matcher.match is not None:
            self.finish_reason = "stop"
        elif self._constraint is not None and self._constraint.complete:
            self.finish_reason = "stop"
            text += self._end_text()
        elif self.count >= self.limit:
            self.finish_reason = "length"
            text += self._end_text()
        return self._event(text)

    def cancel(self) -> TokenEvent | None:
        """The held-back text, when the request was cancelled."""
        self.finish_reason = "cancelled"
        return self._event(self._end_text())

    def _end_text(self) -> str:
        """What the detokenizer and the matcher still hold. A stop sequence may complete in it."""
        return self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()

    def _event(self, text: str) -> TokenEvent | None:
        if not text and not self._pending_ids:
            return None
        event = TokenEvent(self._request_id, self.count - 1, tuple(self._pending_ids), text, tuple(self._pending_logprobs))
        self._pending_ids.clear()
        self._pending_logprobs.clear()
        return event

"""Stored responses, for previous_response_id and GET: in memory, with bounds. The oldest go first; a restart forgets them all."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """`messages` is the conversation up to and with the answer, `body` the response object, `input_items` what was sent.
    `owner` names the key it was made with: no other may read it."""

    messages: list[dict[str, Any]]
    body: dict[str, Any]
    input_items: list[dict[str, Any]]
    owner: str
    size: int


class ResponseStore:
    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._bytes = 0

    def put(self, messages: list[dict[str, Any]], body: dict[str, Any], input_items: list[dict[str, Any]], owner: str) -> None:
        size = len(json.dumps([messages, body, input_items]))
        if size > self._max_bytes:
            return
        self._stored[body["id"]] = Stored(messages, body, input_items, owner, size)
        self._bytes += size
        while len(self._stored) > self._max_responses or self._bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, response_id: str, owner: str) -> Stored | None:
        found = self._stored.get(response_id)
        if found is None or found.owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return found

    def delete(self, response_id: str, owner: str) -> bool:
        found = self.get(response_id, owner)
        if found is None:
            return False
        del self._stored[response_id]
        self._bytes -= found.size
        return True

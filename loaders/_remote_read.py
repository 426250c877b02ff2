"""A piece of a streamed answer, of any kind of server, as text, token ids, log-probabilities and its end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from modules.schema import GenerationRequest, TokenLogprob, Usage


@dataclass
class Chunk:
    """`finish_reason` and what follows are the end's."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_match: str | None = None
    usage: Usage | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    def merge(self, later: Chunk) -> None:
        """Take over what the end of an answer says."""
        self.finish_reason = later.finish_reason or self.finish_reason
        self.stop_match = later.stop_match or self.stop_match
        self.usage = later.usage or self.usage
        self.receipt = later.receipt or self.receipt


class ChatReader:
    """Deltas of a chat as one text, the way a model writes it: reasoning in <think>, calls in <tool_call>.

    Everything above reads that text as it reads any model's, so a server that takes reasoning and calls apart and one that does
    not give the same answer.
    """

    def __init__(self) -> None:
        self._thinking = False
        self._call: int | None = None
        self._arguments = ""

    def feed(self, delta: dict[str, Any]) -> str:
        text = ""
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            text += ("" if self._thinking else "<think>\n") + thought
            self._thinking = True
        content = delta.get("content")
        if isinstance(content, str) and content:
            text += self._end_thought() + self._end_call() + content
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                text += self._end_thought() + self._tool_call(call)
        return text

    def close(self) -> str:
        """What is still open at the end."""
        return self._end_thought() + self._end_call()

    def _tool_call(self, call: dict[str, Any]) -> str:
        text = ""
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        index, name = call.get("index", 0), function.get("name")
        if isinstance(name, str) and name and (self._call is None or index != self._call or self._arguments):
            text += self._end_call() + f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            self._call = index if isinstance(index, int) else 0
        arguments = function.get("arguments")
        if isinstance(arguments, dict):  # Ollama's own form
            arguments = json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and self._call is not None:
            self._arguments += arguments
            text += arguments
        return text

    def _end_thought(self) -> str:
        ended, self._thinking = self._thinking, False
        return "\n</think>\n\n" if ended else ""

    def _end_call(self) -> str:
        if self._call is None:
            return ""
        missing = "" if self._arguments.strip() else "{}"
        self._call, self._arguments = None, ""
        return f"{missing}}}\n</tool_call>\n"


def read_chunk(event: dict[str, Any], chat: ChatReader | None, logprobs: int | None) -> Chunk:
    """One object of the stream, or a whole answer. What is of a wrong type is left out: it is a stranger's."""
    chunk = Chunk(usage=_usage(event.get("usage")))
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if choice is None:
        return chunk
    if chat is not None:
        delta = choice.get("delta") or choice.get("message")
        chunk.text = chat.feed(delta) if isinstance(delta, dict) else ""
    else:
        text = choice.get("text")
        chunk.text = text if isinstance(text, str) else ""
    ids = choice.get("token_ids")
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        chunk.token_ids = tuple(ids)
    if logprobs is not None and isinstance(choice.get("logprobs"), dict):
        chunk.logprobs = _logprobs(choice["logprobs"], chunk.token_ids, logprobs)
    reason = choice.get("finish_reason")
    if isinstance(reason, str) and reason:
        chunk.finish_reason = reason
        match = choice.get("stop_reason")
        chunk.stop_match = match if isinstance(match, str) else None
    receipt = event.get("receipt")
    if isinstance(receipt, dict):
        chunk.receipt = receipt
        match = receipt.get("stop_match")
        chunk.stop_match = match if isinstance(match, str) else chunk.stop_match
    return chunk


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(_count(value.get("prompt_tokens")), _count(value.get("completion_tokens")), _count(cached))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _logprobs(value: dict[str, Any], ids: tuple[int, ...], most: int) -> tuple[TokenLogprob, ...]:
    """OpenAI's two forms: lists side by side (completions), or an object for each token (chats, llama-server)."""
    if isinstance(value.get("content"), list):
        rows = [_from_object(item, most) for item in value["content"] if isinstance(item, dict)]
    else:
        rows = _from_lists(value, most)
    if len(rows) == len(ids):
        rows = [TokenLogprob(i, row.text, row.logprob, row.top) for i, row in zip(ids, rows, strict=True)]
    return tuple(rows)


def _from_object(item: dict[str, Any], most: int) -> TokenLogprob:
    top = item.get("top_logprobs")
    candidates = tuple(_candidate(c) for c in top if isinstance(c, dict)) if isinstance(top, list) else ()
    return TokenLogprob(*_candidate(item), candidates[:most])


def _candidate(item: dict[str, Any]) -> tuple[int, str, float]:
    number = item.get("id")
    return number if isinstance(number, int) else -1, str(item.get("token", "")), _float(item.get("logprob"))


def _from_lists(value: dict[str, Any], most: int) -> list[TokenLogprob]:
    tokens, values, tops = (value.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs"))
    exact = value.get("top_tokens")  # a Switchyard's, with the ids
    rows = []
    for index, (text, logprob) in enumerate(zip(tokens, values)):  # noqa: B905 - a stranger's lists
        top: tuple[tuple[int, str, float], ...] = ()
        if isinstance(exact, list) and index < len(exact) and isinstance(exact[index], list):
            top = tuple((int(c[0]), str(c[1]), _float(c[2])) for c in exact[index] if isinstance(c, list) and len(c) == 3)
        elif index < len(tops) and isinstance(tops[index], dict):
            ranked = sorted(tops[index].items(), key=lambda pair: -_float(pair[1]))
            top = tuple((-1, str(t), _float(v)) for t, v in ranked)
        rows.append(TokenLogprob(-1, str(text), _float(logprob), top[:most]))
    return rows


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def prompt_estimate(request: GenerationRequest) -> int:
    """Tokens of a prompt before the server has counted them: about four bytes each."""
    if request.token_ids is not None:
        return len(request.token_ids)
    if request.chat is not None:
        return sum(len(str(m.get("content") or "").encode("utf-8", "replace")) // 4 + 4 for m in request.chat.messages)
    return max(1, len((request.prompt or "").encode("utf-8", "replace")) // 4)

"""Answers in OpenAI's forms: chat completions and completions, whole and streamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from modules.api import sse
from modules.api.errors import body_of
from modules.api.job import Finish, Queued, Reasoning, Started, Text, ToolCallArguments, ToolCallStart
from modules.caller import request_id
from modules.errors import AppError

if TYPE_CHECKING:
    from modules.api.job import Choice, Job, Outcome
    from modules.schema import TokenLogprob, Usage

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Form:
    """What differs between the two endpoints' answers."""

    prefix: str
    name: str
    chunk_name: str

    def opening(self) -> str | None:
        """The JSON of the first delta of a choice, where there is one."""
        return None

    def delta(self, text_json: str) -> str:
        raise NotImplementedError

    def choice(self, outcome: Outcome) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self) -> str | None:
        return '"delta":{"role":"assistant","content":""}'

    def delta(self, text_json: str) -> str:
        return f'"delta":{{"content":{text_json}}}' if text_json else '"delta":{}'

    def choice(self, outcome: Outcome) -> dict[str, Any]:
        text = outcome.text if outcome.text or not outcome.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if outcome.reasoning:
            message["reasoning_content"] = outcome.reasoning
        if outcome.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in outcome.tool_calls
            ]
        return {"message": message}

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        content = [
            {**entry(item.text, item.logprob), "top_logprobs": [entry(text, value) for _, text, value in item.top]}
            for item in items
        ]
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def delta(self, text_json: str) -> str:
        return f'"text":{text_json}' if text_json else '"text":""'

    def choice(self, outcome: Outcome) -> dict[str, Any]:
        return {"text": outcome.text}

    def logprobs(self, items: list[TokenLogprob], text: str, offset: int, *, prompt_first: bool) -> dict[str, Any]:
        """With `prompt_first`, the first item is the prompt's first token, which has nothing before it to be likely after."""
        offsets = []
        at = 0
        for item in items:
            offsets.append(offset + at)
            if text.startswith(item.text, at):  # a special token such as BOS is no part of the text
                at += len(item.text)
        values: list[float | None] = [item.logprob for item in items]
        # The chosen token is always among them, in addition to the likeliest ones.
        tops: list[dict[str, float] | None] = [{**{t: v for _, t, v in item.top}, item.text: item.logprob} for item in items]
        if prompt_first and items:
            values[0] = tops[0] = None
        return {
            "tokens": [item.text for item in items],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def whole(job: Job, form: Form, *, best: tuple[int, int] | None = None) -> dict[str, Any]:
    """One JSON body. `best` (n, best_of) keeps, of each prompt's best_of answers, the n with the likeliest tokens."""
    answers = [(choice, await choice.outcome()) async for choice in job.choices()]
    if best is not None:
        answers = _best(answers, *best)
    choices = []
    for index, (choice, outcome) in enumerate(answers):
        given = choice.turn.logprobs is not None and best is None
        logprobs = form.logprobs(outcome.logprobs, outcome.text, 0, prompt_first=choice.turn.echo) if given else None
        if logprobs is not None and choice.turn.return_token_ids:
            logprobs["top_tokens"] = [item.top for item in outcome.logprobs]
        made = {"index": index, **form.choice(outcome), "logprobs": logprobs, "finish_reason": outcome.finish_reason}
        if choice.turn.return_token_ids:
            made["token_ids"] = outcome.token_ids
        choices.append(made)
    return {
        "id": form.prefix + request_id(),
        "object": form.name,
        "created": job.created,
        "model": job.model_id,
        "choices": choices,
        "usage": usage_body(job.usage()),
        **job.extension(),
    }


def _best(answers: list[tuple[Choice, Outcome]], n: int, best_of: int) -> list[tuple[Choice, Outcome]]:
    kept: list[tuple[Choice, Outcome]] = []
    for start in range(0, len(answers), best_of):
        group = answers[start : start + best_of]
        kept += sorted(group, key=lambda pair: -_mean_logprob(pair[1]))[:n]
    return kept


def _mean_logprob(outcome: Outcome) -> float:
    values = [item.logprob for item in outcome.logprobs]
    return sum(values) / len(values) if values else float("-inf")


class Streamer:
    """Chunks of one request. Most of a chunk never changes, so only its middle is made anew for a token."""

    def __init__(self, form: Form, *, include_usage: bool) -> None:
        self._form = form
        self._include_usage = include_usage
        self._nothing = ',"usage":null' if include_usage else ""
        self._id = form.prefix + request_id()

    async def __call__(self, job: Job, write: sse.Writer) -> None:
        try:
            async for choice in job.choices():
                await self._choice(write, job, choice)
        except AppError as error:
            await write(sse.event(dumps(body_of(error))))
            return
        if self._include_usage:  # a last chunk without choices; clients that did not ask for it get none
            await write(f'{self._head(job)}],"usage":{dumps(usage_body(job.usage()))}}}\n\n'.encode())
        await write(sse.DONE)

    def _head(self, job: Job) -> str:
        """Up to the choices. The model is known for certain once it was this request's turn."""
        begin = f'data: {{"id":"{self._id}","object":"{self._form.chunk_name}","created":{job.created},'
        return f'{begin}"model":{dumps(job.model_id)},"choices":['

    async def _choice(self, write: sse.Writer, job: Job, choice: Choice) -> None:
        form = self._form
        begin, end = "", f',"logprobs":null,"finish_reason":null}}]{self._nothing}}}\n\n'
        offset = 0
        async for event in choice.events():
            kind = type(event)
            if kind is Text:
                assert isinstance(event, Text)
                if event.logprobs or choice.turn.return_token_ids:
                    close = self._details(choice, event, offset)
                    offset += len(event.text)
                    await write(f"{begin}{form.delta(dumps(event.text))}{close}".encode())
                else:
                    await write(f"{begin}{form.delta(dumps(event.text))}{end}".encode())
            elif kind is Started:
                begin = f'{self._head(job)}{{"index":{choice.index},'
                opening = form.opening()
                if opening is not None:
                    await write(f"{begin}{opening}{end}".encode())
            elif isinstance(event, Queued):
                wait = "" if event.estimate_s is None else f", about {event.estimate_s:.0f} s"
                await write(sse.comment(f"position {event.position} in the queue{wait}"))
            elif isinstance(event, Finish):
                await self._finish(write, begin, event.outcome)
            else:
                await write(f"{begin}{_other_delta(event)}{end}".encode())

    def _details(self, choice: Choice, event: Text, offset: int) -> str:
        """The end of a chunk whose tokens are told one by one; `top_tokens` ([id, text, logprob]) is ours."""
        wanted = choice.turn.return_token_ids
        logprobs = None
        if event.logprobs:
            first = choice.turn.echo and offset == 0
            logprobs = self._form.logprobs(list(event.logprobs), event.text, offset, prompt_first=first)
            if wanted:
                logprobs["top_tokens"] = [item.top for item in event.logprobs]
        ids = f',"token_ids":{dumps(event.token_ids)}' if wanted else ""
        return f',"logprobs":{dumps(logprobs)}{ids},"finish_reason":null}}]{self._nothing}}}\n\n'

    async def _finish(self, write: sse.Writer, begin: str, outcome: Outcome) -> None:
        receipt = outcome.receipt
        extension = f',"warnings":{dumps(receipt["warnings"])},"receipt":{dumps(receipt)}' if receipt else ""
        reason = dumps(outcome.finish_reason)
        finish = f'{self._form.delta("")},"logprobs":null,"finish_reason":{reason}}}]{self._nothing}{extension}}}\n\n'
        await write(f"{begin}{finish}".encode())


def _other_delta(event: Any) -> str:
    """Reasoning and tool calls, which only chats have."""
    if isinstance(event, Reasoning):
        return f'"delta":{{"reasoning_content":{dumps(event.text)}}}'
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": event.id, "type": "function", "function": function}
    else:
        assert isinstance(event, ToolCallArguments)
        call = {"index": event.index, "function": {"arguments": event.text}}
    return f'"delta":{{"tool_calls":[{dumps(call)}]}}'

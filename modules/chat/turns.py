"""From a conversation's path to a prompt: messages, template, and what is left out when the context is too small."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules import sampling
from modules.chat.templates import FALLBACK_STOP
from modules.chat.vision import images_of, shape, without_pixels
from modules.errors import ContextLengthExceeded, InvalidParameter, TemplateError
from modules.schema import ChatInput, GenerationRequest, StopParams, features_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modules.chat.store import Node
    from modules.chat.templates import TemplateRenderer
    from modules.engine_client import EngineClient
    from modules.schema import ModelInfo

Message = dict[str, Any]

# Of the context, the share kept free for the answer while older turns can make room.
ANSWER_SHARE = 0.25
# Turns are dropped in blocks, so that the prompt's beginning stays the same for several turns and its KV cache is of use.
DROP_BLOCK = 4
# Text of fewer bytes than this can't have more tokens than bytes plus a few, in any tokenizer here.
SPARE_TOKENS = 8
OPENING = "[The conversation begins.]"


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """What the page's settings say about an answer, as they were when it was asked for."""

    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def stop_params(self, has_template: bool) -> StopParams:
        return StopParams(
            max_tokens=self.max_tokens,
            stop=self.stop if has_template else (*self.stop, *FALLBACK_STOP),
            ignore_eos=bool(self.sampling.get("ban_eos_token")),
        )


def build_messages(system_prompt: str, path: Sequence[Node], *, continued: bool = False) -> list[Message]:
    """The messages a model sees. Empty answers (failed, stopped at once) are left out, and messages of one role in a row,
    which many templates refuse, are joined. `continued` keeps the last answer as the one to go on with."""
    system = [system_prompt.strip()] if system_prompt.strip() else []
    messages: list[Message] = []
    for index, node in enumerate(path):
        if node.role == "system":
            system.append(node.text)
        elif node.role == "assistant" and not node.text.strip() and not (continued and index == len(path) - 1):
            continue
        elif messages and messages[-1]["role"] == node.role:
            messages[-1] = {"role": node.role, "content": f"{messages[-1]['content']}\n\n{node.text}"}
        else:
            messages.append({"role": node.role, "content": node.text})
    if system:
        messages.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return messages


@dataclass
class Prompt:
    """`tokens` once they were counted; `token_ids` where counting made them: then `text` is not needed. `messages` are what the
    text was made of."""

    text: str
    messages: list[Message]
    images: tuple[str, ...] = ()
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None


class PromptBuilder:
    """One prompt for one model. `warnings` collects what the receipt should say."""

    def __init__(
        self, renderer: TemplateRenderer, template: str | None, info: ModelInfo | None, client: EngineClient, warnings: list[str]
    ) -> None:
        self._renderer = renderer
        self._template = template
        self._info = info
        self._client = client
        self._warnings = warnings
        self._image_tokens = info.image_tokens if info is not None else 0
        self._renders_itself = "messages" in features_of(client.spec, info)

    async def request(self, messages: list[Message], answer: AnswerSettings, *, continued: bool) -> GenerationRequest:
        """Raises ContextLengthExceeded for a message that is too long by itself, and TemplateError."""
        prompt = await self._fitted(messages, answer.max_tokens, continued)
        as_text = not self._renders_itself
        return GenerationRequest(
            secrets.token_hex(12),
            prompt=prompt.text if as_text and prompt.token_ids is None else None,
            token_ids=prompt.token_ids if as_text else None,
            images=prompt.images,
            chat=None if as_text else ChatInput(without_pixels(prompt.messages), continued=continued),
            sampling=sampling.without_neutral(answer.sampling),
            stop=answer.stop_params(bool(self._template) or self._renders_itself),
            add_special=False,
        )

    async def _fitted(self, messages: list[Message], max_tokens: int | None, continued: bool) -> Prompt:
        if not any(message["role"] != "system" for message in messages):
            raise InvalidParameter("There is no message to answer.", param="messages")
        context = self._info.context_length if self._info is not None else 0
        text = await self._render(messages, continued)
        reserve = min(max_tokens or context, int(context * ANSWER_SHARE))
        budget = context - max(1, reserve)
        images = images_of(messages)
        if not context or _surely_fits(text, budget - len(images) * self._image_tokens):
            return Prompt(text, messages, images)
        prompt = await self._count(text, messages)
        if (prompt.tokens or 0) <= budget:
            return prompt
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        if starts:
            dropped, prompt = await self._drop(system, turns, starts, budget, continued)
            many = "message was" if dropped == 1 else "messages were"
            self._warnings.append(
                f"The {dropped} oldest {many} left out: the conversation is longer than this model's context of {context} tokens."
            )
        if (prompt.tokens or 0) >= context and not self._renders_itself:  # elsewhere this is an estimate: the server decides
            what = "The message and the system prompt have" if system else "The message has"
            raise ContextLengthExceeded(
                f"{what} {prompt.tokens} tokens; this model's context holds {context}.",
                hint="Shorten it, or load the model with a larger context.",
                param="messages",
            )
        return prompt

    async def _drop(
        self, system: list[Message], turns: list[Message], starts: list[int], budget: int, continued: bool
    ) -> tuple[int, Prompt]:
        """The fewest oldest turns to leave out so that the rest fits; all but the newest when nothing does."""
        tried: dict[int, Prompt] = {}

        async def fits(choice: int) -> bool:
            if choice not in tried:
                kept = [*system, *turns[starts[choice] :]]
                tried[choice] = await self._count(await self._render(kept, continued), kept)
            return (tried[choice].tokens or 0) <= budget

        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            if await fits(middle):
                high = middle
            else:
                low = middle + 1
        # `low` drops low + 1 turns. Up to the next block, if that leaves at least half of what fits.
        block = -(-(low + 1) // DROP_BLOCK) * DROP_BLOCK - 1
        if block < len(starts) and (len(starts) - block) * 2 >= len(starts) - low:
            low = block
        await fits(low)
        return starts[low], tried[low]

    async def _count(self, text: str, messages: list[Message]) -> Prompt:
        images = images_of(messages)
        if self._renders_itself:
            return Prompt(text, messages, images, await self._client.count(text) + len(images) * self._image_tokens)
        ids = tuple(await self._client.encode(text, False))
        if images:  # the worker puts their tokens in, so it wants the text
            return Prompt(text, messages, images, len(ids) + len(images) * self._image_tokens)
        return Prompt(text, messages, (), len(ids), ids)

    async def _render(self, messages: list[Message], continued: bool) -> str:
        """Templates differ in what they take: without a system role it goes into the first message, and a conversation that
        the assistant begins gets an opening. The receipt says so."""
        if self._renders_itself:
            return plain_text(messages)
        try:
            return await self._render_once(messages, continued)
        except TemplateError as error:
            adapted = _adapted(messages)
            if adapted == messages:
                raise
            try:
                text = await self._render_once(adapted, continued)
            except TemplateError:
                raise error from None
            note = "This model's template takes no system prompt: it was put before the first message."
            if messages[0]["role"] == "system" and note not in self._warnings:
                self._warnings.append(note)
            return text

    async def _render_once(self, messages: list[Message], continued: bool) -> str:
        info = self._info
        return await self._renderer.render(
            self._template,
            shape(messages, self._template, info),
            True,
            info.bos_token if info else None,
            info.eos_token if info else None,
            continue_final=continued and messages[-1]["role"] == "assistant" and bool(messages[-1]["content"]),
        )


def plain_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a conversation says, to count its tokens by where nobody here knows the template."""
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def _adapted(messages: list[Message]) -> list[Message]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else list(messages)
    if turns and turns[0]["role"] == "assistant":
        turns = [{"role": "user", "content": OPENING}, *turns]
    if system and turns:
        turns[0] = {**turns[0], "role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
        if "parts" in turns[0]:
            turns[0]["parts"] = [{"type": "text", "text": f"{system}\n\n"}, *turns[0]["parts"]]
    return turns


def _surely_fits(text: str, budget: int) -> bool:
    return len(text) + SPARE_TOKENS <= budget and len(text.encode("utf-8")) + SPARE_TOKENS <= budget

"""One model of one remote server: requests in its terms, streamed answers as events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loaders._remote_identify import Found, find
from loaders._remote_kinds import form_fields, stop_fields, to_native
from loaders._remote_read import ChatReader, Chunk, prompt_estimate, read_chunk
from loaders._remote_text import RemoteTokenizer
from modules.errors import AppError, ContextLengthExceeded, EngineError, RemoteBusy, RemoteError, UnsupportedParameter
from modules.images import to_data_url
from modules.remotes.connection import Connection
from modules.schema import ChatInput, Done, GenerationRequest, Timings, TokenEvent, Usage
from modules.stopping import StopMatcher

if TYPE_CHECKING:
    from modules.remotes.store import Server

Put = Callable[["TokenEvent | Done | Exception"], None]
MAX_WAIT_S = 30.0  # for a server that asks to come back later
MAX_TOP_LOGPROBS = 20
FINISHED = {"stop": "stop", "length": "length", "tool_calls": "stop", "function_call": "stop", "eos_token": "stop"}


class Remote:
    """Belongs to the event loop of its worker's http thread. Make one with `connect`."""

    def __init__(self, connection: Connection, found: Found, model: str, options: dict[str, Any]) -> None:
        self.found = found
        self.model = model
        self.tokenizer = RemoteTokenizer(connection, found.kind, model)
        self._connection = connection
        self._retries = options["busy_retries"]
        self._vision = options["vision"]
        self._no_tokenizer = found.kind.tokenizer is None

    @classmethod
    async def connect(cls, server: Server, model: str, options: dict[str, Any]) -> Remote:
        """Raises AppError: out of reach, a refused key, no such model."""
        connection = Connection(server, silence_s=options["silence_s"])
        try:
            remote = cls(connection, await find(connection, model), model, options)
            await remote._try_tokenizer()
        except BaseException:
            await connection.close()
            raise
        return remote

    async def close(self) -> None:
        await self._connection.close()

    async def _try_tokenizer(self) -> None:
        """A proxy in front of it may hide the routes that its kind has."""
        if not self._no_tokenizer:
            try:
                await self.tokenizer.encode("a", False)
            except AppError:
                self._no_tokenizer = True

    async def encode(self, text: str, add_special: bool) -> list[int]:
        """Raises UnsupportedParameter where the server, or what is in front of it, does not tell."""
        if self._no_tokenizer:
            raise self.tokenizer.none()
        return await self.tokenizer.encode(text, add_special)

    def lacks(self, *, plain_chat: bool) -> tuple[str, ...]:
        """Features and samplers of the loader that this model does without."""
        from loaders.remote import SPEC

        kind, entry = self.found.kind, self.found.entry
        features = set(kind.features)
        if kind.name == "switchyard" and isinstance(entry.get("capabilities"), list):
            features &= {*map(str, entry["capabilities"]), "messages"}
        if plain_chat:
            features.discard("messages")
        if self._no_tokenizer:
            features -= {"score", "embeddings", "echo"}
        if not self.sees(plain_chat=plain_chat):
            features.discard("vision")
        missing = (SPEC.features - features) | (SPEC.samplers - kind.samplers.keys())
        return tuple(sorted(missing | ({"tokenizer"} if self._no_tokenizer else set())))

    def sees(self, *, plain_chat: bool) -> bool:
        """Whether images are sent to it: as the option says, else as it says itself. They travel in messages only."""
        return not plain_chat and (self._vision == "yes" or (self._vision == "auto" and self.found.sees is True))

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._vision == "auto" and self.found.sees is None:
            notes.append("It does not say whether it reads images; vision=yes sends them to it.")
        if self._no_tokenizer:
            notes.append("Token counts are estimates until it has answered: it does not tell the tokens of a text.")
        if not self.found.context_length:
            notes.append("It does not say how much its context holds; ctx_size can.")
        return tuple(notes)

    # --- generation -----------------------------------------------------------------------------------------------

    async def answer(self, request: GenerationRequest, seed: int, room: int, put: Put) -> None:
        """Everything of one answer into `put`; the last is its Done, or the exception that it failed with."""
        try:
            path, body, unsent, ignored = await self._request(request, seed, room)
            put(await self._streamed(path, body, request, unsent, ignored, seed, put))
        except asyncio.CancelledError:
            raise
        except AppError as error:
            put(error)
        except Exception as error:  # a bug here must end the request, not leave it waiting
            put(EngineError(f"Reading the answer of {self._connection.server.name} failed: {type(error).__name__} {error}."))

    async def _streamed(
        self, path: str, body: dict[str, Any], request: GenerationRequest, unsent: tuple[str, ...], ignored: dict[str, str],
        seed: int, put: Put,
    ) -> Done:  # fmt: skip
        begun = time.perf_counter()
        first: float | None = None
        count = 0
        matcher = StopMatcher(unsent)
        chat = ChatReader() if request.chat is not None else None
        end = Chunk()
        async with contextlib.aclosing(self._events(path, body)) as events:
            async for event in events:
                chunk = read_chunk(event, chat, request.logprobs)
                end.merge(chunk)
                text = matcher.feed(chunk.text)
                if text or chunk.token_ids:
                    first = first or time.perf_counter()
                    ids = chunk.token_ids or (-1,)
                    put(TokenEvent(request.request_id, count, ids, text, chunk.logprobs))
                    count += len(ids)
                if matcher.match is not None:
                    break
        rest = (chat.close() if chat is not None else "") if matcher.match is None else ""
        if rest := matcher.feed(rest) + matcher.flush():
            put(TokenEvent(request.request_id, count, (), rest))
        if end.finish_reason is None and matcher.match is None:
            raise RemoteError(
                f"{self._connection.server.name} ended the answer in the middle.",
                hint="That server may have been stopped or have crashed; look at its log, then try again.",
            )
        now = time.perf_counter()
        first = first or now
        reason = "stop" if matcher.match is not None else FINISHED.get(end.finish_reason or "stop", "stop")
        receipt = end.receipt
        if end.finish_reason == "content_filter":
            ignored = {**ignored, "content_filter": f"{self._connection.server.name} cut the answer by its content filter."}
        applied = receipt.get("applied")
        told = receipt.get("ignored")
        return Done(
            request.request_id,
            reason,  # type: ignore[arg-type]
            end.usage or Usage(await self._prompt_tokens(request), count),
            Timings(first - begun, now - first),
            stop_match=matcher.match or end.stop_match,
            applied=applied if isinstance(applied, dict) else _applied(body),
            ignored={**ignored, **({str(k): str(v) for k, v in told.items()} if isinstance(told, dict) else {})},
            seed=receipt["seed"] if isinstance(receipt.get("seed"), int) else seed if "seed" in body else None,
        )

    async def _prompt_tokens(self, request: GenerationRequest) -> int:
        """How many the prompt had, where the server does not say: counted if it can be, else an estimate."""
        if request.prompt is None or self._no_tokenizer:
            return prompt_estimate(request)
        return len(await self.tokenizer.encode(request.prompt, request.add_special))

    async def _events(self, path: str, body: dict[str, Any]) -> Any:
        """The server's events; before the first, a busy server is asked again as often as the options say."""
        for attempt in range(self._retries + 1):
            try:
                async with contextlib.aclosing(self._connection.events(path, body)) as events:
                    async for event in events:
                        yield event
                return
            except RemoteBusy as error:
                wait = error.detail.get("retry_after")
                wait = 2.0**attempt if wait is None else wait
                if attempt == self._retries or wait > MAX_WAIT_S:
                    raise
                await asyncio.sleep(wait)

    async def _request(
        self, request: GenerationRequest, seed: int, room: int
    ) -> tuple[str, dict[str, Any], tuple[str, ...], dict[str, str]]:
        """(route, body, stop sequences left to us, what can't be honoured)."""
        kind, server = self.found.kind, self._connection.server.name
        fields, ignored = to_native(kind, {**request.sampling, "seed": seed})
        if "seed" not in kind.samplers:
            ignored.pop("seed", None)  # drawn here; only one that was asked for counts
            if request.sampling.get("seed", -1) >= 0:
                ignored["seed"] = f"{kind.title} does not have seed."
        stops, not_had, unsent = stop_fields(kind, request.stop)
        if stops.get("ignore_eos") or stops.get("ban_eos_token"):
            ignored.pop("ban_eos_token", None)
        chat = request.chat is not None
        form = form_fields(kind, chat=chat, grammar=request.grammar, schema=request.json_schema, regex=request.regex)
        if form is None:
            raise UnsupportedParameter(
                f"{server} can't hold an answer to this form.", hint="Ask for it in words, or use another backend."
            )
        body = {
            "model": self.model,
            **fields,
            **stops,
            **form,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if kind.token_ids:
            body["return_token_ids"] = True
        if request.chat is not None:
            path = "/chat/completions"
            if request.chat.continued and kind.continues is None:
                ignored["continue_final_message"] = f"{kind.title} can't go on with an answer: it may begin a new one."
            body |= self._chat_fields(request)
        else:
            path = "/completions"
            body |= await self._prompt_fields(request)
        await self._limit(request, body, room)
        return path, body, unsent, ignored | not_had

    async def _prompt_fields(self, request: GenerationRequest) -> dict[str, Any]:
        kind = self.found.kind
        fields: dict[str, Any] = {}
        if request.token_ids is not None and not kind.token_prompts:
            fields["prompt"] = await self.tokenizer.decode(request.token_ids, False)
        else:
            fields["prompt"] = request.prompt if request.token_ids is None else list(request.token_ids)
        if request.token_ids is None and not request.add_special and kind.name in ("switchyard", "vllm"):
            fields["add_special" if kind.name == "switchyard" else "add_special_tokens"] = False
        if request.logprobs is not None:
            fields["logprobs"] = min(request.logprobs, MAX_TOP_LOGPROBS)
            if request.echo:
                fields["echo"] = True
        return fields

    def _chat_fields(self, request: GenerationRequest) -> dict[str, Any]:
        chat, kind = request.chat, self.found.kind
        assert chat is not None
        images = iter(request.images)
        fields: dict[str, Any] = {"messages": [_message(m, images) for m in chat.messages]}
        if chat.continued and kind.continues is not None:
            fields |= kind.continues
        if chat.tools:
            fields["tools"] = list(chat.tools)
            named = chat.tool_choice not in ("auto", "none", "required")
            choice: Any = {"type": "function", "function": {"name": chat.tool_choice}} if named else chat.tool_choice
            fields["tool_choice"] = choice
            if not chat.parallel_tools:
                fields["parallel_tool_calls"] = False
        if chat.variables and kind.name in ("switchyard", "vllm", "llama-server"):
            fields["chat_template_kwargs"] = chat.variables
        if request.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": min(request.logprobs, MAX_TOP_LOGPROBS)}
        return fields

    async def _limit(self, request: GenerationRequest, body: dict[str, Any], room: int) -> None:
        """max_tokens in the server's terms. `room`: tokens that our own option allows together, 0: what the server has."""
        wanted, kind = request.stop.max_tokens, self.found.kind
        context = room or self.found.context_length
        if (
            request.chat is None
            and not self._no_tokenizer
            and (room or (wanted is None and kind.unlimited == "room" and context))
        ):
            length = len(request.token_ids) if request.token_ids is not None else len(
                await self.tokenizer.encode(request.prompt or "", request.add_special)
            )  # fmt: skip
            if length >= context:
                raise ContextLengthExceeded(
                    f"The prompt has {length} tokens; the context of {self.model} holds {context}.", hint="Shorten the prompt."
                )
            wanted = min(wanted or context, context - length)
        if wanted is not None:
            body["max_tokens"] = wanted
        elif request.chat is None and kind.unlimited == "context" and context:
            body["max_tokens"] = context
        elif request.chat is None and kind.unlimited == "null":
            body["max_tokens"] = None

    # --- other uses -----------------------------------------------------------------------------------------------

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """The log-probability of each token after the first: a completion that echoes its prompt and is not read further."""
        if "score" in self.lacks(plain_chat=False):
            raise UnsupportedParameter(f"{self._connection.server.name} can't score text.")
        body = {"model": self.model, "prompt": list(token_ids), "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
        answer = await self._connection.post("/completions", body)
        try:
            values = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(token_ids)]
            scores = [float(value) for value in values]
        except (KeyError, IndexError, TypeError, ValueError):
            scores = []
        if len(scores) != len(token_ids) - 1:
            raise RemoteError(f"{self._connection.server.name} gave no log-probabilities of the prompt.")
        return scores

    async def render(self, chat: ChatInput) -> str:
        """The prompt the server makes of a conversation, where it tells."""
        if self.found.kind.name not in ("switchyard", "llama-server"):
            raise UnsupportedParameter(f"{self._connection.server.name} does not tell the prompt that it makes of messages.")
        body = {"model": self.model, **self._chat_fields(GenerationRequest("", chat=chat))}
        answer = await self._connection.post("/apply-template", body, root=True)
        prompt = answer.get("prompt") if isinstance(answer, dict) else None
        if not isinstance(prompt, str):
            raise RemoteError(f"{self._connection.server.name} gave no prompt.")
        return prompt

    async def embed(self, token_ids: Sequence[int]) -> list[float]:
        """The vector of token ids, as the server makes it."""
        if "embeddings" in self.lacks(plain_chat=False):
            raise UnsupportedParameter(f"{self._connection.server.name} makes no embeddings.")
        answer = await self._connection.post("/embeddings", {"model": self.model, "input": list(token_ids)})
        try:
            return [float(value) for value in answer["data"][0]["embedding"]]
        except (KeyError, IndexError, TypeError, ValueError):
            raise RemoteError(f"{self._connection.server.name} gave no vector.") from None


def _message(message: dict[str, Any], images: Iterator[str]) -> dict[str, Any]:
    """A canonical message in OpenAI's form: the arguments of calls are JSON text there, images data: URLs; each is the next of
    `images`, and left out where there are none (its tokens are counted)."""
    if "parts" in message:
        content: list[dict[str, Any]] = []
        for part in message["parts"]:
            if part["type"] != "image":
                content += [part] if part["text"] else []
            elif (image := next(images, None)) is not None:
                content.append({"type": "image_url", "image_url": {"url": to_data_url(image)}})
        message = {**{key: value for key, value in message.items() if key != "parts"}, "content": content or message["content"]}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "type": "function", "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


_NO_SAMPLER = frozenset(
    "model messages prompt stream stream_options return_token_ids tools tool_choice logprobs top_logprobs echo".split()
)


def _applied(body: dict[str, Any]) -> dict[str, Any]:
    """What the request set, in the server's terms."""
    return {name: value for name, value in body.items() if name not in _NO_SAMPLER}

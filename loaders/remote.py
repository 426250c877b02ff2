"""Remote: a model of another server with an OpenAI-compatible API, behind the same interface as a local one.

This module is the spec and the thin engine. `_remote_kinds` says what each kind of server takes, `_remote_identify` which one is
at an address, `_remote_answer` turns a streamed answer into events, `_remote_text` asks for token ids. The rules of the
connection (addresses, redirects, limits, the key) are `modules.remotes.connection`'s.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from modules.engine import CancelToken, Engine, Progress
from modules.errors import (
    BackendUnavailable,
    EngineTimeout,
    LoadError,
    ModelNotFound,
    RemoteError,
    UnsupportedParameter,
)
from modules.plan.types import MIB, Machine, Memory, Setting, Shape
from modules.sampling import PARAMETERS
from modules.schema import (
    ChatInput,
    Done,
    Event,
    GenerationRequest,
    LoaderSpec,
    LoadProgress,
    ModelInfo,
    OptionSpec,
    PrefillProgress,
    Quantization,
    Timings,
    TokenEvent,
    Usage,
)

if TYPE_CHECKING:
    from loaders._remote_answer import Remote

T = TypeVar("T")

SPEC = LoaderSpec(
    name="remote",
    title="Remote server",
    engine="loaders.remote:RemoteEngine",
    summary="A model of another server: vLLM, TGI, llama-server, Ollama, tabbyAPI, another Switchyard.",
    formats={"remote": 1},
    samplers=frozenset(PARAMETERS),
    options=(
        OptionSpec(
            "ctx_size",
            "int",
            0,
            "Tokens to keep a conversation within; 0: what the server says its context holds.",
            minimum=0,
            maximum=10_000_000,
            aliases=("n_ctx", "context_length"),
        ),
        OptionSpec(
            "chat_rendering",
            "choice",
            "server",
            "Who makes a prompt of a conversation: the server by its model's template, or this one, plainly (for base models).",
            choices=("server", "plain"),
        ),
        OptionSpec(
            "vision",
            "choice",
            "auto",
            "Whether images are sent to the model; auto: where the server says that it reads them.",
            choices=("auto", "yes", "no"),
        ),
        OptionSpec(
            "silence_s", "float", 300.0, "Seconds the server may send nothing before it is given up.", minimum=0.1, maximum=86400
        ),
        OptionSpec(
            "busy_retries",
            "int",
            3,
            "How often to try again when the server says it is busy.",
            minimum=0,
            maximum=20,
            advanced=True,
        ),
    ),
    features=frozenset({"messages", "logprobs", "echo", "grammar", "json_schema", "regex", "embeddings", "score", "vision"}),
    devices=("cpu",),
    probe=("httpx",),
    slots=64,
)


def estimate(shape: Shape, options: Mapping[str, Any], machine: Machine) -> Memory:
    """See modules.plan.planner.Estimator. The weights are elsewhere."""
    return Memory(0, base=_BASE)


def settings(shape: Shape, machine: Machine) -> list[Setting]:
    return [Setting({})]


_BASE = 50 * MIB
NEWS_S = 0.005  # how soon a new request is seen while the running ones wait


class RemoteEngine(Engine):
    spec = SPEC
    computes_elsewhere = True

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._http = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._news = threading.Event()
        self._remote: Remote | None = None
        self._context = 0
        self._own_limit = False

    @classmethod
    def versions(cls) -> dict[str, str]:
        import httpx

        return {"httpx": httpx.__version__}

    # --- load -----------------------------------------------------------------------------------------------------

    def load(self, path: str, options: dict[str, Any], progress: Progress) -> ModelInfo:
        from loaders._remote_answer import Remote
        from modules.remotes.store import read_servers, split_path

        parts = split_path(path)
        if parts is None:
            raise LoadError("This is no model of a saved server.", hint="Add the server: server.py remote add NAME URL")
        file, name, model = parts
        server = next((s for s in read_servers(file) if s.name == name), None) if file.is_file() else None
        if server is None:
            raise ModelNotFound(f"There is no server named {name[:60]!r} any more.", hint="Add it again.", param="model")
        progress(LoadProgress(f"Asking {name}"))
        self._http.start()
        try:
            self._remote = self._wait(Remote.connect(server, model, options))
        except (RemoteError, EngineTimeout) as error:
            raise BackendUnavailable(error.message, hint=error.hint) from error
        found = self._remote.found
        self._own_limit = bool(options["ctx_size"])
        self._context = options["ctx_size"] or found.context_length
        plain_chat = options["chat_rendering"] == "plain"
        quantization, architecture = found.entry.get("quantization"), found.entry.get("architecture")
        return ModelInfo(
            name=model,
            path=f"{name}/{model}",
            loader=SPEC.name,
            format="remote",
            architecture=architecture[:100] if isinstance(architecture, str) and architecture else found.kind.title,
            quantization=Quantization(quantization[:40]) if isinstance(quantization, str) else None,
            context_length=self._context,
            vocab_size=found.vocab_size,
            eos_token_ids=found.eos_token_ids,
            device_map={"remote": 1.0},
            engine=" ".join(filter(None, [found.kind.title, found.version, f"at {name}"])),
            notes=self._remote.notes(),
            lacks=self._remote.lacks(plain_chat=plain_chat),
            image_token="<image>" if self._remote.sees(plain_chat=plain_chat) else None,
        )

    def close(self) -> None:
        if self._remote is not None:
            self._wait(self._remote.close())
        if self._http.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._http.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        import asyncio

        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- text -----------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self._wait(self._loaded.encode(text, add_special))

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return self._wait(self._loaded.tokenizer.decode(token_ids, skip_special)) if token_ids else ""

    def render(self, chat: ChatInput) -> str:
        return self._wait(self._loaded.render(chat))

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return self._wait(self._loaded.score(token_ids))

    def embed(self, token_ids: Sequence[int]) -> list[float]:
        return self._wait(self._loaded.embed(token_ids))

    @property
    def _loaded(self) -> Remote:
        if self._remote is None:
            raise UnsupportedParameter("No server is connected.")
        return self._remote

    # --- generation -----------------------------------------------------------------------------------------------

    def wait_for_news(self) -> None:
        self._news.wait(NEWS_S)
        self._news.clear()

    def generate(self, request: GenerationRequest, cancel: CancelToken) -> Iterator[Event | None]:
        import asyncio

        from loaders._remote_read import prompt_estimate

        seed = request.sampling.get("seed", -1)
        seed = random.randrange(2**31) if seed < 0 else seed
        items: queue.SimpleQueue[TokenEvent | Done | Exception] = queue.SimpleQueue()

        def put(item: TokenEvent | Done | Exception) -> None:
            items.put(item)
            self._news.set()

        began = time.perf_counter()
        room = self._context if self._own_limit else 0
        work = asyncio.run_coroutine_threadsafe(self._loaded.answer(request, seed, room, put), self._loop)
        first: float | None = None
        count = 0
        prompt = prompt_estimate(request)
        yield PrefillProgress(request.request_id, prompt, prompt)
        try:
            while True:
                if cancel.cancelled:
                    ended = time.perf_counter()
                    timings = Timings((first or ended) - began, ended - (first or ended))
                    yield Done(request.request_id, "cancelled", Usage(prompt, count), timings, seed=seed)
                    return
                try:
                    item = items.get_nowait()
                except queue.Empty:
                    yield None
                    continue
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, TokenEvent):
                    first = first or time.perf_counter()
                    count += len(item.token_ids)
                yield item
                if isinstance(item, Done):
                    return
        finally:
            work.cancel()

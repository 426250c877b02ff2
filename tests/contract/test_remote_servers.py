"""The remote loader against others' servers: llama.cpp's own (in xllamacpp) and llama-cpp-python's, on a bundled model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loaders.remote import SPEC, RemoteEngine
from modules.engine import CancelToken
from modules.errors import AppError, ContextLengthExceeded, RemoteError
from modules.remotes.store import RemoteStore, model_path
from modules.remotes.watch import Remotes
from modules.schema import ChatInput, Done, GenerationRequest, ModelInfo, StopParams, TokenEvent
from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

MODEL = ROOT / "models" / "wren-6m-gguf" / "wren-6m-F16.gguf"
KEY = "sk-test-of-servers"
START_S = 60.0
CHAT = ChatInput(({"role": "user", "content": "What is your name?"},))
# llama-server as a library: it serves until its stdin ends.
_XLLAMACPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.hostnames, params.api_keys, params.n_gpu_layers, params.offline = ["127.0.0.1"], [sys.argv[2]], 0, True
params.fit_params = False
if len(sys.argv) > 3:
    params.mmproj.path, params.mmproj_use_gpu = sys.argv[3], False
server = xllamacpp.Server(params)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass
class Far:
    engine: RemoteEngine
    info: ModelInfo
    name: str

    def ask(self, **fields: Any) -> tuple[list[TokenEvent], Done]:
        fields.setdefault("sampling", {"temperature": 0.0})
        fields.setdefault("stop", StopParams(max_tokens=24))
        tokens, end = [], None
        cancel = fields.pop("cancel", CancelToken())
        for event in self.engine.generate(GenerationRequest("r", **fields), cancel):
            if event is None:
                self.engine.wait_for_news()
            elif isinstance(event, TokenEvent):
                tokens.append(event)
            elif isinstance(event, Done):
                end = event
        assert end is not None
        return tokens, end

    def text(self, **fields: Any) -> str:
        return "".join(event.text for event in self.ask(**fields)[0])


def _command(name: str, overlays: Overlays) -> tuple[list[str], dict[str, str], str]:
    """(command, environment, what its address is found by), or the test skips with the reason."""
    if not MODEL.is_file():
        pytest.skip("the bundled model is not here")
    if name == "llama-server":
        return llama_server(overlays, MODEL)
    if not overlays.has_module("llamacpp", "llama_cpp"):
        pytest.skip("llama-cpp-python is not in the llamacpp environment")
    missing = [module for module in ("sse_starlette", "starlette_context", "pydantic_settings") if find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not in the tests' environment")
    paths = [str(path) for path in overlays.layers("llamacpp")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    flags = ["--n_ctx", "512", "--n_threads", "1", "--logits_all", "true", "--host", "127.0.0.1", "--port", "0", "--api_key", KEY]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(MODEL), *flags]
    return command, environ, r"Uvicorn running on (http://\S+)"


def llama_server(overlays: Overlays, model: Path, projector: Path | None = None) -> tuple[list[str], dict[str, str], str]:
    """How llama-server is started with a model, and with what sees for it; see `_command`."""
    if not overlays.has_module("llamacpp", "xllamacpp"):
        pytest.skip("xllamacpp is not in the llamacpp environment")
    files = [str(model), KEY, *([str(projector)] if projector is not None else [])]
    return (
        [str(overlays.python("llamacpp")), "-c", _XLLAMACPP, *files],
        overlays.worker_env("llamacpp"),
        r"LISTENING (http://\S+)",
    )


@pytest.fixture(scope="module", params=["llama-server", "llama-cpp-python"])
def far(request: pytest.FixtureRequest, overlays: Overlays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """The server, running, and the loader connected to its one model."""
    with connected(request.param, _command(request.param, overlays), tmp_path_factory.mktemp(request.param)) as server:
        yield server


@contextlib.contextmanager
def connected(name: str, start: tuple[list[str], dict[str, str], str], folder: Path) -> Iterator[Far]:
    """A server that is started so, with the loader connected to its one model."""
    command, environ, pattern = start
    process, url = _started(command, folder, environ, pattern)
    try:
        store = RemoteStore(folder)
        server = store.add("far", url, KEY)
        health = asyncio.run(Remotes(store).check(server))
        assert health.ok, health.error
        engine = RemoteEngine()
        options = {option.name: option.default for option in SPEC.options}
        info = engine.load(model_path(store.path, "far", health.models[0]["id"]), options, lambda _: None)
        yield Far(engine, info, name)
        engine.close()
    finally:
        process.kill()
        process.communicate()


def _started(command: list[str], folder: Path, environ: dict[str, str], pattern: str) -> tuple[subprocess.Popen[bytes], str]:
    """The process and the address it prints once it listens. llama-server hung before that once in thousands of starts."""
    lines: list[str] = []
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, pattern, lines, found), daemon=True).start()
        try:
            url = found.get(timeout=START_S)
        except queue.Empty:
            url = None
        if url is not None:
            return process, url
        ended = process.poll() is not None
        process.kill()
        process.communicate()
        if ended:
            break
    raise AssertionError("it did not start:\n" + "".join(lines[-20:]))


def _read(process: subprocess.Popen[bytes], pattern: str, lines: list[str], found: queue.SimpleQueue[str | None]) -> None:
    """Its output to the end, or it would stop at a full pipe."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace")
        lines.append(line)
        if match := re.search(pattern, line):
            found.put(match[1])
    found.put(None)


def test_it_is_known(far: Far) -> None:
    title = {"llama-server": "llama-server", "llama-cpp-python": "llama-cpp-python's server"}[far.name]
    assert far.info.engine is not None and far.info.engine.startswith(title)
    assert far.info.context_length == (512 if far.name == "llama-server" else 0), "llama-cpp-python's does not say"
    assert "tokenizer" not in far.info.lacks and "regex" in far.info.lacks


def test_chat(far: Far) -> None:
    tokens, end = far.ask(chat=CHAT)
    assert "Wren" in "".join(event.text for event in tokens)
    assert end.usage.completion_tokens > 3 and end.finish_reason in ("stop", "length")
    assert far.text(chat=CHAT) == far.text(chat=CHAT), "greedy"


def test_completion_streams_and_counts(far: Far) -> None:
    tokens, end = far.ask(prompt="Once upon a time", stop=StopParams(max_tokens=16))
    assert len(tokens) > 4 and end.finish_reason == "length" and end.usage.completion_tokens == 16
    assert end.usage.prompt_tokens == len(far.engine.encode("Once upon a time", True))


def test_seed_and_samplers(far: Far) -> None:
    hot = {"temperature": 1.5, "seed": 7, "top_k": 40, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2}
    first, end = far.ask(prompt="Once", sampling=hot)
    assert "".join(event.text for event in first) == far.text(prompt="Once", sampling=hot)
    assert end.seed == 7 and end.applied["repeat_penalty"] == 1.1 and end.ignored.keys() == {"no_repeat_ngram_size"}
    texts = {far.text(prompt="Once", sampling={"temperature": 1.5, "seed": seed}) for seed in range(4)}
    assert len(texts) > 1


def test_stop_and_unicode(far: Far) -> None:
    whole = far.text(prompt="Once upon a time")
    stop = whole[8:12]
    assert far.text(prompt="Once upon a time", stop=StopParams(max_tokens=24, stop=(stop,))) == whole[: whole.index(stop)]
    ids = far.engine.encode("Grüße 🙂 你好", False)
    assert far.engine.decode(ids).strip() == "Grüße 🙂 你好"


def test_log_probabilities(far: Far) -> None:
    tokens, _ = far.ask(prompt="Once upon a time", logprobs=3, stop=StopParams(max_tokens=4))
    items = [item for event in tokens for item in event.logprobs]
    assert len(items) == 4 and all(item.logprob <= 0 and len(item.top) == 3 for item in items)
    assert items[0].top[0][1] == items[0].text, "greedy picks the likeliest"


def test_grammar(far: Far) -> None:
    assert far.text(chat=CHAT, grammar='root ::= "yes" | "no"') in ("yes", "no")


def test_cancel_and_go_on(far: Far) -> None:
    cancel = CancelToken()
    request = GenerationRequest("c", prompt="Once", stop=StopParams(max_tokens=400), sampling={"temperature": 1.0, "seed": 1})
    end = None
    for event in far.engine.generate(request, cancel):
        if isinstance(event, TokenEvent):
            cancel.cancel()
        elif isinstance(event, Done):
            end = event
        else:
            far.engine.wait_for_news()
    assert end is not None and end.finish_reason == "cancelled"
    assert far.text(chat=CHAT), "the next request is answered"


def test_what_is_too_long_is_typed(far: Far) -> None:
    with pytest.raises(AppError) as caught:
        far.ask(prompt="word " * 900)
    assert isinstance(caught.value, (ContextLengthExceeded, RemoteError)) and str(caught.value)


def test_a_wrong_key_is_refused(far: Far, tmp_path: Path) -> None:
    connection = far.engine._loaded._connection
    store = RemoteStore(tmp_path)
    store.add("far", connection.server.url, "sk-wrong")
    options = {option.name: option.default for option in SPEC.options}
    engine = RemoteEngine()
    with pytest.raises(AppError, match="refused its key"):
        engine.load(model_path(store.path, "far", far.info.name), options, lambda _: None)
        for _ in engine.generate(GenerationRequest("w", chat=CHAT, stop=StopParams(max_tokens=2)), CancelToken()):
            engine.wait_for_news()

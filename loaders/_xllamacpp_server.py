"""llama.cpp through xllamacpp's in-process server, where its library exports no C interface (the Windows wheel).

Generation goes through `Server.handle_completions`, a function call. Only the tokenizer has no such call: it is asked over the
server's own HTTP, on a Unix socket in a private folder, or, where Python has none (Windows), on a loopback port that takes only
a random key this process alone knows. Two samplers' worth of features are less here: see `_request`. A projector is not
opened: the server takes images by routes of its own only, whose prompts are not ours.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders._llama_load import CACHE_TYPES, ROPE_SCALING, SPLIT_MODES, default_threads, load_mode, tensor_split
from loaders._llama_memory import MOST_CONTEXT_BY_DEFAULT
from loaders._llama_sampling import plan, seed_of
from loaders._lora import lora_weights
from loaders._process import peak_memory
from modules import sampling as table
from modules.assemble import TokenAssembler
from modules.detect.ggml_types import FILE_TYPES
from modules.detect.gguf_header import read_gguf_header
from modules.detokenize import ByteDetokenizer
from modules.errors import (
    AppError,
    ContextLengthExceeded,
    EngineError,
    GenerationFailed,
    IncompatibleModel,
    InvalidGrammar,
    InvalidParameter,
    LoadError,
    UnsupportedParameter,
)
from modules.samplers import SUPPORTED
from modules.schema import (
    Done,
    Event,
    GenerationRequest,
    LoadProgress,
    ModelInfo,
    PrefillProgress,
    Quantization,
    Timings,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from modules.engine import CancelToken, Progress

_NO_C_API = "This build of llama.cpp can't do it; compile llama-cpp-python for it."
_DEVICES = 16
# Our native sampler names -> the server's names in its "samplers" list and in the request.
_ORDER = {
    "penalties": "penalties", "dry": "dry", "top_n_sigma": "top_n_sigma", "top_k": "top_k", "typical_p": "typ_p",
    "top_p": "top_p", "min_p": "min_p", "xtc": "xtc", "temp": "temperature", "temp_ext": "temperature",
    "adaptive_p": "adaptive_p",
}  # fmt: skip


def request_fields(samplers: Sequence[tuple[str, Mapping[str, Any]]], context_length: int) -> dict[str, Any]:
    """llama-server's sampling fields for a plan's native samplers: everything off but what the plan names."""
    fields: dict[str, Any] = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0,
        "samplers": [_ORDER[name] for name, _ in samplers if name in _ORDER],
    }  # fmt: skip
    for name, a in samplers:
        if name == "greedy":
            fields["temperature"] = 0.0
            fields["samplers"].append("temperature")
        elif name == "temp":
            fields["temperature"] = a["t"]
        elif name == "temp_ext":
            fields |= {"temperature": a["t"], "dynatemp_range": a["delta"], "dynatemp_exponent": a["exponent"]}
        elif name == "penalties":
            fields |= {"repeat_penalty": a["repeat"], "presence_penalty": a["presence"], "frequency_penalty": a["frequency"]}
            fields["repeat_last_n"] = a["last_n"] or context_length
        elif name == "dry":
            fields |= {f"dry_{key}": value for key, value in a.items()}
            fields["dry_penalty_last_n"] = a["penalty_last_n"] or context_length
            fields["dry_sequence_breakers"] = list(a["sequence_breakers"]) or ["\0"]
        elif name == "xtc":
            fields |= {"xtc_probability": a["p"], "xtc_threshold": a["t"]}
        elif name.startswith("mirostat_"):
            fields |= {"mirostat": int(name[-1]), "mirostat_tau": a["tau"], "mirostat_eta": a["eta"]}
        elif name == "adaptive_p":
            fields |= {"adaptive_target": a["target"], "adaptive_decay": a["decay"]}
        elif name == "logit_bias":
            fields["logit_bias"] = [[int(token), bias] for token, bias in a["bias"].items()]
            fields["ignore_eos"] = a["ban_ends"]
        elif name in ("top_k", "top_p", "min_p", "typical_p", "top_n_sigma"):
            fields[name] = a["value"]
    return fields


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ServerModel:
    """A model in xllamacpp's server: text both ways and generation."""

    def __init__(self, path: str, options: dict[str, Any], progress: Progress) -> None:
        import xllamacpp

        if not Path(path).is_file():
            raise LoadError(f"There is no file at {path}.", hint="Refresh the model list: it was moved or deleted.")
        header = read_gguf_header(Path(path))
        architecture = header.text("general.architecture") or ""
        trained = header.integer(f"{architecture}.context_length") or 0
        self.context_length = options["ctx_size"] or min(trained or MOST_CONTEXT_BY_DEFAULT, MOST_CONTEXT_BY_DEFAULT)
        self._key = secrets.token_urlsafe(32)
        self._folder = tempfile.mkdtemp(prefix="switchyard-")  # only this user can enter it
        self._socket = os.path.join(self._folder, "llama.sock") if hasattr(socket, "AF_UNIX") else None
        self._lock = threading.Lock()
        progress(LoadProgress("Reading weights"))
        try:
            self._server: Any = xllamacpp.Server(self._params(xllamacpp, path, options))
        except Exception as error:
            self.close()
            raise IncompatibleModel(
                f"llama.cpp could not load the model: {str(error).rstrip('.')}.",
                hint="The log has its reason; check the options, or update llama.cpp.",
            ) from error
        ends = (header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        self.eos_ids = frozenset(i for i in ends if i is not None)
        self._bos = header.integer("tokenizer.ggml.bos_token_id")
        self._pieces: dict[int, bytes] = {}
        method = FILE_TYPES.get(header.integer("general.file_type") or 0)
        self.info = ModelInfo(
            name=Path(path).stem,
            path=path,
            loader="llamacpp",
            format="gguf",
            architecture=architecture,
            quantization=Quantization(method) if method and method not in ("F32", "F16", "BF16") else None,
            dtype=method,
            context_length=self.context_length,
            vocab_size=self._vocab_size(),
            chat_template=header.text("tokenizer.chat_template"),
            bos_token=self.decode([self._bos], False) if self._bos is not None else None,
            eos_token=self.decode([min(self.eos_ids)], False) if self.eos_ids else None,
            eos_token_ids=tuple(sorted(self.eos_ids)),
            device_map={_device(xllamacpp) if options["gpu_layers"] else "cpu": 1.0},
            memory_bytes=os.path.getsize(path),
            engine="xllamacpp (in-process server)",
            notes=("No C interface in this build: a few samplers, scoring, echo and images are missing.",),
            no_images="This build of llama.cpp is driven through its server, which reads none; the compiled one does.",
        )

    def _params(self, xllamacpp: Any, path: str, options: dict[str, Any]) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel = self.context_length, 1
        params.n_batch, params.n_ubatch = options["batch_size"], min(options["ubatch_size"], options["batch_size"])
        threads = options["threads"] or default_threads()
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = options["threads_batch"] or threads
        params.n_gpu_layers, params.main_gpu = options["gpu_layers"], options["main_gpu"]
        params.split_mode = xllamacpp.llama_split_mode(SPLIT_MODES[options["split_mode"]])
        params.load_mode = xllamacpp.llama_load_mode(load_mode(options["no_mmap"], options["mlock"]))
        split = tensor_split(options["tensor_split"], _DEVICES)
        if split:
            params.tensor_split = split
        params.cache_type_k = xllamacpp.ggml_type(CACHE_TYPES[options["cache_type_k"]])
        params.cache_type_v = xllamacpp.ggml_type(CACHE_TYPES[options["cache_type_v"]])
        params.flash_attn_type = xllamacpp.llama_flash_attn_type({"auto": -1, "off": 0, "on": 1}[options["flash_attn"]])
        params.rope_scaling_type = xllamacpp.llama_rope_scaling_type(ROPE_SCALING[options["rope_scaling"]])
        params.rope_freq_base, params.rope_freq_scale = options["rope_freq_base"], options["rope_freq_scale"]
        params.no_kv_offload, params.swa_full = options["no_kv_offload"], options["swa_full"]
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(adapter, scale)
            for adapter, scale in zip(options["lora"], lora_weights(options, "lora_scale"), strict=True)
        ]
        params.ui = params.endpoint_slots = params.endpoint_metrics = params.endpoint_props = params.fit_params = False
        params.offline, params.n_threads_http, params.verbosity, params.cache_ram_mib = True, 2, 1, 0
        params.api_keys = [self._key]
        params.hostnames = [self._socket or "127.0.0.1"]
        params.port = 0
        return params

    def close(self) -> None:
        self._server = None
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- text -----------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with self._lock:
            connection = self._connect()
            try:
                connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
        if response.status != 200:
            raise EngineError(f"llama.cpp's tokenizer answered {response.status}.", hint="Reload the model.")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        if self._socket:
            return _UnixConnection(self._socket)
        host, _, port = str(self._server.listening_address).removeprefix("http://").rpartition(":")
        return http.client.HTTPConnection(host, int(port), timeout=60)

    def encode(self, text: str, add_special: bool) -> list[int]:
        body = {"content": text.encode("utf-8", "replace").decode(), "add_special": add_special, "parse_special": True}
        return [int(token) for token in self._ask("/tokenize", body)["tokens"]]

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        ids = [i for i in token_ids if not (skip_special and (i in self.eos_ids or i == self._bos))]
        return str(self._ask("/detokenize", {"tokens": ids})["content"]) if ids else ""

    def token_text(self, token_id: int) -> str:
        return self._pieces.get(token_id, b"").decode("utf-8", "replace") or self.decode([token_id], False)

    def _vocab_size(self) -> int:
        connection = self._connect()
        try:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {self._key}"})
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return int(answer["data"][0]["meta"]["n_vocab"])

    def take_log(self) -> None:
        """The server writes its log to stderr by itself."""

    def score(self, token_ids: Sequence[int]) -> list[float]:
        raise UnsupportedParameter("This build of llama.cpp can't score text.", hint=_NO_C_API)

    # --- generation -----------------------------------------------------------------------------------------

    def generate(
        self, request: GenerationRequest, cancel: CancelToken, grammar: str | None, ignored: dict[str, str]
    ) -> Iterator[Event | None]:
        started = time.perf_counter()
        ids = list(request.token_ids) if request.token_ids is not None else self.encode(request.prompt or "", request.add_special)
        if any(not 0 <= i < self.info.vocab_size for i in ids):
            raise InvalidParameter(f"A token id is outside the vocabulary of {self.info.vocab_size}.", param="prompt")
        ids = ids or [self._bos if self._bos is not None else min(self.eos_ids, default=0)]
        if len(ids) >= self.context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(ids)} tokens; this model's context holds {self.context_length}.",
                hint="Shorten the prompt, or load the model with a larger context (ctx_size).",
            )
        room = self.context_length - len(ids)
        body, applied, ignored = self._request(request, ids, room, grammar, ignored)
        assembler = TokenAssembler(request, ByteDetokenizer(self._pieces.__getitem__), self.eos_ids, room)
        first = last = 0.0
        cached = 0
        with _Stream(self._server, body, cancel) as stream:
            while assembler.finish_reason is None:
                chunk = stream.next()
                if chunk is None or cancel.cancelled:
                    event = assembler.cancel()
                    if not cancel.cancelled:
                        raise GenerationFailed("llama.cpp's stream ended early.", hint="Try again.")
                    if event is not None:
                        yield event
                    break
                if "prompt_progress" in chunk:
                    yield PrefillProgress(request.request_id, chunk["prompt_progress"]["processed"], len(ids))
                cached = int(chunk.get("timings", {}).get("cache_n", cached))
                choice = chunk["choices"][0]
                for entry in (choice.get("logprobs") or {}).get("content") or ():
                    last = time.perf_counter()
                    first = first or last
                    event = assembler.push(entry["id"], self._take(entry, request.logprobs))
                    if event is not None:
                        yield event
                    if assembler.finish_reason is not None:
                        break
                if choice["finish_reason"] and assembler.finish_reason is None:
                    event = assembler.cancel()
                    assembler.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
                    if event is not None:
                        yield event
        yield Done(
            request.request_id,
            assembler.finish_reason or "cancelled",
            Usage(len(ids), assembler.count, cached),
            Timings((first or time.perf_counter()) - started, max(last - first, 0.0)),
            stop_match=assembler.stop_match,
            peak_memory_bytes=peak_memory(),
            applied=applied,
            ignored=ignored,
            seed=body["seed"],
        )

    def _request(
        self, request: GenerationRequest, ids: list[int], room: int, grammar: str | None, ignored: dict[str, str]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """(the server's request, what is applied, what is not)."""
        sampling = {name: value for name, value in request.sampling.items() if name in SUPPORTED}
        lost = {name for name in table.active(sampling) if plan({name: sampling[name]}).ours}
        made = plan({name: value for name, value in sampling.items() if name not in lost}, grammar=grammar is not None)
        ignored = ignored | made.ignored | dict.fromkeys(lost, _NO_C_API)
        if request.stop.min_tokens:
            ignored["min_tokens"] = _NO_C_API
        if request.echo:
            ignored["echo"] = _NO_C_API
        limit = room if request.stop.max_tokens is None else min(request.stop.max_tokens, room)
        body = {
            "prompt": ids,
            "stream": True,
            "n_predict": max(limit, 1),
            "max_tokens": max(limit, 1),
            "n_probs": max(request.logprobs or 0, 1),
            "return_progress": True,
            "timings_per_token": True,
            "cache_prompt": True,
            "seed": seed_of(request.sampling),
        } | request_fields(made.samplers, self.context_length)
        if request.stop.ignore_eos:
            body["ignore_eos"] = True
        if grammar is not None:
            if not grammar.strip():
                raise InvalidGrammar("The grammar is empty.", param="grammar")
            body["grammar"] = grammar
        return body, made.applied | ({"grammar": True} if grammar is not None else {}), ignored

    def _take(self, entry: dict[str, Any], count: int | None) -> TokenLogprob | None:
        """Note the token's bytes for the detokenizer; its log-probabilities when they were asked for."""
        self._pieces[entry["id"]] = bytes(entry["bytes"])
        if count is None:
            return None
        top = tuple((t["id"], t["token"], t["logprob"]) for t in entry["top_logprobs"][:count])
        return TokenLogprob(entry["id"], entry["token"], entry["logprob"], top)


def _device(xllamacpp: Any) -> str:
    """The kind of device that takes the layers meant for a GPU."""
    kinds = xllamacpp.ggml_backend_dev_type
    gpus = (kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU)
    return "gpu" if any(device["type"] in gpus for device in xllamacpp.get_device_info()) else "cpu"


class _Stream:
    """The chunks of one completion. `handle_completions` blocks, so it runs in a thread of its own; llama.cpp computes in yet
    another, its own. Leaving the context stops the completion."""

    def __init__(self, server: Any, body: dict[str, Any], cancel: CancelToken) -> None:
        self._server, self._body, self._cancel = server, body, cancel
        self._chunks: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="completion", daemon=True)

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._server.handle_completions(self._body, self._chunk)
        except Exception as error:
            print(f"xllamacpp: {error}", file=sys.stderr)
            self._chunks.put(error)
        self._chunks.put(None)

    def _chunk(self, chunk: dict[str, Any]) -> bool:
        """Called by xllamacpp for each chunk; true stops the completion."""
        self._chunks.put(chunk)
        return self._left.is_set() or self._cancel.cancelled

    def next(self) -> dict[str, Any] | None:
        """The next chunk, None at the end. Raises what went wrong as the product's error."""
        chunk = self._chunks.get()
        if isinstance(chunk, Exception):
            raise GenerationFailed(f"llama.cpp failed: {chunk}.", hint="Try again.")
        if chunk is not None and "error" in chunk:
            raise _typed(chunk["error"])
        return chunk


def _typed(error: dict[str, Any]) -> AppError:
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return ContextLengthExceeded(message, hint="Shorten the prompt, or load the model with a larger context (ctx_size).")
    if "grammar" in message:
        return InvalidGrammar(
            f"The grammar can't be used: {message}.", hint="It must be GBNF with a rule named root.", param="grammar"
        )
    return GenerationFailed(f"llama.cpp failed: {message}.", hint="Try again.")

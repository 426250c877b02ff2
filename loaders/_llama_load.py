"""Opens a GGUF file with llama.cpp's library: model, context, adapters, vocabulary; typed errors from its log."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders._llama_capi import AbortCallback, LlamaLibrary, LogCallback, ProgressCallback, Token
from loaders._llama_memory import MOST_CONTEXT_BY_DEFAULT
from loaders._llama_vision import open_vision, projector_for
from loaders._lora import lora_weights
from modules.detect.ggml_types import FILE_TYPES
from modules.errors import CorruptModel, IncompatibleModel, InvalidParameter, LoadError, LoadOutOfMemory
from modules.samplers import SequenceBreakers
from modules.schema import LoadProgress, ModelInfo, Quantization

if TYPE_CHECKING:
    from modules.engine import Progress

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
ROPE_SCALING = {"auto": -1, "none": 0, "linear": 1, "yarn": 2, "longrope": 3}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
NARROW_HEAD = 32
NUMA = {"off": 0, "distribute": 1, "isolate": 2, "numactl": 3}
_WARNING = 3
_CONTINUED = 5
OUT_OF_MEMORY = re.compile(r"allocat|out of memory|ENOMEM|mmap failed.*memory")
_SMALLER = "Choose a smaller context, a quantised cache (cache_type_k, cache_type_v), or a smaller quantisation of the model."


class Log:
    """llama.cpp's log: warnings and errors go to stderr, the last lines are kept to explain a failure."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=60)
        self._level = 0
        self.callback = LogCallback(self._take)

    def _take(self, level: int, text: bytes | None, _: Any) -> None:
        self._level = level if level != _CONTINUED else self._level
        line = (text or b"").decode("utf-8", "replace")
        if self._level >= _WARNING:
            sys.stderr.write(line)
            self.lines.extend(part for part in line.splitlines() if part.strip())

    def last(self) -> str:
        """The newest line, as the end of a sentence."""
        return _reason(self.lines[-1]) if self.lines else "it gave no reason"


class LlamaModel:
    """An open model with its context. Only the vocabulary's methods may be called from another thread."""

    def __init__(self, lib: LlamaLibrary, path: str, options: dict[str, Any], progress: Progress) -> None:
        if not Path(path).is_file():
            raise LoadError(f"There is no file at {path}.", hint="Refresh the model list: it was moved or deleted.")
        projector = projector_for(Path(path), options)  # says what is wrong before anything is read
        self.lib = lib
        self.path = path
        self.log = Log()
        self.take_log()
        lib.llama_backend_init()
        if options["numa"] != "off":
            lib.llama_numa_init(NUMA[options["numa"]])
        self._model = self._open(options, progress)
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(lib.llama_model_n_embd(self._model))
        self._buffers: dict[bool, dict[int, bytes]] = {False: {}, True: {}}
        if lib.llama_model_has_encoder(self._model):
            raise IncompatibleModel("This is an encoder-decoder model.", hint="Use a decoder-only model.")
        trained = int(lib.llama_model_n_ctx_train(self._model))
        self.context_length = options["ctx_size"] or min(trained, MOST_CONTEXT_BY_DEFAULT)
        self.n_batch = max(options["batch_size"], 1)
        self._options = options
        self._adapters = self._open_adapters(options)
        self.vision, self._no_images = open_vision(self, projector, options, self._threads()[1], progress)
        self.n_ubatch = min(options["ubatch_size"], self.n_batch)
        if self.vision is not None and not self.vision.causal:  # such an image goes through in one piece
            self.n_ubatch = max(self.n_ubatch, self.vision.largest)
            self.n_batch = max(self.n_batch, self.n_ubatch)
        progress(LoadProgress("Making the context"))
        self.ctx = self.new_context(self.context_length)
        self.eos_ids = frozenset(i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(self.vocab, i))
        self.breakers = SequenceBreakers(self.n_vocab, lambda token: self.piece(token).decode("utf-8", "replace"))
        self.bos_id = int(lib.llama_vocab_bos(self.vocab))
        self.info = self._describe(options, trained)

    def take_log(self) -> None:
        """Send llama.cpp's log here."""
        self.lib.llama_log_set(self.log.callback, None)

    def close(self) -> None:
        """Free context and model; nothing else may be called afterwards."""
        if self.vision is not None:
            self.vision.close()
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self._model)

    @property
    def handle(self) -> int:
        """llama.cpp's own pointer."""
        return self._model

    # --- opening --------------------------------------------------------------------------------------------

    def _open(self, options: dict[str, Any], progress: Progress) -> int:
        lib = self.lib
        shown = -1

        def report(fraction: float, _: Any) -> bool:
            nonlocal shown
            if int(fraction * 100) > shown:
                shown = int(fraction * 100)
                progress(LoadProgress("Reading weights", fraction))
            return True

        callback = ProgressCallback(report)
        split = tensor_split(options["tensor_split"], int(lib.llama_max_devices()))
        split_array = (ctypes.c_float * len(split))(*split) if split else None
        params = lib.model_params(
            n_gpu_layers=options["gpu_layers"],
            split_mode=SPLIT_MODES[options["split_mode"]],
            main_gpu=options["main_gpu"],
            load_mode=load_mode(options["no_mmap"], options["mlock"]),
            tensor_split=ctypes.addressof(split_array) if split_array is not None else 0,
            progress_callback=ctypes.cast(callback, ctypes.c_void_p).value or 0,
            check_tensors=options["check_tensors"],
        )
        model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not model:
            raise load_error(list(self.log.lines))
        return int(model)

    def _flash_attention(self, options: dict[str, Any]) -> str:
        """auto is llama.cpp's choice, but for heads narrower than its CPU kernel's vectors: there it decodes 2.4 times slower."""
        heads = int(self.lib.llama_model_n_head(self._model))
        narrow = heads > 0 and self.lib.llama_model_n_embd(self._model) // heads < NARROW_HEAD
        plain = {options["cache_type_k"], options["cache_type_v"]} <= {"f16", "f32", "bf16"}
        if options["flash_attn"] == "auto" and narrow and plain and not self.lib.llama_supports_gpu_offload():
            return "off"
        return str(options["flash_attn"])

    def _threads(self) -> tuple[int, int]:
        """(for decoding, for prompts and images)."""
        threads = self._options["threads"] or default_threads()
        return threads, self._options["threads_batch"] or threads

    def new_context(self, length: int) -> int:
        """A context of `length` tokens with the load's options and adapters; whoever makes another one than `ctx` frees it."""
        options = self._options
        threads, threads_batch = self._threads()
        params = self.lib.context_params(
            n_ctx=length,
            n_batch=self.n_batch,
            n_ubatch=self.n_ubatch,
            n_threads=threads,
            n_threads_batch=threads_batch,
            rope_scaling_type=ROPE_SCALING[options["rope_scaling"]],
            rope_freq_base=options["rope_freq_base"],
            rope_freq_scale=options["rope_freq_scale"],
            flash_attn_type=FLASH_ATTENTION[self._flash_attention(options)],
            type_k=CACHE_TYPES[options["cache_type_k"]],
            type_v=CACHE_TYPES[options["cache_type_v"]],
            offload_kqv=not options["no_kv_offload"],
            swa_full=options["swa_full"],
        )
        ctx = self.lib.llama_init_from_model(self._model, params)
        if not ctx:
            text = " ".join(self.log.lines)
            if "allocate" in text or "memory" in text.lower():
                raise LoadOutOfMemory(f"The memory is too small for a context of {length} tokens.", hint=_SMALLER)
            raise IncompatibleModel(
                f"llama.cpp can't make this context: {_first(self.log.lines)}.",
                hint="Check the cache types (a quantised V cache needs flash_attn) and the rope options.",
            )
        if self._adapters:
            scales = lora_weights(options, "lora_scale")
            adapters = (ctypes.c_void_p * len(self._adapters))(*self._adapters)
            if self.lib.llama_set_adapters_lora(ctx, adapters, len(scales), (ctypes.c_float * len(scales))(*scales)) != 0:
                raise LoadError("llama.cpp did not take the LoRA adapters.")
        return int(ctx)

    def _open_adapters(self, options: dict[str, Any]) -> list[int]:
        paths = list(options["lora"])
        lora_weights(options, "lora_scale")  # says what is wrong before anything is read
        handles = []
        for path in paths:
            handle = self.lib.llama_adapter_lora_init(self._model, os.fsencode(path)) if Path(path).is_file() else None
            if not handle:
                raise IncompatibleModel(
                    f"The adapter {Path(path).name} can't be used with this model: {_first(self.log.lines)}.",
                    hint="A LoRA for llama.cpp is a GGUF file made for the same base model.",
                )
            handles.append(int(handle))
        return handles

    def _describe(self, options: dict[str, Any], trained: int) -> ModelInfo:
        lib = self.lib
        file_type = self.meta("general.file_type")
        method = FILE_TYPES.get(int(file_type)) if file_type and file_type.isdigit() else None
        template = lib.llama_model_chat_template(self._model, None)
        notes = tuple(f"LoRA {Path(p).name}" for p in options["lora"])
        if trained and self.context_length > trained and options["rope_freq_scale"] == 0 and options["rope_scaling"] == "auto":
            notes += (f"The context of {self.context_length} is beyond the {trained} tokens the model was trained on.",)
        if self.vision is not None:
            notes += (f"Images are read with {self.vision.path.name}.",)
        eos = int(lib.llama_vocab_eos(self.vocab))
        return ModelInfo(
            name=Path(self.path).stem,
            path=self.path,
            loader="llamacpp",
            format="gguf",
            architecture=self.meta("general.architecture"),
            quantization=Quantization(method) if method and method not in ("F32", "F16", "BF16") else None,
            dtype=method,
            context_length=self.context_length,
            vocab_size=self.n_vocab,
            chat_template=template.decode("utf-8", "replace") if template else None,
            bos_token=self.piece(self.bos_id, special=True).decode("utf-8", "replace") if self.bos_id >= 0 else None,
            eos_token=self.piece(eos, special=True).decode("utf-8", "replace") if eos >= 0 else None,
            eos_token_ids=tuple(sorted(self.eos_ids)),
            device_map=self._device_shares(options["gpu_layers"]),
            memory_bytes=int(lib.llama_model_size(self._model)) + (self.vision.path.stat().st_size if self.vision else 0),
            engine=f"{lib.engine} ({lib.path.name})",
            notes=notes,
            image_token=self.vision.token if self.vision else None,
            image_tokens=self.vision.cost if self.vision else 0,
            image_inline=True,
            no_images=self._no_images,
        )

    def _device_shares(self, gpu_layers: int) -> dict[str, float]:
        layers = int(self.lib.llama_model_n_layer(self._model)) + 1
        if not self.lib.llama_supports_gpu_offload() or gpu_layers == 0:
            return {"cpu": 1.0}
        on_gpu = layers if gpu_layers < 0 else min(gpu_layers, layers)
        return {"gpu": round(on_gpu / layers, 4), "cpu": round(1 - on_gpu / layers, 4)}

    # --- vocabulary -----------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(4096)
        length = self.lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.raw[: min(length, len(buffer) - 1)].decode("utf-8", "replace") if length >= 0 else None

    def encode(self, text: str, add_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 16
        while True:
            tokens = (Token * room)()
            count = self.lib.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, True)
            if count >= 0:
                return tokens[:count]
            room = -count

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        if not token_ids:
            return ""
        if any(not 0 <= i < self.n_vocab for i in token_ids):
            raise InvalidParameter(f"A token id is outside the vocabulary of {self.n_vocab}.", param="token_ids")
        tokens = (Token * len(token_ids))(*token_ids)
        room = 16 * len(token_ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self.lib.llama_detokenize(self.vocab, tokens, len(token_ids), buffer, room, skip_special, not skip_special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def piece(self, token_id: int, special: bool = False) -> bytes:
        """One token's bytes; empty for a control token unless `special`."""
        known = self._buffers[special]
        found = known.get(token_id)
        if found is None:
            room = 128
            while True:
                buffer = ctypes.create_string_buffer(room)
                count = self.lib.llama_token_to_piece(self.vocab, token_id, buffer, room, 0, special)
                if count >= 0:
                    break
                room = -count
            found = known[token_id] = buffer.raw[:count]
        return found

    def logits(self, index: int = -1, ctx: int = 0) -> Any:
        """The logits of one output of the last decode as a numpy row [vocab]: llama.cpp's own memory, valid until the next.
        `ctx` is a context of `new_context`; 0 is the model's own."""
        import numpy as np

        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(ctx or self.ctx, index), (self.n_vocab,))

    def set_abort(self, callback: Any) -> None:
        """`callback` is an AbortCallback, or None for none. llama.cpp asks it before every graph node."""
        self.lib.llama_set_abort_callback(self.ctx, callback or AbortCallback(), None)


# --- options and errors ----------------------------------------------------------------------------------------


def load_mode(no_mmap: bool, mlock: bool) -> int:
    """llama.h's llama_load_mode."""
    return {(False, False): 1, (True, False): 0, (True, True): 2, (False, True): 3}[(no_mmap, mlock)]


def tensor_split(text: str, devices: int) -> list[float]:
    """Shares per GPU from "60,40", filled up with zeros; empty when not set."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        return []
    if len(parts) > devices or not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise InvalidParameter(f"tensor_split {text!r} must be up to {devices} numbers, such as 60,40.", param="tensor_split")
    return [float(part) for part in parts] + [0.0] * (devices - len(parts))


def default_threads() -> int:
    """The cores this process may use; half of many, as those are mostly pairs of hyper-threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 4
    return cores if cores <= 8 else cores // 2


def load_error(lines: list[str]) -> LoadError:
    """What llama.cpp's log says about a model that did not load."""
    text = "\n".join(lines)
    reason = first_reason(lines, "error loading model")
    if "unknown model architecture" in text:
        return IncompatibleModel(f"llama.cpp can't run this model: {reason}.", hint="Update llama.cpp, or use another loader.")
    if "pre-tokenizer" in text and "unknown" in text:
        return IncompatibleModel(f"llama.cpp does not know this tokenizer: {reason}.", hint="Update llama.cpp.")
    if OUT_OF_MEMORY.search(text):
        return LoadOutOfMemory("The memory is too small for this model.", hint=_SMALLER)
    return CorruptModel(
        f"llama.cpp can't read the file: {reason}.", hint="Download it again; the file may be incomplete or damaged."
    )


def _first(lines: Sequence[str]) -> str:
    """The first line, which names the cause; those after it follow from it."""
    return _reason(lines[0]) if lines else "it gave no reason"


def first_reason(lines: Sequence[str], word: str) -> str:
    """The first line with `word` in it, else the first, as the end of a sentence."""
    return _first([line for line in lines if word in line] or lines)


def _reason(line: str) -> str:
    """A log line without the name of the C++ function that wrote it."""
    return re.sub(r"^[\w:]+: (error loading model: )?", "", line.strip()).rstrip(".") or "it gave no reason"

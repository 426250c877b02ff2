"""llama.cpp's C interface (llama.h) by ctypes: from llama-cpp-python's library, or from xllamacpp's, which exports the same.

One binding for both keeps one decode loop, and costs a microsecond a call. The two libraries are of different versions, so
nothing about the layout of the two parameter structs is taken on trust: the library fills them with its own defaults, and the
values found there must be the ones expected at those places (`check_layout`). A library that moved a field is refused.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.errors import BackendUnavailable

Pointer = ctypes.c_void_p
Token = ctypes.c_int32
ENGINES = ("llama_cpp", "xllamacpp")
# Larger than any version of the structs: the callee reads only its own part.
_STRUCT_BYTES = 512


class Params(ctypes.Structure):
    """llama_model_params or llama_context_params as raw bytes, passed and returned by value."""

    _fields_ = (("raw", ctypes.c_ubyte * _STRUCT_BYTES),)

    def set(self, kind: str, offset: int, value: Any) -> None:
        """Write one field; `kind` is a struct format such as "i"."""
        struct.pack_into(kind, self.raw, offset, value)

    def get(self, kind: str, offset: int) -> Any:
        return struct.unpack_from(kind, self.raw, offset)[0]


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(Token)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class TokenData(ctypes.Structure):
    _fields_ = (("id", Token), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class TokenDataArray(ctypes.Structure):
    """Candidates for the samplers; `data` points at TokenData records."""

    _fields_ = (("data", Pointer), ("size", ctypes.c_size_t), ("selected", ctypes.c_int64), ("sorted", ctypes.c_bool))


class LogitBias(ctypes.Structure):
    _fields_ = (("token", Token), ("bias", ctypes.c_float))


class ChainParams(ctypes.Structure):
    _fields_ = (("no_perf", ctypes.c_bool),)


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
ProgressCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, Pointer)
AbortCallback = ctypes.CFUNCTYPE(ctypes.c_bool, Pointer)

# llama_model_params
MODEL = {
    "n_gpu_layers": ("i", 16),
    "split_mode": ("i", 20),
    "load_mode": ("i", 24),
    "main_gpu": ("i", 32),
    "tensor_split": ("P", 40),
    "progress_callback": ("P", 48),
    "check_tensors": ("?", 73),
    "use_extra_bufts": ("?", 74),
}
# llama_context_params up to the cache types; the flags after them are found by `check_layout`.
CONTEXT = {
    "n_ctx": ("I", 0),
    "n_batch": ("I", 4),
    "n_ubatch": ("I", 8),
    "n_seq_max": ("I", 12),
    "n_threads": ("i", 28),
    "n_threads_batch": ("i", 32),
    "rope_scaling_type": ("i", 40),
    "flash_attn_type": ("i", 52),
    "rope_freq_base": ("f", 56),
    "rope_freq_scale": ("f", 60),
    "type_k": ("i", 104),
    "type_v": ("i", 108),
}
_FLAGS = ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
_FLAG_DEFAULTS = bytes([0, 1, 1, 1, 1, 0])
_EXPECTED_MODEL: dict[str, Any] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "main_gpu": 0,
    "tensor_split": 0,
    "use_extra_bufts": True,
}
_EXPECTED_CONTEXT: dict[str, Any] = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "rope_scaling_type": -1}
_EXPECTED_CONTEXT |= {"flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "type_k": 1, "type_v": 1}

_I, _F, _B, _U, _S = ctypes.c_int32, ctypes.c_float, ctypes.c_bool, ctypes.c_uint32, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # name: (result, arguments...)
    "llama_backend_init": (None,),
    "llama_numa_init": (None, ctypes.c_int),
    "llama_log_set": (None, LogCallback, Pointer),
    "llama_print_system_info": (_S,),
    "llama_max_devices": (ctypes.c_size_t,),
    "llama_supports_gpu_offload": (_B,),
    "llama_model_default_params": (Params,),
    "llama_context_default_params": (Params,),
    "llama_model_load_from_file": (Pointer, _S, Params),
    "llama_init_from_model": (Pointer, Pointer, Params),
    "llama_free": (None, Pointer),
    "llama_model_free": (None, Pointer),
    "llama_model_get_vocab": (Pointer, Pointer),
    "llama_model_n_ctx_train": (_I, Pointer),
    "llama_model_n_layer": (_I, Pointer),
    "llama_model_n_embd": (_I, Pointer),
    "llama_model_n_head": (_I, Pointer),
    "llama_model_size": (ctypes.c_uint64, Pointer),
    "llama_model_meta_val_str": (_I, Pointer, _S, Pointer, ctypes.c_size_t),
    "llama_model_chat_template": (_S, Pointer, _S),
    "llama_model_has_encoder": (_B, Pointer),
    "llama_adapter_lora_init": (Pointer, Pointer, _S),
    "llama_set_adapters_lora": (_I, Pointer, ctypes.POINTER(Pointer), ctypes.c_size_t, ctypes.POINTER(_F)),
    "llama_get_memory": (Pointer, Pointer),
    "llama_memory_clear": (None, Pointer, _B),
    "llama_memory_seq_rm": (_B, Pointer, _I, _I, _I),
    "llama_memory_seq_pos_max": (_I, Pointer, _I),
    "llama_batch_get_one": (Batch, ctypes.POINTER(Token), _I),
    "llama_decode": (_I, Pointer, Batch),
    "llama_set_abort_callback": (None, Pointer, AbortCallback, Pointer),
    "llama_synchronize": (None, Pointer),
    "llama_get_logits_ith": (ctypes.POINTER(_F), Pointer, _I),
    "llama_set_embeddings": (None, Pointer, _B),
    "llama_get_embeddings_ith": (ctypes.POINTER(_F), Pointer, _I),
    "llama_vocab_n_tokens": (_I, Pointer),
    "llama_vocab_is_eog": (_B, Pointer, Token),
    "llama_vocab_bos": (Token, Pointer),
    "llama_vocab_eos": (Token, Pointer),
    "llama_vocab_eot": (Token, Pointer),
    "llama_tokenize": (_I, Pointer, _S, _I, ctypes.POINTER(Token), _I, _B, _B),
    "llama_token_to_piece": (_I, Pointer, Token, Pointer, _I, _I, _B),
    "llama_detokenize": (_I, Pointer, ctypes.POINTER(Token), _I, Pointer, _I, _B, _B),
    "llama_sampler_chain_init": (Pointer, ChainParams),
    "llama_sampler_chain_add": (None, Pointer, Pointer),
    "llama_sampler_sample": (Token, Pointer, Pointer, _I),
    "llama_sampler_apply": (None, Pointer, ctypes.POINTER(TokenDataArray)),
    "llama_sampler_accept": (None, Pointer, Token),
    "llama_sampler_free": (None, Pointer),
    "llama_sampler_init_greedy": (Pointer,),
    "llama_sampler_init_dist": (Pointer, _U),
    "llama_sampler_init_top_k": (Pointer, _I),
    "llama_sampler_init_top_p": (Pointer, _F, ctypes.c_size_t),
    "llama_sampler_init_min_p": (Pointer, _F, ctypes.c_size_t),
    "llama_sampler_init_typical": (Pointer, _F, ctypes.c_size_t),
    "llama_sampler_init_temp": (Pointer, _F),
    "llama_sampler_init_temp_ext": (Pointer, _F, _F, _F),
    "llama_sampler_init_xtc": (Pointer, _F, _F, ctypes.c_size_t, _U),
    "llama_sampler_init_top_n_sigma": (Pointer, _F),
    "llama_sampler_init_mirostat": (Pointer, _I, _U, _F, _F, _I),
    "llama_sampler_init_mirostat_v2": (Pointer, _U, _F, _F),
    "llama_sampler_init_adaptive_p": (Pointer, _F, _F, _U),
    "llama_sampler_init_penalties": (Pointer, _I, _I, _F, _F, _F),
    "llama_sampler_init_dry": (Pointer, Pointer, _F, _F, _I, _I, ctypes.POINTER(_S), ctypes.c_size_t),
    "llama_sampler_init_logit_bias": (Pointer, _I, _I, ctypes.POINTER(LogitBias)),
    "llama_sampler_init_grammar": (Pointer, Pointer, _S, _S),
}


class NoLlamaLibrary(Exception):
    """This package holds no usable llama.cpp library; the message says why."""


class LlamaLibrary:
    """The functions of llama.h as attributes, and the checked layout of the two parameter structs."""

    def __init__(self, engine: str, path: Path) -> None:
        self.engine = engine
        self.path = path
        if sys.platform == "win32":
            os.add_dll_directory(str(path.parent))
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoLlamaLibrary(f"{path.name} does not load: {error}") from error
        missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
        if missing:
            raise NoLlamaLibrary(f"{path.name} does not export {missing[0]}")
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.context_fields = CONTEXT | check_layout(self.llama_model_default_params(), self.llama_context_default_params())

        if not penalties_agree(self):
            raise NoLlamaLibrary("its llama.h is another: the penalties sampler takes other arguments")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)  # for the type checker: every function is an attribute

    def model_params(self, **values: Any) -> Params:
        return _filled(self.llama_model_default_params(), MODEL, values)

    def context_params(self, **values: Any) -> Params:
        return _filled(self.llama_context_default_params(), self.context_fields, values)


def _filled(params: Params, fields: dict[str, tuple[str, int]], values: dict[str, Any]) -> Params:
    for name, value in values.items():
        kind, offset = fields[name]
        params.set(kind, offset, value)
    return params


def check_layout(model: Params, context: Params) -> dict[str, tuple[str, int]]:
    """The places of llama_context_params' flags. Raises NoLlamaLibrary when the defaults don't stand where they should."""
    for params, fields, expected in ((model, MODEL, _EXPECTED_MODEL), (context, CONTEXT, _EXPECTED_CONTEXT)):
        for name, value in expected.items():
            found = params.get(*fields[name])
            if found != value:
                raise NoLlamaLibrary(f"its llama.h is another: {name} defaults to {found}, not {value}")
    raw = bytes(context.raw)
    places = [at for at in range(112, 168, 8) if raw[at : at + len(_FLAG_DEFAULTS)] == _FLAG_DEFAULTS]
    if len(places) != 1:
        raise NoLlamaLibrary("its llama.h is another: the flags of llama_context_params are not where they should be")
    return {name: ("?", places[0] + index) for index, name in enumerate(_FLAGS)}


def penalties_agree(lib: Any) -> bool:
    """Whether the penalties sampler takes (n_vocab, last_n, repeat, frequency, presence): versions differ, and a wrong guess
    would pass in silence. With a window of one only the last token accepted may be penalised."""
    records = (TokenData * 3)(TokenData(0, 1.0, 0.0), TokenData(1, 1.0, 0.0), TokenData(2, 1.0, 0.0))
    array = TokenDataArray(ctypes.addressof(records), 3, -1, False)
    sampler = lib.llama_sampler_init_penalties(3, 1, 2.0, 0.0, 0.0)
    for token in (1, 2):
        lib.llama_sampler_accept(sampler, token)
    lib.llama_sampler_apply(sampler, ctypes.byref(array))
    lib.llama_sampler_free(sampler)
    return [record.logit for record in records] == [1.0, 1.0, 0.5]


def library_path(engine: str) -> Path:
    """Where the package of this engine keeps its library. Raises NoLlamaLibrary when it is not installed."""
    spec = importlib.util.find_spec(engine)
    if spec is None or not spec.submodule_search_locations:
        raise NoLlamaLibrary("it is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if engine == "llama_cpp":
        names = {"win32": "llama.dll", "darwin": "libllama.dylib"}
        candidates = [folder / "lib" / names.get(sys.platform, "libllama.so")]
    else:
        candidates = [*folder.glob("xllamacpp*.so"), *folder.glob("xllamacpp*.pyd")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise NoLlamaLibrary(f"{folder} holds no library")
    return found


def open_library(engine: str) -> LlamaLibrary:
    """The library of one engine, or for "auto" the first that works: llama-cpp-python's is compiled for this very CPU.

    Raises BackendUnavailable with the reason of each.
    """
    reasons = []
    for name in ENGINES if engine == "auto" else (engine,):
        try:
            return LlamaLibrary(name, library_path(name))
        except NoLlamaLibrary as error:
            reasons.append(f"{name}: {error}")
    raise BackendUnavailable(f"No llama.cpp library works here ({'; '.join(reasons)}).", hint="Install the llama.cpp set again.")

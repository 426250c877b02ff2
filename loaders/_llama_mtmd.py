"""llama.cpp's interface for images (mtmd.h) by ctypes, beside `_llama_capi`: llama-cpp-python has it in a library of its own,
xllamacpp in its one library.

As there, the layout of the parameters is not taken on trust: the library's own defaults must stand where they are expected.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from loaders._llama_capi import LogCallback, NoLlamaLibrary, Params, Pointer, Token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loaders._llama_capi import LlamaLibrary

TEXT, IMAGE = 0, 1  # mtmd_input_chunk_type

# mtmd_context_params
_CONTEXT = {
    "use_gpu": ("?", 0),
    "print_timings": ("?", 16),
    "n_threads": ("i", 20),
    "image_marker": ("P", 24),
    "media_marker": ("P", 32),
    "flash_attn_type": ("i", 40),
    "warmup": ("?", 44),
    "image_min_tokens": ("i", 48),
    "image_max_tokens": ("i", 52),
    "cb_eval": ("P", 56),
}
_EXPECTED = {
    "use_gpu": True,
    "print_timings": True,
    "n_threads": 4,
    "image_marker": 0,
    "flash_attn_type": -1,
    "warmup": True,
    "image_min_tokens": -1,
    "image_max_tokens": -1,
    "cb_eval": 0,
}


class InputText(ctypes.Structure):
    """A prompt with marks."""

    _fields_ = (
        ("text", ctypes.c_char_p),
        ("text_len", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    )


_I, _B, _N, _S = ctypes.c_int32, ctypes.c_bool, ctypes.c_size_t, ctypes.c_char_p
_F = ctypes.POINTER(ctypes.c_float)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # name: (result, arguments...)
    "mtmd_default_marker": (ctypes.c_void_p,),
    "mtmd_context_params_default": (Params,),
    "mtmd_init_from_file": (Pointer, _S, Pointer, Params),
    "mtmd_free": (None, Pointer),
    "mtmd_support_vision": (_B, Pointer),
    "mtmd_decode_use_non_causal": (_B, Pointer, Pointer),
    "mtmd_bitmap_init": (Pointer, ctypes.c_uint32, ctypes.c_uint32, _S),
    "mtmd_bitmap_free": (None, Pointer),
    "mtmd_bitmap_set_id": (None, Pointer, _S),
    "mtmd_input_chunks_init": (Pointer,),
    "mtmd_input_chunks_size": (_N, Pointer),
    "mtmd_input_chunks_get": (Pointer, Pointer, _N),
    "mtmd_input_chunks_free": (None, Pointer),
    "mtmd_input_chunk_get_type": (ctypes.c_int, Pointer),
    "mtmd_input_chunk_get_tokens_text": (ctypes.POINTER(Token), Pointer, ctypes.POINTER(_N)),
    "mtmd_input_chunk_get_n_tokens": (_N, Pointer),
    "mtmd_input_chunk_get_n_pos": (_I, Pointer),
    "mtmd_input_chunk_get_id": (_S, Pointer),
    "mtmd_tokenize": (_I, Pointer, Pointer, ctypes.POINTER(InputText), ctypes.POINTER(Pointer), _N),
    "mtmd_encode_chunk": (_I, Pointer, Pointer),
    "mtmd_get_output_embd": (_F, Pointer),
    # (mtmd, llama, chunk, embeddings, first position, sequence, tokens in a batch, next position, callback, its data)
    "mtmd_helper_decode_image_chunk": (_I, Pointer, Pointer, Pointer, _F, _I, _I, _I, ctypes.POINTER(_I), Pointer, Pointer),
    "mtmd_helper_log_set": (None, LogCallback, Pointer),
    "mtmd_log_set": (None, LogCallback, Pointer),
}
# Came with InputText.text_len: without it the prompt would be read by another layout.
_AS_NEW_AS = "mtmd_tokenize_from_parts"


class MtmdLibrary:
    """The functions of mtmd.h as attributes. Raises NoLlamaLibrary where they are missing or of another version."""

    def __init__(self, llama: LlamaLibrary) -> None:
        path = _path(llama)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoLlamaLibrary(f"{path.name} does not load: {error}") from error
        missing = [name for name in (*_FUNCTIONS, _AS_NEW_AS) if not hasattr(library, name)]
        if missing:
            raise NoLlamaLibrary(f"{path.name} does not export {missing[0]}")
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        check_layout(self.mtmd_context_params_default(), self.mtmd_default_marker())
        self.marker = ctypes.string_at(self.mtmd_default_marker()).decode("ascii")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)  # for the type checker: every function is an attribute

    def params(self, **values: Any) -> Params:
        made: Params = self.mtmd_context_params_default()
        for name, value in values.items():
            made.set(*_CONTEXT[name], value)
        return made


def check_layout(params: Params, marker: int) -> None:
    """Raises NoLlamaLibrary when the defaults don't stand where they should. `marker` is the address of the default mark."""
    for name, value in (_EXPECTED | {"media_marker": marker}).items():
        found = params.get(*_CONTEXT[name])
        if found != value:
            raise NoLlamaLibrary(f"its mtmd.h is another: {name} defaults to {found}, not {value}")


def _path(llama: LlamaLibrary) -> Path:
    if llama.engine == "xllamacpp":
        return llama.path
    return llama.path.with_name(llama.path.name.replace("llama", "mtmd"))

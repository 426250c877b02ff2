"""Keys of a model's JSON files that make a library run code that came with the model.

`trust_remote_code=False` alone has been bypassed more than once, so such a model is refused before any library reads it.
"""

from __future__ import annotations

from typing import Any

from modules.detect.safetensors_header import shown
from modules.errors import CorruptModel, UnsafeModel

# The files transformers reads from a model's folder on its own.
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
)
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "_attn_implementation_internal"})
# A value "owner/name" in these makes transformers fetch a kernel from the hub and run it.
_KERNEL_KEYS = ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config")
_MAX_DEPTH = 40


def refuse_code(file_name: str, config: dict[str, Any]) -> None:
    """Raise UnsafeModel, naming the first key of `config` that would run code."""
    stack: list[tuple[str, Any, int]] = [("", config, 0)]
    while stack:
        where, value, depth = stack.pop()
        if depth > _MAX_DEPTH:
            raise CorruptModel(f"{file_name} is nested deeper than {_MAX_DEPTH} levels.", hint="Fetch the file again.")
        if isinstance(value, list):
            stack.extend((f"{where}[{number}]", item, depth + 1) for number, item in enumerate(value))
        if not isinstance(value, dict):
            continue
        for key, item in value.items():
            name = f"{where}.{key}" if where else key
            if _runs_code(key, item):
                raise UnsafeModel(
                    f'{file_name} has the key "{shown(name)}", which makes the library run code that came with the model.',
                    hint="Get a version of the model that needs no code of its own (a GGUF does not), or delete the key from "
                    "the file if the architecture is built into the library.",
                )
            stack.append((name, item, depth + 1))


def _runs_code(key: str, value: Any) -> bool:
    if not value:  # trust_remote_code: false, auto_map: {} and null do nothing
        return False
    if key in _CODE_KEYS:
        return True
    return key.endswith(_KERNEL_KEYS) and ("/" in value if isinstance(value, str) else isinstance(value, dict))

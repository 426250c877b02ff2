"""What differs between transformers 4 and 5 for the loaders that run on both: AutoGPTQ's environment holds 4.53, the others 5.

Files written by either must load in either: transformers 5 renamed `torch_dtype` and gathered the rope settings under
`rope_parameters`, names the tokenizer class `TokenizersBackend`, and writes `extra_special_tokens` as a list. transformers 4
would take defaults for what it does not know, in silence, so the names are put back before it looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NEW_TOKENIZERS = frozenset({"TokenizersBackend", "PythonBackend", "SentencePieceBackend"})


def major() -> int:
    """transformers' major version."""
    import transformers

    return int(transformers.__version__.partition(".")[0])


# --- files -----------------------------------------------------------------------------------------------------


def config_for_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the names of transformers 4; what it holds already stays. Raises ValueError for rope settings per kind
    of layer, which transformers 4 has no one name for."""
    changed = dict(config)
    if isinstance(changed.get("text_config"), Mapping):
        changed["text_config"] = config_for_4(changed["text_config"])
    if "dtype" in changed:
        changed.setdefault("torch_dtype", changed.pop("dtype"))
    rope = changed.pop("rope_parameters", None)
    if isinstance(rope, Mapping):
        if any(isinstance(item, Mapping) for item in rope.values()):
            raise ValueError("rope_parameters differ between kinds of layers")
        scaling = dict(rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in scaling:
                changed.setdefault(name, scaling.pop(name))
        if scaling.get("rope_type", "default") != "default":
            changed.setdefault("rope_scaling", scaling)
    return changed


def read_config(folder: Path) -> Any:
    """The model's configuration as the installed transformers' object. Raises what that raises."""
    import transformers

    if major() >= 5:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    content = config_for_4(json.loads((folder / "config.json").read_text(encoding="utf-8-sig")))
    kind = content.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} does not recognize this architecture: {kind!r}")
    return transformers.CONFIG_MAPPING[kind].from_dict(content)


def read_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, also when a newer transformers saved it. Raises what transformers raises."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if major() >= 5:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        options |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    if settings.get("tokenizer_class") in _NEW_TOKENIZERS and (folder / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


# --- the KV cache ----------------------------------------------------------------------------------------------


def new_cache(model: Any) -> Any:
    """An empty KV cache for `model`: its own kind where it has one (ExLlama), else transformers'."""
    own = getattr(model, "new_cache", None)
    if own is not None:
        return own()
    from transformers import DynamicCache

    return DynamicCache(config=model.config) if major() >= 5 else DynamicCache()


def can_crop(cache: Any) -> bool:
    """Whether the end of the cache can be cut off: recurrent layers can't go back, and a sliding window that has moved on
    has lost what it would need. transformers 4 keeps all positions of every layer."""
    if hasattr(cache, "croppable"):
        return bool(cache.croppable)
    return major() < 5 or all(getattr(layer, "is_croppable", False) for layer in cache.layers)


# --- models ----------------------------------------------------------------------------------------------------


def decoder_of(model: Any) -> Any:
    """The model below its output layer."""
    try:
        found = model.get_decoder()
    except (AttributeError, NotImplementedError):
        found = None
    return found if found is not None else model.base_model

"""Parameter names on disk and in the model: transformers renames some when it loads (embed_out → lm_head, an added prefix)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def names_on_disk(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Model parameter -> its key on disk, for those of `keys` that are a parameter of the model under its own or an older name.

    Tensors that transformers merges or splits while loading (stacks of experts) are not among them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = model.base_model_prefix + "."
    found: dict[str, str] = {}
    for key in keys:
        renamed = apply_renamings(key, renamings)
        for name in (key, renamed, renamed.removeprefix(prefix), prefix + renamed):
            if name in known:
                found.setdefault(name, key)
                break
    return found

"""All that is particular to GPTQModel (7.6.0), auto-gptq's successor: reading a checkpoint with it.

Its CPU kernels are compiled at first use and fast for 4 bits only, so plain torch layers are asked for; they are replaced
afterwards (loaders._autogptq_load).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from loaders._gptq_load import Checkpoint

# Keys of AutoGPTQ 0.7's settings that make GPTQModel refuse them, even where they say nothing.
_REFUSED = ("is_marlin_format", "awq_gemm_checkpoint")
_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json")


def load(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The transformers model with GPTQModel's packed layers, its weights read, in the half type that the file is in: its torch
    layers take no other."""
    # It reserves a thread pool of at least three, and raises where there are fewer cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(os.cpu_count() or 1, 2)))
    import torch
    from gptqmodel import BACKEND, GPTQModel

    stored = {entry.dtype for _, entry in checkpoint.entries.values()}
    dtype = torch.bfloat16 if "BF16" in stored else torch.float16
    where = "cuda:0" if device.type == "cuda" else "cpu"
    with plain_settings(checkpoint.folder) as folder:
        wrapper = GPTQModel.load(str(folder), device=where, backend=BACKEND.GPTQ_TORCH, trust_remote_code=False, dtype=dtype)
    return wrapper.model


@contextmanager
def plain_settings(folder: Path) -> Iterator[Path]:
    """The model's folder; where its settings hold a key that GPTQModel refuses, a temporary one without it, weights linked."""
    changed = {name: text for name in _SETTINGS if (text := without_refused(folder / name)) is not None}
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="switchyard-gptq-", ignore_cleanup_errors=True) as place:
        view = Path(place) / folder.name
        view.mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name not in changed:
                _link(path, view / path.name)
        for name, text in changed.items():
            (view / name).write_text(text, encoding="utf-8")
        yield view


def without_refused(path: Path) -> str | None:
    """The settings file's text without the refused keys, None when there is nothing to change."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    inner = content.get("quantization_config")
    found = False
    for part in (content, inner):
        if isinstance(part, dict):
            found |= any(part.pop(key, None) is not None for key in _REFUSED)
    return json.dumps(content) if found else None


def _link(source: Path, target: Path) -> None:
    """A link where the system and the disks allow one, else a copy."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)

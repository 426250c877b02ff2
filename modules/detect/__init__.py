"""What a model file or folder is, by its content, before any backend touches it. Standard library only.

inspect(path)           everything known about it; `problem` says why it can't be loaded. For lists.
check(path)             the same, with the slower checks, raising the problem. Before every load.
list_models(dirs)       every model under some folders
find_model(name, dirs)  one of them

sniff.py                the kind of a single file       examine.py      a path to its examiner
draft.py                what an examiner has learned    listing.py      the models under some folders
safetensors_header.py   gguf_header.py  ggml_types.py   the two header formats, checked strictly
hf_folder.py            config.json and what belongs to it: weights.py, quantized.py, shapes.py, tokenizer.py, config_keys.py
gguf_model.py  projector.py  rwkv.py  flexgen.py  opt.py   the other formats
remembered.py           what headers said, kept over a restart
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modules.detect.examine import examine
from modules.detect.listing import find_model, list_models
from modules.detect.projector import with_projector
from modules.errors import IncompatibleModel

if TYPE_CHECKING:
    from modules.schema import ModelFiles

__all__ = ["check", "find_model", "inspect", "list_models"]


def inspect(path: Path | str) -> ModelFiles:
    """What is at `path`. Never raises for bad content: `problem` then says what is wrong and what to do."""
    return with_projector(examine(Path(path), deep=False)[0])


def check(path: Path | str, *, adapter: bool = False) -> ModelFiles:
    """What is at `path`, ready to be loaded.

    Raises CorruptModel, UnsafeModel, UnknownFormat, IncompatibleModel or ModelNotFound; each message says what to do.
    `adapter` asks for a LoRA adapter instead of a model.
    """
    files, error = examine(Path(path), deep=True)
    if error:
        raise error
    if (files.format == "lora") != adapter:
        raise _wrong_kind(files)
    return files


def _wrong_kind(files: ModelFiles) -> IncompatibleModel:
    if files.format != "lora":
        return IncompatibleModel(f"{files.id} is a model, not a LoRA adapter.", hint="Load it as the model itself.")
    base = f" for {files.base_model}" if files.base_model else ""
    return IncompatibleModel(
        f"{files.id} is a LoRA adapter{base}, not a model by itself.",
        hint="Load its base model and choose this as the LoRA option.",
    )

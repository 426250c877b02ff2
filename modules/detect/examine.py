"""One path, whatever it is, to what is known about it and why it can't be loaded."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from modules.detect.draft import Draft, folder_files
from modules.detect.flexgen import examine_flexgen, is_flexgen
from modules.detect.gguf_header import first_keys
from modules.detect.gguf_model import examine_gguf
from modules.detect.hf_folder import examine_folder, examine_weights_file
from modules.detect.projector import is_projector
from modules.detect.rwkv import looks_like_rwkv, names_in_pickle
from modules.detect.safetensors_header import read_safetensors_header
from modules.detect.sniff import FileKind, lfs_size, no_model, sniff
from modules.errors import AppError, CorruptModel, LoadError, ModelNotFound, UnknownFormat, UnsafeModel

if TYPE_CHECKING:
    from modules.schema import ModelFiles

_PICKLES = ("torch", "pickle", "zip")


def examine(path: Path, *, deep: bool) -> tuple[ModelFiles, AppError | None]:
    """What is at `path`, and the error that keeps it from being loaded. Raises nothing for any content.

    `deep` adds the checks that are too slow for a list of a thousand models (the tokenizer).
    """
    draft = Draft()
    error: AppError | None = None
    try:
        if path.is_dir():
            _examine_dir(path, draft, deep=deep)
        elif path.exists():
            _examine_file(path, draft)
        else:
            error = ModelNotFound(
                "The model is not there any more.", hint="Choose another one, or fetch it again.", param="model"
            )
    except LoadError as problem:
        error = problem
    except (OSError, ValueError) as problem:
        reason = problem.strerror or "it can't be read" if isinstance(problem, OSError) else "its name is not valid"
        error = CorruptModel(f"The model can't be read: {reason}.", hint="Check the file's permissions and the disk.")
    return draft.finish(path, str(error) if error else None), error


def _examine_dir(path: Path, draft: Draft, *, deep: bool) -> None:
    files = folder_files(path)
    draft.files = list(files)
    if is_flexgen(files, path):
        examine_flexgen(path, draft)
        return
    is_hf = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in files) or files.keys() & {
        "config.json",
        "adapter_config.json",
        "quantize_config.json",
    }
    if is_hf:
        examine_folder(path, draft, deep=deep)
        return
    ggufs = [name for name in files if name.endswith(".gguf") and ("-of-" not in name or "-00001-of-" in name)]
    if len(ggufs) > 1:
        ggufs = [name for name in ggufs if not is_projector(first_keys(path / name))]
    if len(ggufs) == 1:
        examine_gguf(path / ggufs[0], draft)
        return
    if ggufs:
        raise UnknownFormat(f"The folder holds {len(ggufs)} GGUF models.", hint=f"Choose one of them, such as {ggufs[0]}.")
    for name in files:
        kind = sniff(path / name)
        if kind in _PICKLES:
            _examine_pickle(path / name, kind, draft)
    raise UnknownFormat(
        "The folder holds no model: no config.json, no .safetensors and no .gguf file.",
        hint="Choose the folder that holds these files, or a .gguf file.",
    )


def _examine_file(path: Path, draft: Draft) -> None:
    draft.files = [path.name]
    draft.size_bytes = path.stat().st_size
    kind = sniff(path)
    if kind == "gguf":
        examine_gguf(path, draft)
    elif kind == "safetensors":
        examine_weights_file(path, draft)
    elif kind in _PICKLES:
        _examine_pickle(path, kind, draft)
    elif kind == "lfs":
        _refuse_pointer(path)
    else:
        _refuse_by_promise(path, kind)


def _examine_pickle(path: Path, kind: FileKind, draft: Draft) -> None:
    architecture = looks_like_rwkv(names_in_pickle(path))
    if architecture is None:
        raise no_model(kind, path.name)
    draft.format = "rwkv"
    draft.architecture = architecture
    raise UnsafeModel(
        f"{path.name} holds RWKV weights as a Python pickle, which can run any code when it is opened, so it is refused.",
        hint="Get the model as .safetensors or .gguf. If you trust this file: "
        f"`server.py convert {shlex.quote(path.name)} --to safetensors --allow-pickle`.",
    )


def _refuse_pointer(path: Path) -> None:
    error = no_model("lfs", path.name)
    with path.open("rb") as file:
        promised = lfs_size(file.read(512))
    if promised:
        error.message += f" The real file has {promised:,} bytes."
    raise error


def _refuse_by_promise(path: Path, kind: FileKind) -> None:
    """Nothing we know. Only the wording of the error may follow from what the name promises."""
    if kind == "other" and path.suffix == ".gguf":
        from modules.detect.gguf_header import read_gguf_header

        read_gguf_header(path)
    if kind in ("other", "json") and path.suffix == ".safetensors":
        read_safetensors_header(path)
    raise no_model(kind, path.name)

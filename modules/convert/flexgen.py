"""OPT in Hugging Face layout -> FlexGen's arrays, one .npy per tensor, with config.json and the tokenizer beside them.

The folder becomes a model only with its config.json, which is written last: what ends a conversion early leaves arrays that no
loader takes for a model, and the same command goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from modules.convert.gguf import Converted
from modules.convert.process import OnProgress, run_child
from modules.detect import check
from modules.detect.config_keys import CONFIG_FILES
from modules.detect.draft import folder_files, read_json
from modules.detect.flexgen import array_header
from modules.detect.opt import OptShape, opt_shape
from modules.detect.tokenizer import TOKENIZER_FILES
from modules.errors import BackendUnavailable, Conflict, CorruptModel, IncompatibleModel, InvalidParameter, StorageFull
from modules.overlays import Overlays, start_script
from modules.paths import name_problem
from modules.schema import LoadProgress

_TYPES = {"F16": ("float16", 2), "F32": ("float32", 4)}
_BESIDE = (
    *TOKENIZER_FILES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)
_SPARE_BYTES = 4 << 20


async def convert_flexgen(
    source: Path,
    on_progress: OnProgress,
    *,
    type: str = "F16",
    out: Path | None = None,
    overwrite: bool = False,
    overlays: Overlays | None = None,
) -> Converted:
    """Write the folder, or go on with one that was begun. Cancelling ends the child and keeps the arrays that are whole.

    Raises IncompatibleModel for what is no OPT, CorruptModel, Conflict when a whole model is there, BackendUnavailable, and
    StorageFull before anything is written where the disk has no room.
    """
    started = time.monotonic()
    overlays = overlays or Overlays.find()
    kind = type.upper()
    if kind not in _TYPES:
        raise InvalidParameter(f"FlexGen's arrays are F16 or F32, not {type}.", param="type")
    on_progress(LoadProgress("Checking the model"))
    model = check(source)
    if model.format != "hf":
        raise IncompatibleModel(
            f"{source.name} is {model.format}, not a folder of safetensors.", hint="Name the Hugging Face folder."
        )
    folder = Path(model.path)
    config = read_json(folder / "config.json")
    shape = opt_shape(config)
    target = out or folder.with_name(f"{folder.name}-np")
    if problem := name_problem(target.name):
        raise IncompatibleModel(f"The output's name {problem}.", hint="Choose another name with --out.")
    if (target / "config.json").is_file():
        if not overwrite:
            raise Conflict(f"{target.name} exists already.", hint="Choose another name with --out, or pass --overwrite.")
        (target / "config.json").unlink()  # not a model any more until the end
    if not overlays.complete("flexgen"):
        raise BackendUnavailable("This needs the FlexGen environment.", hint=f"Run: {start_script()} install flexgen")
    dtype, width = _TYPES[kind]
    _ask_for_space(target, shape, width)
    arguments = [str(folder.resolve()), str(target.resolve()), dtype]
    env, python = overlays.worker_env("flexgen"), overlays.python("flexgen")
    child = "modules.convert.children.hf_to_flexgen"
    result, _ = await run_child(python, child, arguments, env, overlays.root, on_progress)
    on_progress(LoadProgress("Checking the result", 1.0))
    _check(target, shape)
    _finish(folder, target, config, dtype)
    notes = (f"{result['kept']} arrays were there already.",) if result["kept"] else ()
    size = sum(folder_files(target).values())
    return Converted(target, f"FlexGen {kind}", size, round(time.monotonic() - started, 2), notes)


def _ask_for_space(target: Path, shape: OptShape, width: int) -> None:
    """Raise StorageFull unless what is still to be written fits."""
    there = folder_files(target) if target.is_dir() else {}
    needed = _SPARE_BYTES
    for name, sides in shape.tensors().items():
        size = width * math.prod(sides)
        if there.get(name, 0) < size:
            needed += size
    base = next(path for path in (target, *target.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(base).free
    if free < needed:
        raise StorageFull(
            f"The conversion needs about {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free.",
            hint="Free some space, or choose another folder with --out.",
        )


def _check(target: Path, shape: OptShape) -> None:
    files = folder_files(target)
    for name, expected in shape.tensors().items():
        if name not in files or array_header(target / name, files[name]).shape != expected:
            raise CorruptModel(f"{name} was not written as it should be.", hint="Run the same command again.")


def _finish(source: Path, target: Path, config: dict[str, Any], dtype: str) -> None:
    """The tokenizer and the other texts, then config.json, which makes the folder a model."""
    files = folder_files(source)
    for name in (*_BESIDE, *(name for name in CONFIG_FILES if name != "config.json")):
        if name in files:
            shutil.copyfile(source / name, target / name)
    part = target / ".config.json.part"
    try:
        shutil.copyfile(source / "config.json", part)
        with part.open("rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
        os.replace(part, target / "config.json")
    finally:
        part.unlink(missing_ok=True)

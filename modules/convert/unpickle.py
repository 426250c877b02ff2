"""Pickled weights -> safetensors, for a file whose owner says that it may be opened.

Pickles are refused everywhere else. Here one is opened once, in a fenced child process (children/pickle_to_safetensors.py),
and what comes out is a file that can't run anything.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from pathlib import Path

from modules.convert.gguf import Converted
from modules.convert.process import OnProgress, run_child
from modules.detect.draft import folder_files, read_json
from modules.detect.safetensors_header import read_safetensors_header
from modules.detect.sniff import no_model, sniff
from modules.errors import BackendUnavailable, Conflict, CorruptModel, IncompatibleModel, StorageFull, UnsafeModel
from modules.overlays import Overlays, start_script
from modules.paths import name_problem
from modules.schema import LoadProgress

_INDEX = "pytorch_model.bin.index.json"
_MAX_RATIO = 1.1  # torch stores its members uncompressed


async def convert_pickle(
    source: Path,
    on_progress: OnProgress,
    *,
    allow_pickle: bool,
    out: Path | None = None,
    overwrite: bool = False,
    overlays: Overlays | None = None,
) -> Converted:
    """Write the tensors of a pickle, or of a folder's pytorch_model.bin, as safetensors. Cancelling removes the unfinished file.

    Raises UnsafeModel unless `allow_pickle`, and when the file holds more than tensors; CorruptModel, Conflict, StorageFull,
    BackendUnavailable.
    """
    started = time.monotonic()
    overlays = overlays or Overlays.find()
    files = _pickles(source)
    if not allow_pickle:
        raise UnsafeModel(
            f"{files[0].name} is a Python pickle, which can run any code when it is opened.",
            hint="If you trust its source, pass --allow-pickle: it is opened once, fenced in, and written as safetensors.",
        )
    for file in files:
        _refuse_bomb(file)
    target = out or (source / "model.safetensors" if source.is_dir() else source.with_suffix(".safetensors"))
    if problem := name_problem(target.name):
        raise IncompatibleModel(f"The output's name {problem}.", hint="Choose another name with --out.")
    if target.exists() and not overwrite:
        raise Conflict(f"{target.name} exists already.", hint="Choose another name with --out, or pass --overwrite.")
    if not overlays.complete("transformers"):
        raise BackendUnavailable("This needs the Transformers environment.", hint=f"Run: {start_script()} install transformers")
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in files) + 1_000_000
    if shutil.disk_usage(target.parent).free < needed:
        raise StorageFull(
            f"The conversion needs about {needed / 1e6:,.0f} MB.", hint="Free some space, or choose another folder with --out."
        )
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        arguments = [str(part.resolve()), *(str(file.resolve()) for file in files)]
        env = {**overlays.worker_env("transformers"), "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
        python = overlays.python("transformers")
        await run_child(python, "modules.convert.children.pickle_to_safetensors", arguments, env, overlays.root, on_progress)
        on_progress(LoadProgress("Checking the result", 1.0))
        read_safetensors_header(part)
        part.chmod(0o644)  # the library makes it private
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return Converted(target, "safetensors", target.stat().st_size, round(time.monotonic() - started, 2))


def _pickles(source: Path) -> list[Path]:
    """The pickle itself, or the ones a folder's index or name says are its weights."""
    if source.is_file():
        names = [source]
    else:
        files = folder_files(source)
        if _INDEX in files:
            listed = read_json(source / _INDEX).get("weight_map")
            shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
            if not shards or any(name_problem(name) or name not in files for name in shards):
                raise CorruptModel(f"{_INDEX} names files that are not there.", hint="Fetch the missing files into the folder.")
            names = [source / name for name in shards]
        else:
            names = [source / name for name in ("pytorch_model.bin",) if name in files]
        if not names:
            raise IncompatibleModel("The folder holds no pytorch_model.bin.", hint="Name the file to convert.")
    for name in names:
        kind = sniff(name)
        if kind in ("safetensors", "gguf"):
            raise IncompatibleModel(f"{name.name} is {kind} already.", hint="Load it as it is.")
        if kind not in ("torch", "pickle", "zip"):
            raise no_model(kind, name.name)
    return names


def _refuse_bomb(path: Path) -> None:
    """A zip whose members are larger than the file itself was not written by torch."""
    if sniff(path) == "pickle":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CorruptModel(f"{path.name} is a damaged archive.", hint="Fetch the file again.") from error
    if unpacked > _MAX_RATIO * path.stat().st_size:
        raise UnsafeModel(
            f"{path.name} would unpack to {unpacked:,} bytes, more than itself: no program writes weights like that.",
            hint="Delete the file.",
        )

"""Hugging Face folder or GGUF -> GGUF of a chosen type.

    HF folder -> F32, F16, BF16    llama.cpp's converter, in the Transformers environment
    GPTQ folder -> Q4_0, Q4_1, Q8_0    the same, with the packed numbers as they are (gptq.py)
    GGUF -> GGUF of any type       llama_model_quantize, in the llama.cpp environment

Everything is written to hidden `.part` files beside the output. The output appears by one rename, after its header has been
checked and its weights counted, so whatever ends a conversion leaves nothing that looks whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from modules.convert.gguf_types import FROM_CONVERTER, estimated_bytes, gguf_type
from modules.convert.gptq import EXACT, exact_type
from modules.convert.library import ConverterError, converter_dir, has_converter, install_converter
from modules.convert.process import OnProgress, run_child
from modules.detect import check
from modules.detect.gguf_header import read_gguf_header
from modules.detect.weights import find_weights, read_weights
from modules.errors import BackendUnavailable, Conflict, CorruptModel, IncompatibleModel, StorageFull, StorageReadOnly
from modules.overlays import Overlays, start_script
from modules.paths import name_problem
from modules.schema import LoadProgress, ModelFiles

_CONVERTIBLE = ("hf", "gptq")
# Folder names that say nothing about the model: its own name is the folder above.
_GENERIC = frozenset({"hf", "model", "main", "snapshot", "safetensors", "fp16", "f16"})
AUTO = "auto"
_CHILDREN = "modules.convert.children"


@dataclass(frozen=True, slots=True)
class ConvertJob:
    """`source`: an HF or GPTQ folder, or a GGUF file. `out` None: beside the source, by `default_output`.

    `type` "auto" is F16, or for a GPTQ folder the type that holds it without quantising again. `imatrix`: an importance matrix,
    which the smallest types need. `requantize` allows a quantized source, at a loss.
    """

    source: Path
    type: str = AUTO
    out: Path | None = None
    imatrix: Path | None = None
    requantize: bool = False
    overwrite: bool = False
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """The finished file. `notes` are worth telling: a tokenizer recognised, tensors kept in another type."""

    path: Path
    type: str
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


async def convert(job: ConvertJob, on_progress: OnProgress, overlays: Overlays | None = None) -> Converted:
    """Run a conversion. Cancelling the task ends the child process and removes the unfinished files.

    Raises LoadError's subclasses (what is wrong with the model, or what must be installed), Conflict when the output exists,
    InvalidParameter for an unknown type, StorageFull before anything is written when the disk has no room.
    """
    started = time.monotonic()
    wanted = None if job.type == AUTO else gguf_type(job.type)
    overlays = overlays or Overlays.find()
    on_progress(LoadProgress("Checking the model"))
    model = check(job.source)
    kind = _kind(model, wanted, job)
    out = job.out or default_output(Path(model.path), kind)
    _check_output(out, job)
    steps = _plan(model, kind, job, overlays)
    _ask_for_space(out.parent, model, kind, steps)
    part, middle = _part(out, "part"), _part(out, "source.part")
    _remove_stale(out)
    notes: list[str] = []
    try:
        source = Path(model.path)
        if "quantize" not in steps or "convert" in steps:
            await _ensure_converter(overlays, on_progress)
            target = middle if "quantize" in steps else part
            written = kind if steps == ("convert",) else _lossless_type(model, packed="bridge" in steps)
            packed = "" if model.format != "gptq" else kind if "bridge" in steps else "float"
            notes += await _from_hf(model, target, written, packed, overlays, on_progress)
            source = target
        if "quantize" in steps:
            notes += await _quantize(source, part, kind, job, overlays, on_progress)
        on_progress(LoadProgress("Checking the result", 1.0))
        _verify(part, model)
        _publish(part, out)
    finally:
        for leftover in (part, middle):
            leftover.unlink(missing_ok=True)
    return Converted(out, kind, out.stat().st_size, round(time.monotonic() - started, 2), tuple(dict.fromkeys(notes)))


def default_output(source: Path, kind: str) -> Path:
    """NAME-TYPE.gguf beside the source; a type already in the name is replaced."""
    stem = source.stem if source.suffix == ".gguf" else source.name
    if stem.lower() in _GENERIC:
        stem = source.parent.name
    stem = re.sub(r"[-._](?:f32|f16|bf16|fp16|i?q\d\w*)$", "", stem, flags=re.IGNORECASE)
    return source.parent / f"{stem}-{kind}.gguf"


async def library_types(overlays: Overlays | None = None) -> list[str]:
    """The types the installed llama-cpp-python can write."""
    overlays = overlays or Overlays.find()
    _need_llama_cpp(overlays)
    env = overlays.worker_env("llamacpp")
    python = overlays.python("llamacpp")
    result, _ = await run_child(python, f"{_CHILDREN}.gguf_quantize", ["--types"], env, overlays.root, lambda progress: None)
    return list(result["types"])


def _kind(model: ModelFiles, wanted: str | None, job: ConvertJob) -> str:
    """The type to write. Raises IncompatibleModel for one that would quantise a GPTQ checkpoint again, unasked."""
    if model.format != "gptq":
        return wanted or "F16"
    if wanted is None or (wanted in EXACT and not job.requantize):
        return exact_type(model, wanted)
    if wanted not in FROM_CONVERTER and not job.requantize:
        raise IncompatibleModel(
            f"{model.id} is quantised already, and making {wanted} of it quantises it again, which loses more.",
            hint="Leave --type out for a GGUF with the same numbers, or pass --requantize.",
        )
    return wanted


def _plan(model: ModelFiles, kind: str, job: ConvertJob, overlays: Overlays) -> tuple[str, ...]:
    """Which of convert and quantize are needed; raises when one can't run here."""
    if model.format == "gguf":
        if kind in FROM_CONVERTER and not _is_float(model):
            raise IncompatibleModel(
                f"{model.id} is quantized; writing it as {kind} would only make it larger.",
                hint="Convert the original model instead.",
            )
        if not _is_float(model) and not job.requantize:
            raise IncompatibleModel(
                f"{model.id} is quantized already, and quantizing again loses more.",
                hint="Start from an F16 or F32 file, or pass --requantize.",
            )
        _need_llama_cpp(overlays)
        return ("quantize",)
    if model.format not in _CONVERTIBLE:
        raise IncompatibleModel(
            f"{model.id} is in {model.format} form, which llama.cpp's converter does not read.",
            hint="Convert the original model, as published in safetensors.",
        )
    if not overlays.complete("transformers"):
        raise BackendUnavailable(
            "Converting needs the Transformers environment.", hint=f"Run: {start_script()} install transformers"
        )
    if kind in FROM_CONVERTER:
        return ("convert",)
    if model.format == "gptq" and not job.requantize:
        return ("bridge",)
    _need_llama_cpp(overlays)
    return ("convert", "quantize")


def _is_float(model: ModelFiles) -> bool:
    return model.quantization is None or model.quantization.method in FROM_CONVERTER


def _need_llama_cpp(overlays: Overlays) -> None:
    if not overlays.has_module("llamacpp", "llama_cpp"):
        raise BackendUnavailable(
            "Quantizing needs llama-cpp-python, which is not built here yet.",
            hint=f"Wait for its build to end (the page shows it), or run: {start_script()} install llamacpp",
        )


def _lossless_type(model: ModelFiles, *, packed: bool = False) -> str:
    """The float type that holds the source exactly: for the file between the two steps, or beside packed layers."""
    folder = Path(model.path)
    tensors, _ = read_weights(folder, find_weights(folder, dict.fromkeys(model.files, 0)))
    dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith((".scales", ".zeros"))}
    if "F32" in dtypes or (model.format == "gptq" and not packed):
        return "F32"
    return "BF16" if "BF16" in dtypes else "F16"


def _check_output(out: Path, job: ConvertJob) -> None:
    if problem := name_problem(out.name):
        raise IncompatibleModel(f"The output's name {problem}.", hint="Choose another name with --out.")
    if out.is_dir():
        raise Conflict(f"{out.name} is a folder.", hint="Name a file with --out.")
    if out.exists() and not job.overwrite:
        raise Conflict(f"{out.name} exists already.", hint="Choose another name with --out, or pass --overwrite.")
    if out.exists() and out.samefile(job.source):
        raise Conflict("The output would replace the source.", hint="Choose another name with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise StorageReadOnly("The output's folder can't be written.", hint="Choose another folder with --out.")


def _ask_for_space(folder: Path, model: ModelFiles, kind: str, steps: tuple[str, ...]) -> None:
    parameters = model.parameters or model.size_bytes // 2
    needed = estimated_bytes(parameters, kind)
    if len(steps) == 2:
        needed += estimated_bytes(parameters, _lossless_type(model))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFull(
            f"The conversion needs about {_megabytes(needed)}, the disk has {_megabytes(free)} free.",
            hint="Free some space, or choose a folder on another disk with --out.",
        )


def _part(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.{suffix}")


def _remove_stale(out: Path) -> None:
    """Unfinished files of a conversion to the same output whose process was killed."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"(\d+)\.(?:source\.)?part")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) != os.getpid() and not _alive(int(match[1])):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # no cheap, safe way to ask on Windows: leave the file
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


async def _ensure_converter(overlays: Overlays, on_progress: OnProgress) -> None:
    """The installer fetches the converter in the background; a conversion that comes first fetches it itself."""
    env_dir = overlays.env_dir("transformers")
    if has_converter(env_dir):
        return
    on_progress(LoadProgress("Fetching llama.cpp's converter"))
    try:
        await asyncio.to_thread(install_converter, env_dir, overlays.python("transformers"))
    except ConverterError as error:
        raise BackendUnavailable(str(error)) from error


async def _from_hf(
    model: ModelFiles, out: Path, kind: str, packed: str, overlays: Overlays, on_progress: OnProgress
) -> list[str]:
    folder = Path(model.path)
    name = folder.parent.name if folder.name.lower() in _GENERIC else folder.name
    converter = converter_dir(overlays.env_dir("transformers"))
    _, notes = await run_child(
        overlays.python("transformers"),
        f"{_CHILDREN}.hf_to_gguf",
        [str(converter), str(folder), str(out), kind, name, *([packed] if packed else [])],
        overlays.worker_env("transformers"),
        overlays.root,
        on_progress,
    )
    return notes


async def _quantize(
    source: Path, out: Path, kind: str, job: ConvertJob, overlays: Overlays, on_progress: OnProgress
) -> list[str]:
    threads = job.threads or os.cpu_count() or 1
    imatrix = str(job.imatrix.resolve()) if job.imatrix else ""
    _, notes = await run_child(
        overlays.python("llamacpp"),
        f"{_CHILDREN}.gguf_quantize",
        [str(source), str(out), kind, str(threads), "1" if job.requantize else "0", imatrix],
        overlays.worker_env("llamacpp"),
        overlays.root,
        on_progress,
    )
    return notes


def _verify(part: Path, model: ModelFiles) -> None:
    """The result must be a whole GGUF with as many weights as the source."""
    header = read_gguf_header(part)
    weights = sum(tensor.elements for tensor in header.tensors.values())
    if model.parameters and weights < 0.98 * model.parameters:
        raise CorruptModel(
            f"The result holds {weights:,} weights, the source {model.parameters:,}.", hint="Try again; report it if it stays."
        )


def _publish(part: Path, out: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, out)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # the folder's entry reaches the disk a little later on odd file systems
            descriptor = os.open(out.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

"""The plan for a repository that is not here yet: its list of files with sizes, and the first bytes of its weights.

Of each weights file only the header is fetched, into a sparse file of its size, which detection and planner read.
Of several quantisations in GGUF one header is fetched: the others are the same tensors in other sizes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modules.detect import inspect
from modules.detect.gguf_header import read_gguf_header
from modules.download.hub import list_repository
from modules.download.plan import RepoFile, Variant, best_projector, names_projector, variants
from modules.download.wire import Retry, Wire
from modules.errors import CorruptModel, DownloadError, InvalidParameter, LoadError
from modules.plan.planner import order, ways_of
from modules.plan.shape import read_shape
from modules.schema import ModelFiles, Quantization

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modules.download.hub import Hub
    from modules.plan.types import Fit, Machine, Shape
    from modules.registry import Environment
    from modules.schema import LoaderSpec

MAX_HEADER = 40_000_000
MAX_WEIGHTS = 400
_FIRST = 1 << 20
_CHUNK = 1 << 18
_MAX_SIDECAR = 16_000_000
_STALL_S = 30.0


async def plan_repository(
    hub: Hub, repo: str, revision: str | None, machine: Machine, specs: Iterable[LoaderSpec], environment: Environment
) -> list[Fit]:
    """Every way to run what the repository holds, once downloaded, the best first. Raises DownloadError, LoadError."""
    commit, files = await list_repository(hub, repo, revision)
    specs = list(specs)

    def work() -> list[Fit]:
        with tempfile.TemporaryDirectory(prefix="switchyard-plan-") as name:
            models = _models(hub, repo, commit, files, Path(name))
        return order([way for model, shape in models for way in ways_of(model, shape, machine, specs, environment, "download")])

    return await asyncio.to_thread(work)


def _models(hub: Hub, repo: str, commit: str, files: Sequence[RepoFile], folder: Path) -> list[tuple[ModelFiles, Shape]]:
    found: list[tuple[ModelFiles, Shape]] = []
    forms = [form for form in variants(files) if form.size_bytes and not names_projector(form.files[0].path)]
    if not forms:
        raise InvalidParameter(
            f"{repo} holds no weights this product reads.", hint="Choose one with .safetensors or .gguf files."
        )
    plain = [form for form in forms if form.label == "safetensors"]
    ggufs = [form for form in forms if form.label != "safetensors"]
    if plain:
        sidecars = [file for file in files if "/" not in file.path and file.path.endswith(".json") and file.size <= _MAX_SIDECAR]
        model = _examined(hub, repo, commit, (*plain[0].files, *sidecars), folder / "hf")
        found.append((model, read_shape(model)))
    if ggufs:
        model = _examined(hub, repo, commit, ggufs[0].files, folder / "gguf")
        projector = best_projector(files)
        shape = dataclasses.replace(read_shape(model), sight=projector.size if projector is not None else 0)
        found += [resized(model, shape, form) for form in ggufs]
    return found


def _examined(hub: Hub, repo: str, commit: str, files: Sequence[RepoFile], folder: Path) -> ModelFiles:
    """What these files are, by their headers. Raises CorruptModel."""
    if len(files) > MAX_WEIGHTS:
        raise InvalidParameter(f"{repo} has more than {MAX_WEIGHTS} files.", hint="Download it, then plan it here.")
    folder.mkdir()
    for file in files:
        _fetch(hub, hub.file_url(repo, commit, file.path), file, folder / Path(file.path).name)
    first = Path(files[0].path).name
    model = inspect(folder / first if first.endswith(".gguf") else folder)
    if model.problem:
        raise CorruptModel(f"{repo}: {model.problem}")
    return model


def resized(model: ModelFiles, shape: Shape, form: Variant) -> tuple[ModelFiles, Shape]:
    """The same model as another of the repository's GGUFs: its type by the file's name, its tensors by the ratio of the sizes."""
    ratio = form.size_bytes / max(shape.file_bytes, 1)
    quantization = Quantization(form.label, round(8 * form.size_bytes / max(shape.parameters, 1), 2))
    kind = form.label.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    made = dataclasses.replace(
        shape,
        file_bytes=form.size_bytes,
        quantization=quantization,
        stored={kind: form.size_bytes},
        embedding_bytes=int(shape.embedding_bytes * ratio),
        output_bytes=int(shape.output_bytes * ratio),
    )
    return dataclasses.replace(model, id=form.label, size_bytes=form.size_bytes, quantization=quantization), made


# --- the first bytes ---------------------------------------------------------------------------------------------


def _fetch(hub: Hub, url: str, file: RepoFile, target: Path) -> None:
    """Write a sidecar whole, or a weights file's header into a sparse file of its size. Raises DownloadError."""
    wire = Wire(hub, _STALL_S)
    try:
        response = wire.get(url, 0)
        if response.status != 200:
            raise DownloadError(f"{file.path}: the hub answers HTTP {response.status}.", hint="Check the repository; try again.")
        raw = bytearray()
        wanted = file.size if target.suffix == ".json" else _FIRST
        while len(raw) < min(wanted, file.size):
            piece = wire.read(response, _CHUNK)
            if not piece:
                break
            raw += piece
            if len(raw) >= wanted < MAX_HEADER:
                wanted = max(wanted, _needed(bytes(raw), file, target))
    except Retry as error:
        raise DownloadError(f"{file.path}: {error}.", hint="Check the network, then try again.") from error
    finally:
        wire.close()
    _write(target, bytes(raw), file.size)


def _needed(raw: bytes, file: RepoFile, target: Path) -> int:
    """How much of the file its header takes, as far as the bytes say: more than there are where they end inside it."""
    if target.suffix == ".safetensors":
        return min(8 + int.from_bytes(raw[:8], "little"), MAX_HEADER)
    _write(target, raw, file.size)
    try:  # zeros where the header goes on are no header
        whole = read_gguf_header(target).data_offset <= len(raw)
    except LoadError:
        whole = False
    return 0 if whole else min(4 * len(raw), MAX_HEADER)


def _write(target: Path, raw: bytes, size: int) -> None:
    with target.open("wb") as out:
        out.write(raw)
        out.truncate(size)

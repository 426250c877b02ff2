"""The plan for a repository that is not here yet: its list of files with sizes, and the first bytes of its weights.

Of each weights file only the header is fetched, into a sparse file of its size, which detection and planner read.
Of several quantisations in GGUF one header is fetched: the others are the same tensors in other sizes.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpx

from modules.detect import inspect
from modules.detect.ggml_types import FILE_TYPES
from modules.download.hub import list_repository
from modules.download.plan import RepoFile, choose_files
from modules.errors import CorruptModel, DownloadError, InvalidParameter
from modules.paths import name_problem
from modules.plan.planner import order, ways_of
from modules.plan.shape import read_shape
from modules.schema import ModelFiles, Quantization

if TYPE_CHECKING:
    from modules.download.hub import Hub
    from modules.plan.types import Fit, Machine, Shape
    from modules.registry import Environment
    from modules.schema import LoaderSpec

MAX_HEADER = 40_000_000
_FIRST = 1 << 20
_MAX_SIDECAR = 8_000_000
_MAX_WEIGHTS = 400
_TIMEOUT_S = 30.0
_REDIRECTS = 5
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_TYPES = "|".join(sorted(FILE_TYPES.values(), key=len, reverse=True))
_TYPE = re.compile(rf"(?<![A-Za-z0-9])({_TYPES})(?![A-Za-z0-9])", re.IGNORECASE)


async def plan_repository(
    hub: Hub, repo: str, revision: str | None, machine: Machine, specs: Iterable[LoaderSpec], environment: Environment
) -> list[Fit]:
    """Every way to run what the repository holds, once downloaded, the best first. Raises DownloadError, LoadError."""
    commit, files = await list_repository(hub, repo, revision)
    specs = list(specs)
    found: list[tuple[Fit, int]] = []
    with tempfile.TemporaryDirectory(prefix="switchyard-plan-") as name:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=True) as client:
            for model, shape in await _models(client, hub, repo, commit, files, Path(name)):
                found += ways_of(model, shape, machine, specs, environment, "download")
    return order(found)


async def _models(
    client: httpx.AsyncClient, hub: Hub, repo: str, commit: str, files: Sequence[RepoFile], folder: Path
) -> list[tuple[ModelFiles, Shape]]:
    ggufs = quantisations(files)
    if ggufs:
        first = min(ggufs, key=lambda name: sum(file.size for file in ggufs[name]))
        for file in ggufs[first]:
            await _fetch(client, hub, hub.file_url(repo, commit, file.path), file, folder)
        path = folder / Path(ggufs[first][0].path).name
    else:
        chosen = choose_files(repo, commit, files).files
        if sum(file.path.endswith(".safetensors") for file in chosen) > _MAX_WEIGHTS:
            raise InvalidParameter(f"{repo} has more than {_MAX_WEIGHTS} weight files.", hint="Download it, then plan it here.")
        for file in chosen:
            if file.path.endswith((".safetensors", ".json")):
                await _fetch(client, hub, hub.file_url(repo, commit, file.path), file, folder)
        path = folder
    model = inspect(path)
    if model.problem:
        raise CorruptModel(f"{repo}: {model.problem}")
    shape = read_shape(model)
    if not ggufs:
        return [(model, shape)]
    return [resized(model, shape, name, sum(file.size for file in parts)) for name, parts in ggufs.items()]


def quantisations(files: Iterable[RepoFile]) -> dict[str, list[RepoFile]]:
    """The GGUF models of a repository, each with its parts in order; projectors and other side files left out."""
    found: dict[str, list[RepoFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        lowered = file.path.lower()
        if lowered.endswith(".gguf") and "mmproj" not in lowered and "imatrix" not in lowered and file.size:
            found.setdefault(_SHARD.sub("", file.path), []).append(file)
    return found


def resized(model: ModelFiles, shape: Shape, name: str, size: int) -> tuple[ModelFiles, Shape]:
    """The same model as another of the repository's files: its type by the file's name, its tensors by the ratio of the sizes."""
    match = _TYPE.search(name)
    label = match[1].upper() if match else (model.quantization.method if model.quantization else "GGUF")
    ratio = size / max(shape.file_bytes, 1)
    quantization = Quantization(label, round(8 * size / max(shape.parameters, 1), 2))
    kind = next((part for part in (label, label.rpartition("_")[0]) if part), label)
    made = dataclasses.replace(
        shape,
        file_bytes=size,
        quantization=quantization,
        stored={kind.removesuffix("_S").removesuffix("_M"): size},
        embedding_bytes=int(shape.embedding_bytes * ratio),
        output_bytes=int(shape.output_bytes * ratio),
    )
    return dataclasses.replace(model, id=name, size_bytes=size, quantization=quantization), made


# --- the first bytes ---------------------------------------------------------------------------------------------


async def _fetch(client: httpx.AsyncClient, hub: Hub, url: str, file: RepoFile, folder: Path) -> None:
    """Write a sidecar whole, or a weights file's header into a sparse file of its size. Raises DownloadError."""
    name = Path(file.path).name
    if problem := name_problem(name):
        raise DownloadError(f"The repository has a file whose name {problem}.")
    target = folder / name
    if name.endswith(".json"):
        if file.size > _MAX_SIDECAR and not name.endswith(".index.json"):
            return  # a tokenizer: the plan needs none
        target.write_bytes(await _head(client, hub, url, file.size))
        return
    count = min(_FIRST, file.size)
    while True:
        raw = await _head(client, hub, url, count)
        if name.endswith(".safetensors"):
            needed = 8 + int.from_bytes(raw[:8], "little")
        else:
            needed = count if _whole(raw, file.size, target) else 4 * count
        if needed <= count or count == file.size or count >= MAX_HEADER:
            break
        count = min(needed, MAX_HEADER, file.size)
    with target.open("wb") as out:
        out.write(raw)
        out.truncate(file.size)


def _whole(raw: bytes, size: int, target: Path) -> bool:
    """Whether the bytes hold a GGUF's whole header: zeros read as tensors' entries are refused by the reader."""
    from modules.detect.gguf_header import read_gguf_header
    from modules.errors import LoadError

    with target.open("wb") as out:
        out.write(raw)
        out.truncate(size)
    try:
        return read_gguf_header(target).data_offset <= len(raw)
    except LoadError:
        return False


async def _head(client: httpx.AsyncClient, hub: Hub, url: str, count: int) -> bytes:
    """The first `count` bytes of a file on the hub, by our rules for redirects and the token. Raises DownloadError."""
    if not count:
        return b""
    try:
        for _ in range(_REDIRECTS + 1):
            async with client.stream("GET", url, headers=hub.headers_for(url), follow_redirects=False) as response:
                if response.status_code in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("location", ""))
                    await hub.check_redirect(url)
                    continue
                if response.status_code != 200:
                    raise DownloadError(f"The hub answers HTTP {response.status_code}.", hint="Check the repository; try again.")
                raw = bytearray()
                async for piece in response.aiter_raw():
                    raw += piece
                    if len(raw) >= count:
                        break
                return bytes(raw[:count])
    except httpx.HTTPError as error:
        raise DownloadError("The hub can't be reached.", hint="Check the network and the proxy settings.") from error
    raise DownloadError("The hub redirects in a circle.", hint="Check HF_ENDPOINT; try another mirror.")

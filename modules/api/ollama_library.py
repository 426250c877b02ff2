"""Ollama's pull and delete: a model of the hub, fetched with its progress in Ollama's lines; a local one, put into the trash.

A name is `OWNER/NAME:TAG`; the tag is a GGUF's type. Names of Ollama's own registry have no owner: nothing here can read it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from modules.api import ollama_models as models
from modules.api.ui_library import check_idle, tell
from modules.download.hub import list_repository
from modules.download.plan import variants
from modules.errors import AppError, Conflict, ModelNotFound, error_from_wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from modules.download.plan import RepoFile
    from modules.services import Services

# Without a tag, or with Ollama's word for that, this one where the repository has it.
_USUAL = "Q4_K_M"
_PACE_S = 0.25


async def pull(services: Services, name: str) -> AsyncIterator[dict[str, Any]]:
    """Begin to fetch it: what Ollama says meanwhile. Raises ModelNotFound, DownloadError and others."""
    try:
        await asyncio.to_thread(models.find, services, name)
    except ModelNotFound:
        asked = models.repository_of(name)
        if asked is None:
            raise ModelNotFound(
                f"There is no model {name!r} here, and the registry it would be in can't be read.",
                hint="Name a repository of the hub as OWNER/NAME or OWNER/NAME:Q4_K_M.",
                param="model",
            ) from None
        hub = await asyncio.to_thread(services.hub.hub)
        repository, tag = asked
        commit, files = await list_repository(hub, repository, None)
        job = await services.downloads.start(repository, None, _wanted(files, tag), commit=commit)
        return _progress(services, job["id"])
    return _here()


async def _here() -> AsyncIterator[dict[str, Any]]:
    yield {"status": "success"}


def _wanted(files: Sequence[RepoFile], tag: str) -> list[str]:
    """The paths of the GGUF with this type; none for the download's own choice."""
    ggufs = {variant.label.upper(): variant for variant in variants(files) if variant.label != "safetensors"}
    found = ggufs.get(_USUAL if tag == "latest" else tag)
    if found is not None:
        return [file.path for file in found.files]
    if tag == "latest":
        return []
    offered = ", ".join(ggufs) or "no GGUF"
    raise ModelNotFound(f"The repository has no {tag}.", hint=f"It has: {offered}.", param="model")


async def _progress(services: Services, job_id: str) -> AsyncIterator[dict[str, Any]]:
    """The download goes on in the background when nobody listens any more. Raises what ended it, a pause on the page included."""
    yield {"status": "pulling manifest"}
    while True:
        job = services.downloads.job(job_id)
        if job["state"] == "done":
            break
        if job["state"] not in ("queued", "running"):
            if job["error"] is not None:
                raise error_from_wire(job["error"])
            raise Conflict(f"The download was {job['state']} on the Models page.")
        if job["file"]:
            line = {"status": f"pulling {job['file']}", "digest": job["file"]}
            yield line | {"total": job["total_bytes"], "completed": job["done_bytes"]}
        await asyncio.sleep(_PACE_S)
    if job["problem"]:
        raise AppError(f"It was fetched, but can't be used: {job['problem']}")
    tell(services)
    yield {"status": "success"}


async def delete(services: Services, name: str) -> None:
    """Put a local model into the trash; the Models page brings it back. Raises ModelNotFound, Conflict, StorageError."""
    model = await asyncio.to_thread(lambda: services.library.find(models.find(services, name)))
    check_idle(services, model)
    await asyncio.to_thread(services.shelf.trash, model)
    tell(services)

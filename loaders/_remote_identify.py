"""Which kind of server is at an address, and what it says about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loaders._remote_kinds import KINDS, Kind
from modules.errors import AppError, ModelNotFound
from modules.remotes.listing import entries, listed_vision

if TYPE_CHECKING:
    from modules.remotes.connection import Connection

# Who a model list says its models belong to. Others put their user's name there.
_OWNERS = {
    "vllm": "vllm",
    "llamacpp": "llama-server",
    "library": "ollama",
    "tabbyapi": "tabbyapi",
    "me": "llama-cpp-python",
}


@dataclass(frozen=True)
class Found:
    """A model at a server. `context_length` and `vocab_size` 0: it does not say. `sees`: it reads images; None, likewise."""

    kind: Kind
    entry: dict[str, Any]
    context_length: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    version: str = ""
    sees: bool | None = None


async def find(connection: Connection, model: str) -> Found:
    """Raises AppError: out of reach, no such model."""
    listed = entries(await connection.get("/models"))
    entry = next((e for e in listed if e["id"] == model), None)
    server = connection.server
    if entry is None:
        known = ", ".join(e["id"] for e in listed[:5]) or "none"
        raise ModelNotFound(f"{server.name} has no model {model[:200]!r} now.", hint=f"It has: {known}.", param="model")
    name = server.kind if server.kind != "auto" else _by_owner(entry) or await _by_routes(connection)
    kind = KINDS[name]
    context = _number(entry.get("max_model_len") or entry.get("context_length"))
    version, sees = "", listed_vision(entry)
    if name == "llama-server":
        props = await _asked(connection, "/props")
        settings = props.get("default_generation_settings")
        context = _number(settings.get("n_ctx") if isinstance(settings, dict) else 0)
        version = str(props.get("build_info") or "")[:60]
        modalities = props.get("modalities")
        sees = modalities.get("vision") is True if isinstance(modalities, dict) else sees
    elif name == "tgi":
        info = await _asked(connection, "/info")
        context, version = _number(info.get("max_total_tokens")), str(info.get("version") or "")[:60]
        task = info.get("model_pipeline_tag")
        sees = task == "image-text-to-text" if isinstance(task, str) else sees
    elif name in ("vllm", "ollama"):
        version = str((await _asked(connection, "/version" if name == "vllm" else "/api/version")).get("version") or "")[:60]
        if name == "ollama":
            sees = listed_vision(await _asked(connection, "/api/show", body={"model": model}))
    elif name == "tabbyapi":
        current = await _asked(connection, "/model", root=False)
        parameters = current.get("parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        context, vision = _number(parameters.get("max_seq_len")), parameters.get("use_vision")
        sees = vision if isinstance(vision, bool) else sees
    ends = entry.get("eos_token_ids")
    ids = tuple(i for i in ends if isinstance(i, int)) if isinstance(ends, list) else ()
    return Found(kind, entry, context, _number(entry.get("vocab_size")), ids, version, sees)


def _by_owner(entry: dict[str, Any]) -> str | None:
    if "loader" in entry and "capabilities" in entry:
        return "switchyard"
    return _OWNERS.get(str(entry.get("owned_by")).lower())


async def _by_routes(connection: Connection) -> str:
    if "max_total_tokens" in await _asked(connection, "/info"):
        return "tgi"
    if "default_generation_settings" in await _asked(connection, "/props"):
        return "llama-server"
    return "openai"


async def _asked(connection: Connection, path: str, *, root: bool = True, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What one of a server's own routes says; {} where it has none, which is an answer, too."""
    try:
        value = await (connection.get(path, root=root) if body is None else connection.post(path, body, root=root))
    except AppError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0

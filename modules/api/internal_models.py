"""Bodies of text-generation-webui's /v1/internal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from modules.errors import InvalidParameter, UnsupportedParameter
from modules.paths import confine
from modules.registry import loader_named

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from modules.schema import LoaderSpec

MAX_IDS = 1_000_000


class TextRequest(BaseModel):
    """`model`: the one loaded to use, or to load; else the active one."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    text: str
    model: str | None = None


class TokensRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    tokens: list[int] = Field(max_length=MAX_IDS)
    model: str | None = None


class LogitsRequest(BaseModel):
    """Sampling parameters come beside these."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str
    use_samplers: bool | None = None
    top_logits: int | None = Field(None, ge=1, le=1000)


class StopRequest(BaseModel):
    """`id` is that of a response (chatcmpl-…, msg_…) or its X-Request-Id."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = Field(None, max_length=200)


class LoadRequest(BaseModel):
    """`args` holds the loader's options, `loader` among them. `anyway` tries what the planner finds too large."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model_name: str
    args: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    instruction_template: str | None = None
    instruction_template_str: str | None = None
    anyway: bool = False


class DownloadRequest(BaseModel):
    """`revision` is a branch, tag or commit; `files` are paths of the repository, none for the usual choice."""

    model_config = ConfigDict(strict=True, extra="ignore")

    repository: str = Field(max_length=200)
    revision: str | None = Field(None, max_length=200)
    files: list[str] = Field(default_factory=list, max_length=5000)


class LoraRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    lora_names: list[str] = Field(max_length=64)


def loader_of(given: Any, specs: Mapping[str, LoaderSpec]) -> str | None:
    """A loader by its name or title, however it is written: "llama.cpp", "Transformers". Raises InvalidParameter."""
    if given is None:
        return None
    name = loader_named(given, specs) if isinstance(given, str) else None
    if name is not None:
        return name
    raise InvalidParameter("There is no such loader.", hint=f"There are {', '.join(specs)}.", param="args.loader")


def options_of(args: dict[str, Any], spec: LoaderSpec) -> tuple[dict[str, Any], list[str]]:
    """(load options under the loader's own names, warnings for what it has none of). Paths and trust are the
    operator's: they are set by flags and on the page. Raises InvalidParameter."""
    options: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in args.items():
        option = spec.option(name)
        if option is None:
            warnings.append(f"{_shown(name)} is no option of {spec.title} and has no effect.")
        elif option.kind in ("path", "paths") or "trust" in option.name:
            raise InvalidParameter(f"{_shown(name)} is set by the server's operator, not by a request.", param="args")
        elif value is not None:
            options[option.name] = value
    return options, warnings


def lora_paths(names: list[str], folder: Path) -> list[str]:
    """Names under --lora-dir as paths. Raises InvalidParameter; the same for one that is not there and one that may not be."""
    paths = []
    for name in names:
        path = confine(folder, name, nested=True)
        if not path.exists():
            raise InvalidParameter("There is no such LoRA.", hint="GET /v1/internal/lora/list lists them.", param="lora_names")
        paths.append(str(path))
    return paths


def require_lora(spec: LoaderSpec) -> None:
    if spec.option("lora") is None:
        raise UnsupportedParameter(
            f"{spec.title} takes no LoRA.", hint="Load the model with another backend.", param="lora_names"
        )


def _shown(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-." else "?" for c in name)[:64]

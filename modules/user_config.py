"""text-generation-webui's config-user.yaml as our per-model settings: each model's loader and options, and what is left out.

Its keys are patterns that the product matches against a model's name from the start; they are read here as names with wildcards,
and no regular expression of a stranger is ever run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from modules.errors import InvalidParameter
from modules.load_options import complete_options
from modules.registry import loader_named
from modules.yaml_file import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modules.schema import LoaderSpec, ModelFiles

MAX_ENTRIES = 2000
MAX_WILDCARDS = 4
_VERSION = re.compile(r"(v\d)?(_hf)?$", re.IGNORECASE)
# What that product keeps there beside load options, and where it belongs here.
_ELSEWHERE = {
    "instruction_template": "the model's own chat template is used",
    "instruction_template_str": "the model's own chat template is used",
    "truncation_length": "the context length is a load option of each backend",
    "mode": "there is one kind of chat",
    "skip_special_tokens": "it belongs to each request",
    "custom_stopping_strings": "it belongs to the page's settings",
    "custom_token_bans": "it belongs to each request",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """`saved` are [model id, loader, options]; `skipped` are [entry, reason]."""

    saved: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_user_config(text: str, models: Sequence[ModelFiles], specs: Mapping[str, LoaderSpec]) -> Imported:
    """What a config-user.yaml means for the models that are here; later entries win, as there. Raises InvalidParameter."""
    try:
        data = parse_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidParameter(
            "This is no valid YAML.", hint="Choose text-generation-webui's config-user.yaml.", param="text"
        ) from error
    if not isinstance(data, dict) or len(data) > MAX_ENTRIES:
        raise InvalidParameter(f"This is no map of at most {MAX_ENTRIES} models.", param="text")
    merged: dict[str, dict[str, Any]] = {}
    result = Imported()
    for pattern, entry in data.items():
        if not isinstance(pattern, str) or not isinstance(entry, dict):
            result.skipped.append((str(pattern)[:200], "it is no map of settings"))
            continue
        matched = [model.id for model in models if _matches(pattern, model.id)]
        if not matched:
            result.skipped.append((pattern[:200], "no model here has this name"))
        for model_id in matched:
            merged.setdefault(model_id, {}).update(entry)
    for model_id, entry in merged.items():
        _take(model_id, entry, specs, result)
    return result


def _matches(pattern: str, model_id: str) -> bool:
    """By name or by the last part of the id, from its start; "$" ends the name, ".*" is anything, all else is itself."""
    text = pattern.lower()
    exact = text.endswith("$")
    pieces = re.sub(r"\\(.)", r"\1", text.removesuffix("$").removeprefix("^")).split(".*")
    if len(pieces) > MAX_WILDCARDS + 1 or len(text) > 300 or not any(pieces):
        return False
    wanted = re.compile(".*".join(re.escape(piece) for piece in pieces))
    names = {model_id.lower(), model_id.lower().rpartition("/")[2]}
    names |= {name.removesuffix(".gguf") for name in names}
    return any(wanted.fullmatch(name) if exact else wanted.match(name) for name in names)


def _take(model_id: str, entry: dict[str, Any], specs: Mapping[str, LoaderSpec], result: Imported) -> None:
    values = {str(name).replace("-", "_"): value for name, value in entry.items()}
    given = values.pop("loader", None)
    if given is None:
        result.skipped.append((model_id, "it names no loader, and options belong to one"))
        return
    # There are several of ExLlama there ("ExLlamav2_HF"), and one here.
    loader = loader_named(str(given), specs) or loader_named(_VERSION.sub("", str(given)), specs)
    if loader is None:
        result.skipped.append((model_id, f"there is no loader {str(given)[:60]!r} here"))
        return
    options: dict[str, Any] = {}
    for name, value in values.items():
        reason = _option(specs[loader], name, value, options)
        if reason:
            result.skipped.append((f"{model_id}: {name[:80]}", reason))
    result.saved.append((model_id, loader, options))


def _option(spec: LoaderSpec, name: str, value: Any, options: dict[str, Any]) -> str | None:
    """Put one value into `options`; the reason when it can't be."""
    option = spec.option(name)
    if option is None:
        return _ELSEWHERE.get(name, f"{spec.title} has no such option here")
    if value in (None, "") and option.kind != "str":
        return None  # that product writes every field of its form
    if option.kind in ("path", "paths"):
        return "paths are set on the page or by flags, so that none comes with a file"
    if "trust" in option.name:
        return "code of a model is trusted by a flag alone"
    if isinstance(value, str) and option.kind in ("int", "float"):
        try:
            value = float(value)
        except ValueError:
            return "it is no number"
    try:
        options[option.name] = complete_options(spec, {option.name: value})[option.name]
    except InvalidParameter as error:
        return error.message
    return None

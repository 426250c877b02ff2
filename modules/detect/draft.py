"""What detection has learned so far about a model. An examiner fills it in and raises at the first problem, so that a broken
model is still listed with what is known."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import CorruptModel
from modules.schema import ModelFiles, ModelFormat, Quantization

MAX_JSON_BYTES = 4_000_000


@dataclass(slots=True)
class Draft:
    """The fields of ModelFiles, filled in one by one."""

    format: ModelFormat = "unknown"
    size_bytes: int = 0
    architecture: str | None = None
    quantization: Quantization | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    parameters: int | None = None
    has_chat_template: bool = False
    base_model: str | None = None
    license: str | None = None
    vision: bool = False
    files: list[str] = field(default_factory=list)

    def finish(self, path: Path, problem: str | None) -> ModelFiles:
        return ModelFiles(
            id=path.name,
            path=str(path),
            format=self.format,
            size_bytes=self.size_bytes,
            architecture=self.architecture,
            quantization=self.quantization,
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            parameters=self.parameters,
            has_chat_template=self.has_chat_template,
            base_model=self.base_model,
            license=self.license,
            vision=self.vision,
            files=tuple(self.files),
            problem=problem,
        )


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a small sidecar file. Raises CorruptModel when it is none, OSError when it can't be read."""
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CorruptModel(f"{path.name} is larger than {limit:,} bytes.", hint="Fetch the model again.")
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorruptModel(
            f"{path.name} is no valid JSON{_where(error)}.", hint="The file is damaged or cut: fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path.name} is no JSON object.", hint="The file is damaged: fetch it again.")
    return value


def integer(value: Any, *, minimum: int = 1, maximum: int = 2**53) -> int | None:
    """`value` when it is a plausible whole number, else None."""
    return value if type(value) is int and minimum <= value <= maximum else None


def text(value: Any, limit: int = 300) -> str | None:
    """`value` when it is a short text on one line, else None."""
    return value if isinstance(value, str) and 0 < len(value) <= limit and value.isprintable() else None


def folder_files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the ordinary files in `folder` (links followed), hidden and unfinished ones left out, sorted."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and not entry.name.endswith(UNFINISHED) and entry.is_file():
                found[entry.name] = entry.stat().st_size
    return dict(sorted(found.items()))


# Our own downloads and conversions in progress, and other programs' usual ones: never a model.
UNFINISHED = (".part", ".incomplete", ".tmp", ".crdownload", ".download", ".lock")


def _where(error: Exception) -> str:
    return f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""

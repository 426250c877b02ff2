"""Presets: named sampling parameters, one YAML file each, in text-generation-webui's format.

A file is a flat map that holds only what differs from neutral. Keys of other products and versions are understood where
they mean something here; what can't be mapped is reported, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import sampling
from modules.errors import AppError, InvalidParameter, NotFound
from modules.paths import confine, name_problem
from modules.yaml_file import read_yaml, save_error, write_yaml

MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Preset:
    """`sampling` is checked and leaves out what is neutral. `problems` are lines for a person."""

    name: str
    sampling: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_values(data: Any) -> tuple[dict[str, Any], list[str]]:
    """(checked values, problems) of a preset file's content."""
    if data is None:
        return {}, []
    if not isinstance(data, dict):
        return {}, ["It is no map of parameters."]
    values: dict[str, Any] = {}
    problems: list[str] = []
    greedy = False
    for key, value in data.items():
        name = sampling.ALIASES.get(str(key), str(key))
        if name == "do_sample":
            greedy = value is False
        elif name not in sampling.PARAMETERS:
            problems.append(f"{key} is not known here and was left out.")
        else:
            try:
                values |= sampling.check({name: _as_list(name, value)})
            except InvalidParameter as error:
                problems.append(error.message)
    if greedy:
        values["temperature"] = 0.0
    return sampling.without_neutral(values), problems


class Presets:
    """The presets of one folder. Every method does file work: call them off the event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Sorted, letters of either case together."""
        if not self._folder.is_dir():
            return []
        stems = [path.stem for path in self._folder.glob("*.yaml") if path.is_file() and name_problem(path.name) is None]
        return sorted(stems, key=lambda name: (name.casefold(), name))

    def load(self, name: str) -> Preset:
        """Raises NotFound, InvalidParameter for a bad name, ConfigError for a file that is no YAML."""
        try:
            data = read_yaml(self._path(name), MAX_BYTES)
        except FileNotFoundError:
            raise NotFound(f"There is no preset {name!r}.", param="name") from None
        values, problems = read_values(data)
        return Preset(name, values, tuple(problems))

    def all(self) -> list[Preset]:
        """Every preset; one that can't be read has its reason in `problems`."""
        found = []
        for name in self.names():
            try:
                found.append(self.load(name))
            except AppError as error:
                found.append(Preset(name, {}, (error.message,)))
        return found

    def save(self, name: str, values: dict[str, Any]) -> Preset:
        """Write the checked values; replaces the preset of just this name."""
        path = self._path(name)
        twin = next((other for other in self.names() if other.casefold() == name.casefold() and other != name), None)
        if twin is not None:
            raise InvalidParameter(
                f"There is already a preset {twin!r}.", hint="Names must differ by more than case.", param="name"
            )
        checked = sampling.without_neutral(sampling.check(values))
        write_yaml(path, {key: list(value) if isinstance(value, tuple) else value for key, value in checked.items()})
        return Preset(name, checked)

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise NotFound(f"There is no preset {name!r}.", param="name") from None
        except OSError as error:
            raise save_error(path.name, error) from error

    def _path(self, name: str) -> Path:
        confine(self._folder, name)  # the name by itself, too: "a " is bad and "a .yaml" is not
        return confine(self._folder, f"{name}.yaml")


def _as_list(name: str, value: Any) -> Any:
    """Lists that other products write as text: sampler_priority by lines, dry_sequence_breakers as quoted strings."""
    if sampling.PARAMETERS[name].kind not in ("strings", "names") or not isinstance(value, str):
        return value
    if name == "sampler_priority":
        return [part for line in value.splitlines() for part in line.replace(",", " ").split()]
    try:
        return json.loads(f"[{value}]")
    except ValueError:
        return value

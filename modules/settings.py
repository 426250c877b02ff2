"""What the page remembers, kept on the server: a reload, another browser and a restart find it again.

`SETTINGS` is the one table of them. `settings.yaml` holds what differs from the defaults; `model_settings.yaml` holds each
model's loader and load options. Both are checked when read: a bad value is reported and becomes its default, and the file
as it was is kept as NAME.bad.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules import sampling
from modules.errors import AppError, ConfigError, InvalidParameter
from modules.load_options import complete_options
from modules.yaml_file import keep_bad, read_yaml, write_yaml

if TYPE_CHECKING:
    from pathlib import Path

    from modules.presets import Presets
    from modules.schema import LoaderSpec


@dataclass(frozen=True, slots=True)
class Setting:
    """`check` returns the value to keep, or raises InvalidParameter. Null resets to the default, unless it is a value."""

    name: str
    default: Any
    help: str
    check: Callable[[str, Any], Any]
    null_is_a_value: bool = False


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameter(f"{name} must be true or false.", param=name)
    return value


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise InvalidParameter(f"{name} must be one of {', '.join(choices)}.", param=name)
        return str(value)

    return check


def _text(limit: int, optional: bool = False) -> Callable[[str, Any], str | None]:
    def check(name: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str) or len(value) > limit:
            raise InvalidParameter(f"{name} must be text of at most {limit} characters.", param=name)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidParameter(f"{name} must be valid Unicode.", param=name)
        return value

    return check


def _max_tokens(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
        raise InvalidParameter(f"{name} must be a whole number from 1 to 1000000, or null for no limit.", param=name)
    return value


def _stop(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) > 64 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in value):
        raise InvalidParameter(f"{name} must be at most 64 strings of 1 to 256 characters.", param=name)
    return [str(_text(256)(name, item)) for item in value]


def _sampling(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter(f"{name} must map parameter names to values.", param=name)
    return {key: list(item) if isinstance(item, tuple) else item for key, item in sampling.check(value).items()}


def _last_model(name: str, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"model", "loader"}:
        raise InvalidParameter(f"{name} must have model and loader.", param=name)
    return {key: str(_text(1000)(name, item)) for key, item in value.items()}


SETTINGS: dict[str, Setting] = {
    s.name: s
    for s in (
        Setting("sampling", {}, "Sampling parameters that differ from the page's defaults.", _sampling),
        Setting("max_tokens", 1024, "Longest answer, in tokens; null is up to the end of the context.", _max_tokens, True),
        Setting("stop", [], "Stop sequences for every chat.", _stop),
        Setting("system_prompt", "", "System prompt of a new chat.", _text(100_000)),
        Setting("preset", None, "The preset the sampling parameters came from.", _text(200, optional=True)),
        Setting("theme", "system", "Colours of the page.", _choice("system", "light", "dark")),
        Setting("send_with", "enter", "Key that sends a message.", _choice("enter", "ctrl_enter")),
        Setting("show_receipts", True, "Show tokens, speed and parameters below each answer.", _bool),
        Setting("autoload_last_model", True, "Load the last used model at the start.", _bool),
        Setting("last_model", None, "Set by the server: what was active last.", _last_model),
    )
}


class Settings:
    """The values and their file. `update` does file work: call it off the event loop."""

    def __init__(self, path: Path, presets: Presets | None = None) -> None:
        self._path = path
        self._presets = presets
        self._mutex = threading.Lock()
        self._changed: dict[str, Any] = {}
        self.problems: list[str] = []
        self.unsaved: AppError | None = None
        self._read()

    def _read(self) -> None:
        try:
            data = read_yaml(self._path)
        except FileNotFoundError:
            return
        except ConfigError as error:
            self.problems.append(f"{error.message} The defaults are used; the file {keep_bad(self._path)}.")
            return
        if not isinstance(data, dict):
            data = {} if data is None else {"(no map)": data}
        for name, value in data.items():
            self._take(str(name), value)
        if self.problems:
            self.problems.append(f"{self._path.name} {keep_bad(self._path)}.")

    def _take(self, name: str, value: Any) -> None:
        setting = SETTINGS.get(name)
        if setting is None:
            self.problems.append(f"{self._path.name}: {name} is no setting.")
            return
        if name == "sampling" and isinstance(value, dict):  # one bad slider must not reset the others
            kept: dict[str, Any] = {}
            for key, item in value.items():
                try:
                    kept |= _sampling(name, {str(key): item})
                except InvalidParameter as error:
                    self.problems.append(f"{self._path.name}: {error.message}")
            value = kept
        try:
            self._changed[name] = setting.check(name, value)
        except InvalidParameter as error:
            self.problems.append(f"{self._path.name}: {error.message} The default is used.")

    def __getitem__(self, name: str) -> Any:
        return copy.deepcopy(self._changed.get(name, SETTINGS[name].default))

    def values(self) -> dict[str, Any]:
        """Every setting. `sampling` is complete: each parameter of the table with the value in force."""
        return {**{name: self[name] for name in SETTINGS}, "sampling": self.sampling()}

    def sampling(self) -> dict[str, Any]:
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in sampling.default_values().items()}
        return {**values, **self["sampling"]}

    def update(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Take the changes (all or none) and save. Null is the default again; `sampling` is merged name by name.

        A new `preset` without `sampling` brings that preset's values; other parameters then become neutral. When the disk
        refuses, the values count until the server ends and `unsaved` says why. Raises InvalidParameter, NotFound.
        """
        with self._mutex:
            checked = {name: self._checked(name, value) for name, value in changes.items()}
            preset = checked.get("preset")
            if preset is not None and "sampling" not in checked and self._presets is not None:
                values = {**sampling.neutral_values(), **self._presets.load(preset).sampling}
                checked["sampling"] = _differing(_sampling("sampling", values))
            for name, value in checked.items():
                if value == SETTINGS[name].default:
                    self._changed.pop(name, None)
                else:
                    self._changed[name] = value
            self._save()
            return self.values()

    def _checked(self, name: str, value: Any) -> Any:
        setting = SETTINGS.get(name)
        if setting is None:
            raise InvalidParameter(f"There is no setting {name!r}.", param=name)
        if name == "sampling" and isinstance(value, dict):
            merged = {**self["sampling"], **_sampling(name, value)}
            dropped = {sampling.ALIASES.get(key, key) for key, item in value.items() if item is None}
            return _differing({key: item for key, item in merged.items() if key not in dropped})
        if value is None and not setting.null_is_a_value:
            return copy.deepcopy(setting.default)
        return setting.check(name, value)

    def _save(self) -> None:
        try:
            write_yaml(self._path, self._changed)
            self.unsaved = None
        except AppError as error:
            self.unsaved = error


class ModelSettings:
    """Each model's loader and load options, keyed by the model's id: nothing leaks from one model to another."""

    def __init__(self, path: Path, specs: Mapping[str, LoaderSpec]) -> None:
        self._path = path
        self._specs = specs
        self._mutex = threading.Lock()
        self._models: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        try:
            data = read_yaml(path, 4 * 1024 * 1024)
        except FileNotFoundError:
            return
        except ConfigError as error:
            self.problems.append(f"{error.message} No saved load options are used; the file {keep_bad(path)}.")
            return
        if not isinstance(data, (dict, type(None))):
            self.problems.append(f"{path.name} holds no map of models.")
        for model, entry in data.items() if isinstance(data, dict) else ():
            self._take(str(model), entry)
        if self.problems:
            self.problems.append(f"{path.name} {keep_bad(path)}.")

    def _take(self, model: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            self.problems.append(f"{self._path.name}: {model} has no map of settings.")
            return
        kept: dict[str, Any] = {"options": {}}
        if entry.get("loader") in self._specs:
            kept["loader"] = entry["loader"]
        elif entry.get("loader") is not None:
            self.problems.append(f"{self._path.name}: {model} names the unknown loader {entry['loader']!r}.")
        by_loader = entry.get("options") or {}
        for loader, options in by_loader.items() if isinstance(by_loader, dict) else ():
            spec = self._specs.get(str(loader))
            if spec is None or not isinstance(options, dict):
                self.problems.append(f"{self._path.name}: {model} has options for the unknown loader {loader!r}.")
                continue
            kept["options"][spec.name] = good = {}
            for name, value in options.items():
                try:
                    complete_options(spec, {str(name): value})
                    good[str(name)] = value
                except InvalidParameter as error:
                    self.problems.append(f"{self._path.name}: {model}: {error.message}")
        self._models[model] = kept

    def loader(self, model: str) -> str | None:
        """The loader this model was last used with."""
        return self._models.get(model, {}).get("loader")

    def options(self, model: str, loader: str) -> dict[str, Any]:
        """The saved options, only those that differ from the loader's defaults."""
        return dict(self._models.get(model, {}).get("options", {}).get(loader, {}))

    def save(self, model: str, loader: str, options: Mapping[str, Any]) -> None:
        """Remember what differs from the defaults. Raises InvalidParameter, and StorageError's subclasses."""
        spec = self._specs[loader]
        complete = complete_options(spec, options)
        changed = {o.name: _plain(complete[o.name]) for o in spec.options if _plain(complete[o.name]) != _plain(o.default)}
        with self._mutex:
            entry = self._models.setdefault(model, {"options": {}})
            entry["loader"] = loader
            entry["options"][loader] = changed
            self._write()

    def entry(self, model: str) -> dict[str, Any]:
        """All that is kept for a model, for `put_back`."""
        return copy.deepcopy(self._models.get(model, {}))

    def put_back(self, model: str, entry: dict[str, Any]) -> None:
        """Keep what `entry` gave once more, checked as a file's content is; nothing for an empty one."""
        if not entry:
            return
        with self._mutex:
            self._take(model, entry)
            self._write()

    def rename(self, model: str, new: str) -> None:
        """The settings follow a model to its new name; what was kept for an earlier model of that name is gone."""
        with self._mutex:
            before = self._models.pop(new, None), self._models.pop(model, None)
            if before[1] is not None:
                self._models[new] = before[1]
            if before != (None, None):
                self._write()

    def forget(self, model: str) -> None:
        with self._mutex:
            if self._models.pop(model, None) is not None:
                self._write()

    def _write(self) -> None:
        write_yaml(self._path, self._models)


def _plain(value: Any) -> Any:
    """As YAML holds it: a table's () is a form's []."""
    return list(value) if isinstance(value, tuple) else value


def _differing(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are not at the page's default."""
    defaults = sampling.default_values()
    return {k: v for k, v in values.items() if v != (list(defaults[k]) if isinstance(defaults[k], tuple) else defaults[k])}

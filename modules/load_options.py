"""Load options: the operator's values checked against a loader's OptionSpec table and completed with its defaults."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modules.errors import InvalidParameter
from modules.paths import is_inside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modules.schema import LoaderSpec, OptionSpec


def complete_options(spec: LoaderSpec, *layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every option of the loader: the defaults, overridden by each layer in turn. None in a layer means the default.

    Raises InvalidParameter for an unknown name or a value of the wrong kind. Aliases are resolved.
    """
    options = {option.name: option.default for option in spec.options}
    for layer in layers:
        for name, value in (layer or {}).items():
            option = spec.option(name)
            if option is None:
                known = ", ".join(sorted(options)) or "none"
                raise InvalidParameter(f"{spec.title} has no load option {name!r}.", hint=f"It has: {known}.", param=name)
            options[option.name] = option.default if value is None else _check(option, value)
    return options


def confine_paths(spec: LoaderSpec, options: Mapping[str, Any] | None, folders: Sequence[Path]) -> dict[str, Any] | None:
    """A request's load options with every path inside one of `folders`, a relative one put below the first that has it.

    Flags and saved settings are the operator's own and may lead anywhere; what comes over HTTP may not. Raises
    InvalidParameter, which says the same of a path that is outside and of one that is not there.
    """
    if options is None:
        return None
    confined = dict(options)
    for name, value in options.items():
        option = spec.option(name)
        if option is None or option.kind not in ("path", "paths") or not value:
            continue
        given = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, str) for item in given):
            continue  # complete_options says what it must be
        paths = [_confined(option, item, folders) for item in given]
        confined[name] = paths if option.kind == "paths" else paths[0]
    return confined


def _confined(option: OptionSpec, value: str, folders: Sequence[Path]) -> str:
    if "\0" not in value:
        for folder in folders:
            path = folder / value  # an absolute value replaces the folder
            if is_inside(path, folder) and (path.exists() or folder == folders[-1]):
                return str(path)
    raise _invalid(option, "must lie in the folder of the models or of the LoRA adapters")


def _check(option: OptionSpec, value: Any) -> Any:
    kind = option.kind
    if kind == "bool":
        if not isinstance(value, bool):
            raise _invalid(option, "must be true or false")
    elif kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _invalid(option, "must be a number")
        if kind == "int" and value != int(value):
            raise _invalid(option, "must be a whole number")
        if option.minimum is not None and value < option.minimum:
            raise _invalid(option, f"must be at least {option.minimum:g}")
        if option.maximum is not None and value > option.maximum:
            raise _invalid(option, f"must be at most {option.maximum:g}")
        return int(value) if kind == "int" else float(value)
    elif kind == "paths":
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise _invalid(option, "must be a list of paths")
        return [str(item) for item in value]
    elif not isinstance(value, str):
        raise _invalid(option, "must be text")
    elif kind == "choice" and value not in option.choices:
        raise _invalid(option, f"must be one of {', '.join(option.choices)}")
    return value


def _invalid(option: OptionSpec, what: str) -> InvalidParameter:
    return InvalidParameter(f"{option.name} {what}.", param=option.name)

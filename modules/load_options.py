"""Load options: the operator's values checked against a loader's OptionSpec table and completed with its defaults."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modules.errors import InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Mapping

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

"""One option of the configuration: as a command line flag, an environment variable, a line of the settings file.

`modules.config` holds the table; here is what a row of it can do.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from modules.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ENV_PREFIX = "SWITCHYARD_"

Kind = Literal["bool", "int", "float", "str", "path", "list"]


@dataclass(frozen=True)
class Option:
    """One row of the table, of the server's or of a loader's."""

    name: str
    kind: Kind
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    choices: tuple[str, ...] = ()

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def flags(self) -> list[str]:
        """With dashes; `normalise` has turned underscores into them."""
        return list(dict.fromkeys(f"--{name.replace('_', '-')}" for name in (self.name, *self.aliases)))

    def convert(self, value: Any, where: str) -> Any:
        """A value of the environment or the settings file as this option's kind. Raises ConfigError."""
        try:
            return self._convert(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {value!r} is no {_KIND_NAMES[self.kind]}.", hint=self.help) from error

    def _convert(self, value: Any) -> Any:
        if value is None:
            return None
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            return _BOOLS[str(value).strip().lower()]
        if self.kind == "list":
            return tuple(value.split(",")) if isinstance(value, str) else tuple(str(item) for item in value)
        if isinstance(value, (bool, list, dict)):
            raise ValueError(value)
        if self.choices and str(value) not in self.choices:
            raise ConfigError(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}.")
        return _CONVERTERS[self.kind](value)


class _Booleans(dict[str, bool]):
    def __missing__(self, key: str) -> bool:
        raise ValueError(key)


_BOOLS = _Booleans(**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off", ""), False))
_CONVERTERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str, "path": lambda v: Path(v).expanduser()}
_KIND_NAMES = {
    "bool": "yes or no",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "path": "path",
    "list": "list",
}


# --- as a command line -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of ending the process, so that every message has one form."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".", hint="--help lists the flags.")


def build_parser(rows: Sequence[Option]) -> argparse.ArgumentParser:
    """The parser of the table. Nothing is set that was not given."""
    parser = Parser(
        prog="server.py",
        description="One web page and one API for every local LLM backend.",
        epilog="Precedence: command line > SWITCHYARD_* environment > settings file > default. CMD_FLAGS.txt counts as "
        "the beginning of the command line.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(parser, rows)
    parser.add_argument("--print-config", action="store_true", help="Print a commented settings file and end.")
    return parser


def add_options(parser: argparse.ArgumentParser, rows: Sequence[Option], hidden: bool = False) -> None:
    """The rows as arguments that set nothing unless given."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for row in rows:
        target: Any = parser if hidden else groups.setdefault(row.group, parser.add_argument_group(row.group))
        text = argparse.SUPPRESS if hidden else _help(row)
        target.add_argument(*row.flags(), dest=row.name, help=text, default=argparse.SUPPRESS, **_argparse_kind(row))


def _help(row: Option) -> str:
    default = "" if row.default in (None, False, "", ()) else f" Default: {_relative(row.default)}."
    return (row.help + default).replace("%", "%%")


def _relative(value: Any) -> Any:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) and value.is_relative_to(ROOT) else value


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows `--no-name` only where the switch is on by default: that is the only place one needs it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 120))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Boolean):
            return super()._format_action_invocation(action)
        return ", ".join(s for s in action.option_strings if (s in action.negated) == action.on_by_default)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        return f"usage: {self._prog} [subcommand] [flags]\n\n"


class _Boolean(argparse.Action):
    """`--name` and `--no-name`; a name that starts with no- (`--no-mmap`) has no second form."""

    def __init__(self, option_strings: Sequence[str], dest: str, on_by_default: bool, **kwargs: Any) -> None:
        self.on_by_default = on_by_default
        negated = [f"--no-{s[2:]}" for s in option_strings if not s.startswith("--no-")]
        self.negated = frozenset(negated)
        super().__init__([*option_strings, *negated], dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string not in self.negated)


def _argparse_kind(row: Option) -> dict[str, Any]:
    metavar = {"metavar": row.metavar or row.name.rsplit("_", 1)[-1].upper()}
    if row.kind == "bool":
        return {"action": _Boolean, "on_by_default": bool(row.default)}
    if row.kind == "list":
        return {"nargs": "+", "action": "extend", **metavar}
    kind = {"type": _CONVERTERS[row.kind]}
    return {**kind, "choices": row.choices} if row.choices else {**kind, **metavar}


# --- as a settings file ------------------------------------------------------------------------------------------


def sample_file(rows: Sequence[Option]) -> str:
    """A settings file with every option commented out at its default."""
    lines = ["# Switchyard's settings file. Remove the # of a line to set it. The command line and SWITCHYARD_* win over it.", ""]
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines += ["", f"# --- {group} ---"]
        extra = f" One of: {', '.join(row.choices)}." if row.choices else ""
        lines += [f"# {row.help}{extra}", f"#{row.name}: {_yaml_value(row.default)}"]
    return "\n".join(lines)


def _yaml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[]" if not value else str(list(value))
    if isinstance(value, (int, float)):
        return str(value)
    text = str(_relative(value))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""From the command line to a `Config`: command line > environment (SWITCHYARD_*) > settings file > default.

Here are the subcommands, CMD_FLAGS.txt, the settings file and what is said about a flag that is not known; both `--some-name` and
`--some_name` are taken. The options themselves are the rows of modules.config and of the loaders.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.config import Config, check, loader_option_rows, server_options
from modules.errors import AppError, ConfigError
from modules.foreign_flags import adopt
from modules.options import ROOT, Formatter, Option, Parser, add_options, build_parser, sample_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Command:
    """A subcommand. `add_parser(subparsers)` returns its parser, `run(arguments, config)` the exit status."""

    name: str
    module: str
    help: str


COMMANDS = {
    command.name: command
    for command in (
        Command("serve", "modules.app", "Serve the page and the API (this is the default)."),
        Command("keys", "modules.keys", "Make, list and revoke API keys."),
        Command("conformance", "modules.conformance.cli", "Try every protocol on every loader."),
        Command("doctor", "modules.doctor", "Check every loader: installed, importable, device, generation."),
        Command("chats", "modules.chat.copying", "Copy all chats between a data folder and a database."),
        Command("convert", "modules.convert.cli", "Convert and quantise models."),
        Command("quantize", "modules.quantize.cli", "Make a GPTQ checkpoint of a model."),
        Command("evaluate", "modules.evaluate.cli", "Measure models: perplexity, speed, answers side by side, tasks."),
        Command("bench", "modules.evaluate.bench_cli", "Measure tokens per second."),
        Command("batch", "modules.batch.cli", "Answer a file of requests (OpenAI's batch format)."),
        Command("remote", "modules.remotes.cli", "Other servers as backends: add, list, test, remove."),
        Command("download", "modules.download", "Download a model."),
        Command("plan", "modules.plan.cli", "Say what fits on this machine: backend, quantisation, context, memory, speed."),
    )
}


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Config:
    """The configuration of one command line. Raises ConfigError with one line that says what is wrong."""
    environ = os.environ if environ is None else environ
    rows = server_options()
    loader_rows = loader_option_rows()
    known = {flag for row in (*rows, *loader_rows) for flag in row.flags()}
    words = normalise(argv)
    known |= _own_flags(split_command(words)[0])
    line, warnings = adopt([*normalise(read_cmd_flags(root, words)), *words], known, COMMANDS)
    command, before, after = split_command(line)
    parser = build_parser([*rows, *loader_rows])
    _list_commands(parser)
    given, arguments = _parse_line(parser, command, before, after, [*rows, *loader_rows])
    if given.pop("print_config", False):
        print(sample_file([*rows, *loader_rows]))
        raise SystemExit(0)
    values = _merge(given, environ, rows, loader_rows)
    server = {row.name: values[row.name] for row in rows if row.name in values}
    loader = {row.name: values[row.name] for row in loader_rows if row.name in values}
    config = Config(
        **server,
        loader_options=loader,
        explicit=frozenset(values),
        command=command,
        arguments=arguments,
        warnings=tuple(warnings),
    )
    check(config)
    return config


def _parse_line(
    parser: argparse.ArgumentParser, command: str, before: list[str], after: list[str], rows: Sequence[Option]
) -> tuple[dict[str, Any], argparse.Namespace | None]:
    """Server flags may stand on both sides of a subcommand; what its own parser has after it is its own."""
    given, unknown = parser.parse_known_args(before if command != "serve" else [*before, *after])
    if unknown:
        raise ConfigError(_unknown_flag(unknown[0], parser))
    values = vars(given)
    if command == "serve":
        return values, None
    holder, own = _own_parser(command)
    shared = _without_conflicts(own, rows)
    add_options(own, shared, hidden=True)
    arguments, unknown = holder.parse_known_args([command, *after])
    if unknown:
        raise ConfigError(_unknown_flag(unknown[0], own))
    values.update({row.name: getattr(arguments, row.name) for row in shared if hasattr(arguments, row.name)})
    return values, arguments


def _own_parser(command: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """(what holds the subcommand, the subcommand's own parser)."""
    holder = Parser(prog="server.py", allow_abbrev=False)
    subparsers = holder.add_subparsers(dest="command", parser_class=Parser)
    importlib.import_module(COMMANDS[command].module).add_parser(subparsers)
    own: argparse.ArgumentParser = subparsers.choices[command]
    return holder, own


def _own_flags(command: str) -> set[str]:
    """A subcommand's own flags: `bench --num-beams 4` is no flag of another product."""
    return set() if command == "serve" else set(_own_parser(command)[1]._option_string_actions)


def _without_conflicts(own: argparse.ArgumentParser, rows: Sequence[Option]) -> list[Option]:
    flags = set(own._option_string_actions)
    taken = {action.dest for action in own._actions}
    return [row for row in rows if row.name not in taken and flags.isdisjoint(row.flags())]


def _unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    if not flag.startswith("-"):
        return f"Unknown subcommand {flag!r}: {', '.join(COMMANDS)} are known."
    name = flag.partition("=")[0]
    close = _like(name, parser._option_string_actions)
    return f"Unknown flag {name}." + (f" Did you mean {close[0]}?" if close else " --help lists the flags.")


def _like(name: str, known: Iterable[str]) -> list[str]:
    import difflib  # not at every start

    return difflib.get_close_matches(name, list(known), n=1)


def _list_commands(parser: argparse.ArgumentParser) -> None:
    lines = "\n".join(f"  {command.name:<13}{command.help}" for command in COMMANDS.values())
    parser.formatter_class = Formatter
    parser.description = f"{parser.description}\n\nsubcommands (server.py NAME --help shows each one's own flags):\n{lines}"


def normalise(line: Sequence[str]) -> list[str]:
    """Flags with dashes for underscores: `--n_ctx=4096` is `--n-ctx=4096`. Values stay as they are."""
    words = []
    for word in line:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return words


def split_command(line: Sequence[str], names: Collection[str] = ()) -> tuple[str, list[str], list[str]]:
    """(subcommand, flags before it, arguments after it). A value of a flag is no subcommand: `--model doctor`."""
    for index, word in enumerate(line):
        previous = line[index - 1] if index else ""
        if word in (names or COMMANDS) and (index == 0 or not _takes_value(previous)):
            return word, list(line[:index]), list(line[index + 1 :])
    return "serve", list(line), []


def _takes_value(word: str) -> bool:
    """Whether a word before it makes the next one its value: a flag without `=` that is no switch."""
    if not word.startswith("--") or "=" in word:
        return False
    name = word[2:].replace("-", "_")
    kinds = {n: row.kind for row in server_options() for n in (row.name, *row.aliases)}
    kind = kinds.get(name, "bool" if name.startswith("no_") else "str")
    return kind != "bool"


def read_cmd_flags(root: Path, argv: Sequence[str] = ()) -> list[str]:
    """The words of CMD_FLAGS.txt: in the user data folder, else in the root. `#` starts a comment; a line's trailing
    backslash is dropped, since all lines are one command line anyway."""
    folders = [root / "user_data", root]
    for index, word in enumerate(argv):
        if word == "--user-data-dir" and index + 1 < len(argv):
            folders.insert(0, Path(argv[index + 1]))
        elif word.startswith("--user-data-dir="):
            folders.insert(0, Path(word.partition("=")[2]))
    for path in (folder / "CMD_FLAGS.txt" for folder in folders):
        if path.is_file():
            return parse_cmd_flags(path.read_text(encoding="utf-8-sig"), str(path))
    return []


def parse_cmd_flags(text: str, name: str = "CMD_FLAGS.txt") -> list[str]:
    lines = (line.strip().rstrip("\\") for line in text.splitlines())
    try:
        return shlex.split("\n".join(line for line in lines if line and not line.startswith("#")), comments=True)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}.", hint="Check its quotes.") from error


def _merge(given: dict[str, Any], environ: Mapping[str, str], rows: list[Option], loader_rows: list[Option]) -> dict[str, Any]:
    """Explicit values only, by precedence."""
    every = [*rows, *loader_rows]
    values = {row.name: row.convert(environ[row.env], row.env) for row in every if row.env in environ}
    values.update({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    path = values.get("settings")
    if path is None:
        data_dir = values.get("user_data_dir", Config().user_data_dir)
        path = Path(data_dir) / "config.yaml"
        if not path.is_file():
            return values
    from_file = read_settings(Path(path), every)
    return {**from_file, **values}


def read_settings(path: Path, rows: Sequence[Option]) -> dict[str, Any]:
    """The settings file's values. Raises ConfigError for one that can't be read or holds an unknown key."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The settings file {path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} is no YAML: {' '.join(str(error).split())}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"The settings file {path} must be a map of option names.")
    by_name = {name: row for row in rows for name in (row.name, *row.aliases)}
    values = {}
    for key, value in data.items():
        row = by_name.get(str(key).replace("-", "_"))
        if row is None:
            close = _like(str(key), by_name)
            raise ConfigError(f"{path}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        values[row.name] = row.convert(value, f"{path}: {key}")
    return values


def exit_status(work: Coroutine[Any, Any, None], stopped: str) -> int:
    """Do a subcommand's work: 0 done, 1 failed, 130 interrupted, the last two with a line that says so."""
    import asyncio  # not before a command line has been read: it takes a while

    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    return 0


def print_problem(error: ConfigError) -> int:
    """Say a configuration problem in one line; the exit status."""
    print(f"Switchyard: {error}", file=sys.stderr)
    return 2

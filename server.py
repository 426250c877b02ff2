"""Parse the configuration and start what it asks for; nothing else."""

from __future__ import annotations

import importlib
import os
import sys


def main(argv: list[str]) -> int:
    from modules.command_line import COMMANDS, parse, print_problem
    from modules.errors import ConfigError

    try:
        config = parse(argv)
    except ConfigError as error:
        return print_problem(error)
    for warning in config.warnings:
        print(f"Switchyard: {warning}", file=sys.stderr)
    module = importlib.import_module(COMMANDS[config.command].module)
    try:
        if config.command == "serve":
            return int(module.serve(config))
        return int(module.run(config.arguments, config))
    except ConfigError as error:
        return print_problem(error)


def until_nobody_reads(argv: list[str]) -> int:
    """`main`, for output that `| head` may stop reading: no fault of ours, so no traceback. Exit status then: 1."""
    try:
        status = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        return 1
    return status


if __name__ == "__main__":
    sys.exit(until_nobody_reads(sys.argv[1:]))

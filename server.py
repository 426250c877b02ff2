"""Parse the configuration and start what it asks for; nothing else."""

from __future__ import annotations

import importlib
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

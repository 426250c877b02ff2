"""server.py plan MODEL: what fits on this machine, as a table or JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, CorruptModel
from modules.plan.planner import plan, size
from modules.plan.service import body

if TYPE_CHECKING:
    import argparse

    from modules.config import Config
    from modules.overlays import Overlays
    from modules.plan.types import Fit, Machine
    from modules.schema import LoaderSpec


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `plan` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="what fits on this machine",
        description="For a model and this machine: which backend, quantisation, context and cache fit, in how much memory and "
        "about how fast, the best first. Reads headers only; nothing is loaded.",
    )
    parser.add_argument("source", metavar="MODEL", help="a name under the model folder, or a path; with --hub OWNER/NAME")
    parser.add_argument("--hub", action="store_true", help="a repository on the hub: its list of files and their headers")
    parser.add_argument("--revision", metavar="REV", help="with --hub: branch, tag or commit; default: main")
    parser.add_argument("--json", action="store_true", dest="as_json", help="machine-readable, on stdout")
    return parser


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 something fits, 1 nothing does or the model is broken."""
    from modules.detect.weights import headers_kept
    from modules.library import LocalLibrary
    from modules.overlays import Overlays
    from modules.plan.machine import this_machine
    from modules.registry import discover

    specs, overlays = discover(), Overlays.find()
    machine = this_machine(config.model_dir, config.user_data_dir)
    try:
        if arguments.hub:
            name, fits = arguments.source, asyncio.run(_of_repository(arguments, config, machine, specs, overlays))
        else:
            with headers_kept():
                model = LocalLibrary(config.model_dirs, specs.values()).admit(arguments.source)
                if model.problem:
                    raise CorruptModel(model.problem)
                name, fits = model.id, plan(model, machine, specs.values(), overlays)
    except KeyboardInterrupt:
        return 130
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    if arguments.as_json:
        print(json.dumps(body(name, machine, fits), indent=1, ensure_ascii=False))
    else:
        print(table(name, machine, fits))
    return 0 if any(fit.fits for fit in fits) else 1


async def _of_repository(
    arguments: argparse.Namespace, config: Config, machine: Machine, specs: dict[str, LoaderSpec], overlays: Overlays
) -> list[Fit]:
    from modules.download.account import HubAccount
    from modules.plan.repository import plan_repository

    hub = HubAccount(config.user_data_dir, config.hub_endpoint, config.hub_proxy).hub()
    return await plan_repository(hub, arguments.source, arguments.revision, machine, specs.values(), overlays)


def table(model: str, machine: Machine, fits: list[Fit]) -> str:
    """The fits for a terminal, one line each."""
    about = f"{size(machine.ram_available_bytes)} of {size(machine.ram_bytes)} memory free, {machine.cores} cores"
    for gpu in machine.gpus:
        about += f", {gpu.name} with {size(gpu.free_bytes)} free"
    if machine.bandwidth:
        about += f", memory read at about {machine.bandwidth / 1e9:.0f} GB/s"
    lines = [f"{model} on this machine: {about}", ""]
    rows = [("", "backend", "as", "context", "memory", "tok/s", "")]
    for fit in fits:
        memory = (
            "?" if fit.ram_bytes is None else size(fit.ram_bytes) + (f" + {size(fit.vram_bytes)} GPU" if fit.vram_bytes else "")
        )
        speed = "" if fit.tokens_per_second is None else f"{fit.tokens_per_second:.{0 if fit.tokens_per_second >= 10 else 1}f}"
        mark = "yes" if fit.fits else "no"
        rows.append((mark, fit.title, fit.quantization or "as it is", f"{fit.context_length:,}", memory, speed, fit.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row[:6], widths, strict=True)) + "  " + row[6])
    return "\n".join(line.rstrip() for line in lines)

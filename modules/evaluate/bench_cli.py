"""server.py bench --model_name NAME --loader NAME --prompt … --max_tokens … --repetitions … --device …"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import AppError, BackendUnavailable, ConfigError, IncompatibleModel
from modules.evaluate.bench import DEVICES, PROMPT, BenchPlan, bench, device_options, markdown
from modules.evaluate.environment import machine, software
from modules.evaluate.plan import Target, cross, loader_for, parse_target
from modules.evaluate.subject import Subject
from modules.library import LocalLibrary
from modules.overlays import Overlays
from modules.registry import discover
from modules.remotes.store import RemoteStore
from modules.remotes.watch import Remotes

if TYPE_CHECKING:
    import argparse

    from modules.config import Config
    from modules.schema import LoaderSpec


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `bench` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure tokens per second",
        description="Write an answer to one prompt several times and report tokens per second, mean ± standard deviation.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names or paths; also MODEL@LOADER:option=value")
    parser.add_argument("-n", "--model-name", action="append", default=[], metavar="MODEL", help="the same by a flag")
    parser.add_argument("--loader", action="append", default=[], help="backend; may be given again; default: the best")
    parser.add_argument("-p", "--prompt", default=PROMPT, help="what to answer")
    parser.add_argument("-m", "--max-tokens", type=int, default=100, help="tokens of each answer (%(default)s)")
    parser.add_argument("-r", "--repetitions", type=int, default=10, help="answers that count (%(default)s)")
    parser.add_argument("-d", "--device", choices=DEVICES, default="auto", help="where to compute (%(default)s)")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1], metavar="N", help="beams; several are measured in turn")
    parser.add_argument("--warmup", type=int, default=1, help="answers before those that count (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown", help="what goes to the terminal")
    return parser


def run(args: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 when every model was measured, 1 when one was not, 130 interrupted."""
    for name in ("max_tokens", "repetitions"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.warmup < 0 or min(args.num_beams) < 1:
        raise ConfigError("--warmup can't be negative, and --num-beams is at least 1.")
    specs = discover()
    for loader in args.loader:
        if loader not in specs:
            raise ConfigError(f"There is no loader {loader!r}.", hint=f"The loaders are {', '.join(specs)}.")
    words = [*args.models, *args.model_name]
    if not words:
        raise ConfigError("Which model?", hint="server.py bench MODEL, or --model_name MODEL.")
    try:
        targets = cross([parse_target(word, specs) for word in words], args.loader)
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    try:
        asyncio.run(_all(args, config, specs, targets, results))
    except KeyboardInterrupt:
        print("\nStopped. What was measured so far:", file=sys.stderr)
        _report(args, results)
        return 130
    _report(args, results)
    return 1 if any("error" in row for row in results) else 0


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    record = {"hardware": machine(), "software": software(), "prompt": args.prompt, "results": results}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text if args.format == "json" else markdown(results), end="" if args.format == "markdown" else "\n", flush=True)


async def _all(
    args: argparse.Namespace,
    config: Config,
    specs: dict[str, LoaderSpec],
    targets: tuple[Target, ...],
    results: list[dict[str, Any]],
) -> None:
    library = LocalLibrary(config.model_dirs, specs.values(), Remotes(RemoteStore(config.user_data_dir)))
    overlays = Overlays.find()
    for target in targets:
        row: dict[str, Any] = {"model": target.model, "loader_title": target.loader or "", "device": args.device}
        try:
            model = library.admit(target.model)
            choice = loader_for(model, target.loader, specs, overlays)
            row |= {"model": model.id, "loader": choice.spec.name, "loader_title": choice.spec.title}
            if not choice.ok:
                kind = IncompatibleModel if choice.installed else BackendUnavailable
                raise kind(f"{choice.spec.title} can't take {model.id}: {choice.reason}")
            library.check(model)
            options = config.options_for(choice.spec.options) | target.options | device_options(choice.spec, args.device)
            _say(f"{model.id} through {choice.spec.title}")
            subject = await Subject.open(model, choice.spec, options, overlays, lambda step: None)
            try:
                row |= {"engine": subject.info.engine, "versions": subject.client.versions}
                row["device"] = "+".join(subject.info.device_map) or args.device
                await _beams(args, subject, row, results)
            finally:
                await subject.close()
        except AppError as error:
            results.append(row | {"num_beams": args.num_beams[0], "error": str(error), "code": error.code})


async def _beams(args: argparse.Namespace, subject: Subject, row: dict[str, Any], results: list[dict[str, Any]]) -> None:
    async def step(words: str) -> None:
        _say(f"  {beams} beam{'s' if beams > 1 else ''}, {words}")

    for beams in args.num_beams:
        plan = BenchPlan(args.prompt, args.max_tokens, args.repetitions, beams, args.warmup)
        try:
            results.append(row | await bench(subject, plan, step))
        except AppError as error:
            results.append(row | {"num_beams": beams, "error": str(error), "code": error.code})
            if subject.client.dead is not None:
                return


def _say(words: str) -> None:
    """Progress, apart from the result."""
    print(words, file=sys.stderr, flush=True)

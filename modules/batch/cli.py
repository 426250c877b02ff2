"""server.py batch IN.jsonl OUT.jsonl --model NAME --loader NAME: a batch in the foreground, in this process's own worker."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.batch.runner import BatchRun, Progress
from modules.errors import AppError, Conflict
from modules.progress_line import ProgressLine
from modules.schema import LoadProgress

if TYPE_CHECKING:
    import argparse

    from modules.config import Config
    from modules.services import Services


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `batch` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer every request of a file in OpenAI's batch format: chat completions, completions and embeddings. "
        "The same command goes on with a batch that was stopped or killed; no line is lost or asked twice. Load options are "
        "flags, as for the server: --gpu-batch-size 32.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="one request a line: custom_id, method, url, body")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="one result a line, in the order they are ready")
    parser.add_argument("--overwrite", action="store_true", help="forget the results that OUT.jsonl holds")
    return parser


def run(args: argparse.Namespace, config: Config) -> int:
    """Exit status: 0 every line has an answer, 1 some have errors or the batch can't go on, 130 interrupted."""
    from modules.batch.files import refuse_same

    try:
        refuse_same(args.input, args.output)
        if args.overwrite:
            args.output.unlink(missing_ok=True)
        return asyncio.run(_batch(args, config))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        return 130
    except AppError as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Switchyard: {error.filename or args.output}: {error.strerror}.", file=sys.stderr)
        return 1


async def _batch(args: argparse.Namespace, config: Config) -> int:
    from modules.wiring import build_services

    services = build_services(config)
    services.loop = loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    if sys.platform != "win32" and task is not None:  # an ordinary end for `kill`, too: results under way are kept
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    line = ProgressLine()
    try:
        model = await _load(services, config, line)
        progress = await _run(services, args, model, line)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        line.close()
        await services.runs.close(timeout_s=2.0)
        await services.manager.close()
        await services.templates.close()
    good = progress.done - progress.failed
    print(f"{args.output}: {good} answered, {progress.failed} with errors, {progress.completion_tokens:,} tokens generated.")
    return 1 if progress.failed else 0


async def _load(services: Services, config: Config, line: ProgressLine) -> str:
    """The model's id, loaded. Without --model the one the server would start with is no sensible guess: ask for it."""
    if config.model is None:
        raise Conflict("Which model is to answer the batch?", hint="Name it: --model NAME, and --loader NAME for its backend.")
    found = await asyncio.to_thread(services.library.admit, config.model)
    line.show(LoadProgress(f"Loading {found.id}"))
    resident = await services.manager.load(found.id, config.loader)
    return resident.model.id


async def _run(services: Services, args: argparse.Namespace, model: str, line: ProgressLine) -> Progress:
    from modules.api.batch_lines import answer_line
    from modules.batch.jobs import slots_of

    def show(progress: Progress) -> None:
        line.show(LoadProgress(words(progress), progress.done / progress.total if progress.total else 1.0))

    batch = BatchRun(
        args.input,
        args.output,
        lambda url, body: answer_line(services, url, body, model),
        lambda: slots_of(services, model),
        show,
    )
    return await batch.run()


def words(progress: Progress) -> str:
    """ "120 of 5,000 lines, 2 with errors, 310 tok/s, 12 min left"."""
    parts = [f"{progress.done:,} of {progress.total:,} lines"]
    if progress.failed:
        parts.append(f"{progress.failed:,} with errors")
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.0f} tok/s")
    if progress.remaining_s is not None and progress.done < progress.total:
        seconds = int(progress.remaining_s)
        left = f"{seconds} s" if seconds < 90 else f"{seconds // 60} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
        parts.append(f"{left} left")
    return ", ".join(parts)

"""server.py download OWNER/NAME: a model from the hub, in the foreground."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.command_line import exit_status
from modules.progress_line import ProgressLine
from modules.schema import LoadProgress

if TYPE_CHECKING:
    import argparse

    from modules.download.fetch import DownloadProgress, DownloadRequest
    from modules.download.hub import Hub


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `download` subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "download",
        help="download a model",
        description="Fetch a model from the hub into the model folder. Safetensors are preferred; pickles and code are "
        "never fetched. An interrupted download goes on where it stopped. --hub-endpoint or HF_ENDPOINT names a mirror, "
        "HF_TOKEN a token for gated models; what the Models page was told counts here, too.",
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="the model's repository")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--include", metavar="PATTERN", action="append", default=[], help="weights to fetch, such as '*Q4_K_M*'; repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to put it in; default: OWNER_NAME in the model folder")
    parser.add_argument(
        "--list",
        action="store_true",
        dest="list_only",
        help="show what there is, what of it runs here, what would be fetched and what not, then stop",
    )
    return parser


def run(args: argparse.Namespace, config: Any) -> int:
    """Exit status: 0 done, 1 failed, 130 interrupted."""
    return exit_status(_run(args, config), "Stopped. The same command goes on where it stopped.")


async def _run(args: argparse.Namespace, config: Any) -> None:
    from modules.download.account import HubAccount
    from modules.download.fetch import DownloadRequest, download, plan_download

    folder = args.out.expanduser().resolve() if args.out else None
    hub = HubAccount(config.user_data_dir, config.hub_endpoint, config.hub_proxy).hub()
    request = DownloadRequest(args.repository, config.model_dir, args.revision, tuple(args.include), folder)
    if args.list_only:
        await _list_variants(request, hub, config)
    plan = await plan_download(request, hub)
    for path, reason in plan.skipped.items():
        print(f"skipped {path}: {reason}")
    print(f"{plan.repo} at {plan.commit[:12]}: {len(plan.files)} files, {plan.total_bytes / 1e6:,.1f} MB")
    if plan.projector:
        print(f"with {plan.projector}: the projector with which the model reads images")
    if args.list_only:
        for file in plan.files:
            print(f"  {file.size / 1e6:12,.1f} MB  {file.path}")
        return
    line = ProgressLine()
    try:
        done = await download(request, lambda progress: _show(line, progress), hub=hub, plan=plan)
    finally:
        line.close()
    print(done.folder)
    if done.model.problem:
        print(f"It was fetched whole, but can't be loaded: {done.model.problem}", file=sys.stderr)


async def _list_variants(request: DownloadRequest, hub: Hub, config: Any) -> None:
    """The forms of the model with their sizes, and whether each would run on this machine."""
    from modules.download.hub import list_repository
    from modules.download.plan import variants
    from modules.plan import verdict
    from modules.plan.machine import this_machine

    _, files = await list_repository(hub, request.repo, request.revision)
    machine = this_machine(config.model_dir, config.user_data_dir, bandwidth=False)
    for variant in variants(files):
        answer = verdict(variant.size_bytes, machine)
        print(f"{variant.label:<14}{variant.size_bytes / 1e6:>12,.1f} MB  {answer.level:<6}{answer.reason}")


def _show(line: ProgressLine, progress: DownloadProgress) -> None:
    speed = f"{progress.speed / 1e6:,.1f} MB/s" if progress.speed else ""
    line.show(LoadProgress(f"{progress.files_done + 1}/{progress.files_total} {progress.file}", progress.fraction), speed)

"""server.py conformance: the probes on every loader, as a table or JSON.

Without --url a server of its own is started, on a free port with a data folder of its own, and each installed loader is
tried on a bundled model. With --url a running server's loaded models are tried.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.conformance.probes import PROBES
from modules.conformance.runner import Column, http_client, report, run_column
from modules.errors import ConfigError
from modules.own_server import FAR, far_server, own_server
from modules.remotes.store import RemoteStore, model_id

if TYPE_CHECKING:
    import argparse

    import httpx

    from modules.config import Config

MARKS = {"pass": "yes", "fail": "NO", "unsupported": "-"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "conformance",
        help="what works through the API on which loader",
        description="Sends requests of every protocol to a server and shows feature x loader. Without --url a server of its own "
        "is started and every installed loader is tried on a bundled model; with --url a running server's loaded models are.",
    )
    parser.add_argument("loaders", nargs="*", metavar="LOADER", help="only these; default: all that are installed")
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:7860")
    parser.add_argument("--key", help="its API key, where it needs one")
    parser.add_argument("--probe", action="append", default=[], metavar="NAME", help="only this probe; repeatable")
    parser.add_argument("--json", action="store_true", dest="as_json", help="machine-readable, on stdout")
    return parser


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Exit status 0 when nothing failed, else 1. What a loader says it does not have is no failure."""
    unknown = set(arguments.probe) - {probe.name for probe in PROBES}
    if unknown:
        raise ConfigError(f"There is no probe {sorted(unknown)[0]!r}.", hint="--json lists their names.")
    try:
        columns = asyncio.run(_run(arguments, config))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    if not columns:
        raise ConfigError("There is no model to try.", hint="Load one, or install a loader: doctor says how.")
    print(json.dumps(report(columns), indent=1, ensure_ascii=False) if arguments.as_json else table(columns, arguments.probe))
    return int(any(column.error or column.count("fail") for column in columns))


async def _run(arguments: argparse.Namespace, config: Config) -> list[Column]:
    if arguments.url:
        headers = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else None
        async with http_client(arguments.url.rstrip("/"), headers) as http:
            return await _loaded(http, arguments)
    with tempfile.TemporaryDirectory(prefix="switchyard-conformance-") as folder:
        data = Path(folder)
        async with own_server(data / "near", "--model-dir", str(config.model_dir)) as url, http_client(url) as http:
            return await _installed(http, arguments, config, data)


async def _loaded(http: httpx.AsyncClient, arguments: argparse.Namespace) -> list[Column]:
    import httpx

    try:
        listed = (await http.get("/v1/models")).raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ConfigError(f"The server did not list its models: {error}.", hint="Check --url and --key.") from error
    columns = [Column(m["loader"], m["id"]) for m in listed if m.get("state") == "ready"]
    columns = [column for column in columns if not arguments.loaders or column.loader in arguments.loaders]
    for column in columns:
        await run_column(http, column, _tell, arguments.probe)
    return columns


async def _installed(http: httpx.AsyncClient, arguments: argparse.Namespace, config: Config, data: Path) -> list[Column]:
    from modules.doctor import device_problem, smoke_model
    from modules.overlays import Overlays
    from modules.registry import discover

    specs, overlays = discover(), Overlays.find()
    if unknown := set(arguments.loaders) - specs.keys():
        raise ConfigError(f"There is no loader {sorted(unknown)[0]!r}.", hint=f"There are {', '.join(specs)}.")
    columns = []
    for name, spec in specs.items():
        status = overlays.status(spec)
        if (arguments.loaders and name not in arguments.loaders) or not (status.installed and status.importable):
            continue
        if name == "remote":
            columns.append(await _remote(http, arguments, config, data))
            continue
        model = await asyncio.to_thread(smoke_model, spec, config)
        if model is None or device_problem(spec):
            continue
        columns.append(await _column(http, arguments, Column(name, model.id)))
    return columns


async def _column(http: httpx.AsyncClient, arguments: argparse.Namespace, column: Column) -> Column:
    answer = await http.post("/v1/internal/model/load", json={"model_name": column.model, "args": {"loader": column.loader}})
    if answer.status_code != 200:
        column.error = answer.json()["error"]["message"]
    else:
        await run_column(http, column, _tell, arguments.probe)
    return column


async def _remote(http: httpx.AsyncClient, arguments: argparse.Namespace, config: Config, data: Path) -> Column:
    """A second server is the other end, with the best small model that is here."""
    from modules.doctor import smoke_model
    from modules.overlays import Overlays
    from modules.registry import discover

    specs, overlays = discover(), Overlays.find()
    able = [specs[name] for name in ("llamacpp", "transformers") if overlays.unavailable(specs[name]) is None]
    found = [await asyncio.to_thread(smoke_model, spec, config) for spec in able]
    model = next((model.id for model in found if model is not None), "echo")
    folders = ("--model-dir", str(config.model_dir))
    async with far_server(data / "far", RemoteStore(data / "near"), model, *folders):
        return await _column(http, arguments, Column("remote", model_id(FAR, model)))


def _tell(column: Column, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{column.loader}: {what}", end="", flush=True, file=sys.stderr)


def table(columns: list[Column], only: list[str] | None = None) -> str:
    """Feature × loader, then the reasons."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    probes = [probe for probe in PROBES if not only or probe.name in only]
    width = max(len(f"{probe.group}: {probe.title}") for probe in probes)
    widths = [max(len(column.loader), 3) for column in columns]
    lines = [" " * width + "  " + "  ".join(c.loader.ljust(w) for c, w in zip(columns, widths, strict=True))]
    for probe in probes:
        cells = [column.cells.get(probe.name) for column in columns]
        marks = [MARKS[cell.state] if cell else "?" for cell in cells]
        row = "  ".join(mark.ljust(w) for mark, w in zip(marks, widths, strict=True))
        lines.append(f"{f'{probe.group}: {probe.title}'.ljust(width)}  {row}")
    lines.append("")
    for column in columns:
        if column.error:
            lines.append(f"{column.loader} could not load {column.model}: {column.error}")
            continue
        lines.append(f"{column.loader} ({column.model}): {column.count('pass')} yes, {column.count('fail')} no")
        for probe in probes:
            cell = column.cells.get(probe.name)
            if cell is not None and cell.reason:
                lines.append(f"  {MARKS[cell.state]:<4}{probe.group}: {probe.title}: {cell.reason}")
    return "\n".join(lines)

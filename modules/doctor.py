"""`doctor`: loader × {installed, importable, device ok, smoke generation ok}, with the exact fix for each no.

Importable is tried in a child with the loader's own Python; the smoke generation goes through a real worker process on a
bundled model. A crash in either is a no with its reason, never the end of the doctor.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.overlays import Overlays, nvidia_present, start_script

if TYPE_CHECKING:
    import argparse

    from modules.config import Config
    from modules.schema import LoaderSpec, ModelFiles

ORDER = ("transformers", "llamacpp", "autogptq", "gptq_for_llama", "exllama", "rwkv", "flexgen", "remote", "echo")
IMPORT_TIMEOUT_S = 180
COMPILE_TIMEOUT_S = 1800  # for what compiles its CUDA kernels at the first import
SMOKE_TIMEOUT_S = 180
NO_MODEL = "no small "  # how the fix begins when there is nothing to try a loader on
SMOKE_PROMPT = "Once upon a time"
SMOKE_TOKENS = 8
SMALL_MODEL_BYTES = 200 << 20


@dataclass
class Row:
    """One loader's state. `fix` is what to do about the first no; `note` is for people only."""

    name: str
    installed: bool = False
    importable: bool = False
    device_ok: bool = False
    smoke_ok: bool = False
    fix: str = ""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "note"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser("doctor", help="Check every loader, say how to fix what is wrong.")
    parser.add_argument("loaders", nargs="*", metavar="LOADER", help="Only these; default: all.")
    parser.add_argument("--json", action="store_true", help="Machine-readable, on stdout.")
    return parser


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Exit status 0 when every installed loader works, else 1; one that has no model to be tried on is no failure."""
    from modules.errors import ConfigError
    from modules.registry import discover

    specs = discover()
    names = [*ORDER, *sorted(specs.keys() - set(ORDER))]
    unknown = [name for name in arguments.loaders if name not in names]
    if unknown:
        raise ConfigError(f"There is no loader {unknown[0]!r}.", hint=f"The loaders are {', '.join(names)}.")
    overlays = Overlays.find()
    rows = []
    for name in arguments.loaders or names:
        if not arguments.json:
            show_step(name)
        rows.append(check(name, specs.get(name), overlays, config))
    if arguments.json:
        print(json.dumps({"loaders": [row.as_json() for row in rows]}, indent=1))
    else:
        show_step("")
        print(table(rows, overlays))
    return int(any(row.installed and row.device_ok and not row.smoke_ok and not row.fix.startswith(NO_MODEL) for row in rows))


def show_step(text: str) -> None:
    """What is being tried, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", flush=True, file=sys.stderr)


def check(name: str, spec: LoaderSpec | None, overlays: Overlays, config: Config) -> Row:
    """One loader, up to its first no."""
    row = Row(name)
    if spec is None:
        row.fix = f"there is no loaders/{name}.py: update or reinstall the product"
        return row
    status = overlays.status(spec)
    row.installed = status.installed
    device = device_problem(spec)
    row.device_ok = device is None
    if device:  # no use in installing or importing what this machine can't run
        row.fix = device
    elif status.installed:
        _check_import(row, spec, overlays)
    else:
        row.fix = status.fix
    if row.importable and row.device_ok:
        _check_smoke(row, spec, overlays, config)
    if name == "llamacpp":
        row.note = _llamacpp_note(overlays)
    return row


def device_problem(spec: LoaderSpec) -> str | None:
    """Why this machine can't run the loader at all, or None."""
    if not any(sys.platform.startswith(platform) for platform in spec.platforms):
        return f"{spec.title} runs on {', '.join(spec.platforms)}, not on {sys.platform}: use another loader here"
    if spec.needs_cuda and not nvidia_present():
        return "needs an NVIDIA GPU: install the card's driver (nvidia-smi must list it), or use another loader"
    return None


# --- importable ------------------------------------------------------------------------------------------------

_PROBE = """
import importlib, sys
for names in sys.argv[1:]:
    reasons = []
    for name in names.split("|"):
        try:
            importlib.import_module(name)
            break
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    else:
        sys.exit("; ".join(reasons))
"""


def _check_import(row: Row, spec: LoaderSpec, overlays: Overlays) -> None:
    reinstall = f"{start_script()} install {spec.overlay or 'parent'}"
    command = [str(overlays.python(spec.overlay)), "-X", "utf8", "-c", _PROBE, *spec.probe]
    timeout = COMPILE_TIMEOUT_S if spec.needs_cuda else IMPORT_TIMEOUT_S
    try:
        done = subprocess.run(
            command, cwd=overlays.root, env=overlays.worker_env(spec.overlay), capture_output=True, text=True, encoding="utf-8",
            errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        row.fix = f"the import did not end within {timeout} s: {reinstall}"
        return
    except OSError as error:
        row.fix = f"its Python does not start ({error.strerror}): {reinstall}"
        return
    row.importable = done.returncode == 0
    if not row.importable:
        row.fix = f"{ending(done.returncode, done.stderr)}: {reinstall}"


def ending(status: int, stderr: str) -> str:
    """How a child ended, in one line."""
    from modules.llamacpp_build import death

    return death(status, stderr.splitlines())


# --- smoke generation ------------------------------------------------------------------------------------------


def _check_smoke(row: Row, spec: LoaderSpec, overlays: Overlays, config: Config) -> None:
    if spec.name == "remote":
        problem = asyncio.run(_remote_smoke(row, spec, overlays, config))
        row.smoke_ok, row.fix = problem is None, problem or ""
        return
    model = smoke_model(spec, config)
    if model is None:
        formats = " or ".join(sorted(spec.formats))
        row.fix = f"{NO_MODEL}{formats} model to try it on: put one under {config.model_dir}"
        return
    problem = asyncio.run(_smoke(row, spec, overlays, config, model.path))
    row.smoke_ok = problem is None
    row.fix = problem or ""


def smoke_model(spec: LoaderSpec, config: Config) -> ModelFiles | None:
    """What to try a loader on: a bundled model, else the smallest one it takes."""
    from modules.library import LocalLibrary
    from modules.registry import takes

    listed = LocalLibrary(config.model_dirs, [spec]).list()
    small = [model for model in listed if takes(model, spec) and model.size_bytes < SMALL_MODEL_BYTES]
    return min(small, key=lambda model: (not model.bundled, model.size_bytes), default=None)


async def _remote_smoke(row: Row, spec: LoaderSpec, overlays: Overlays, config: Config) -> str | None:
    """Through a second server of our own; the saved servers are looked at, too, but a stranger's fault is no fault here."""
    from modules.own_server import far_server
    from modules.remotes.store import RemoteStore
    from modules.remotes.watch import look

    servers = await asyncio.to_thread(RemoteStore(config.user_data_dir).servers)
    healths = await asyncio.gather(*(look(server, seconds=5.0) for server in servers))
    row.note = "; ".join(
        f"{server.name}: {len(health.models)} models, {health.latency_ms} ms" if health.ok else str(health.error)
        for server, health in zip(servers, healths, strict=True)
    )
    with tempfile.TemporaryDirectory(prefix="switchyard-doctor-") as folder:
        data = Path(folder)
        async with far_server(data / "far", RemoteStore(data / "near"), "echo") as path:
            return await _smoke(row, spec, overlays, config, path)


async def _smoke(row: Row, spec: LoaderSpec, overlays: Overlays, config: Config, path: str) -> str | None:
    """None when a few tokens came, else what happened and what to do."""
    from modules.errors import AppError

    try:
        return await asyncio.wait_for(_generate(row, spec, overlays, config, path), SMOKE_TIMEOUT_S)
    except asyncio.TimeoutError:
        return f"no answer within {SMOKE_TIMEOUT_S} s: {start_script()} install {spec.overlay or 'parent'}"
    except AppError as error:
        tail = str(error.detail.get("stderr") or "").strip().splitlines()[-1:]
        return " ".join([str(error), *tail])


async def _generate(row: Row, spec: LoaderSpec, overlays: Overlays, config: Config, path: str) -> str | None:
    from modules.load_options import complete_options
    from modules.schema import Done, GenerationRequest, StopParams
    from modules.worker_client import WorkerClient

    client = await WorkerClient.start(spec, overlays)
    try:
        info = await client.load(path, complete_options(spec, config.options_for(spec.options)))
        if spec.name in ("gptq_for_llama", "autogptq"):  # the same loader is many times faster or slower by its kernel
            row.note = " ".join(filter(None, [info.engine, *info.notes]))
        request = GenerationRequest(
            "doctor",
            prompt=SMOKE_PROMPT,
            sampling={"temperature": 0.0},
            stop=StopParams(max_tokens=SMOKE_TOKENS, ignore_eos=True),
        )
        tokens = 0
        async for event in client.generate(request):
            if isinstance(event, Done):
                tokens = event.usage.completion_tokens
        return None if tokens else f"it generated nothing from {Path(path).name}: try another model"
    finally:
        await client.close()


# --- for people ------------------------------------------------------------------------------------------------


def _llamacpp_note(overlays: Overlays) -> str:
    state = str(overlays.marker("llamacpp").get("llama_cpp", ""))
    if state == "ok":
        return "llama-cpp-python, compiled for this machine"
    return f"xllamacpp; llama-cpp-python: {state}" if state else ""


def table(rows: list[Row], overlays: Overlays) -> str:
    """The report for a terminal."""
    from modules.hardware import detect
    from modules.ray_engine.client import problem

    lines = [["loader", "installed", "importable", "device ok", "smoke ok"]]
    for row in rows:
        checks = (row.installed, row.importable, row.device_ok, row.smoke_ok)
        lines.append([row.name, *("yes" if ok else "no" for ok in checks)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    python = ".".join(map(str, sys.version_info[:3]))
    out = [f"Python {python}, {detect().name}, environments in {overlays.set_dir}", "", shown[0]]
    for row, line in zip(rows, shown[1:], strict=True):
        out.append(line)
        out += [f"    fix: {row.fix}"] if row.fix else []
        out += [f"    {row.note}"] if row.note else []
    out += ["", f"--engine ray: {problem(overlays) or 'ready'}"]
    return "\n".join(out)

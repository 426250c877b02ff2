"""Making the environments of a set: virtual environment, pip, marker. Resumable at any point.

An environment is complete when its marker, written last, holds the hash of its requirements. One without a marker is taken
up where it stopped: packages whose files are not all there are installed again, an interpreter that does not run is made
again. Every failure is a SetupError of one line: what is missing and how to get it.

Standard library only: one_click.py uses this before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from modules.hardware import HardwareError, TorchBuild, choose_torch
from modules.overlays import (
    LAYER_FILE,
    MARKER,
    EnvSpec,
    Overlays,
    Progress,
    env_python,
    env_specs,
    installer_dir,
    read_json,
    site_packages,
    start_script,
    write_json,
)
from modules.pip_output import Cancelled, PipProgress, SetupError, explain, is_resolution_failure, venv_help
from modules.sets import set_lock
from modules.site_packages import broken_packages, installed_packages

TORCH_ATTEMPT = ("--retries", "1", "--timeout", "20")


# --- running a command -----------------------------------------------------------------------------------------


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _die_with_parent() -> None:
    """In the child, before exec: end when the installer does, so that no orphaned pip writes into an environment."""
    assert _LIBC is not None
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class CommandRunner:
    """Runs one command at a time, hands its lines on and writes them to the log."""

    def __init__(self, log: Path, background: bool = False) -> None:
        self.log = log
        self.background = background
        self.keep_open: tuple[int, ...] = ()
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Stop the running command and refuse the next. Safe from another thread."""
        self._cancelled = True
        process = self._process
        if process is not None:
            process.kill()

    def run(
        self, command: Sequence[str | Path], on_line: Callable[[str], None], env: dict[str, str], cwd: Path | None = None
    ) -> tuple[int, list[str]]:
        """(exit status, the last 400 lines). A negative status is the signal that ended it (not on Windows)."""
        if self._cancelled:
            raise Cancelled("Stopped.")
        words = [str(word) for word in command]
        options: dict[str, Any] = {}
        if sys.platform == "win32":
            options["creationflags"] = subprocess.BELOW_NORMAL_PRIORITY_CLASS if self.background else 0
        else:
            if self.background and shutil.which("nice"):
                words = ["nice", "-n", "10", *words]
            options["pass_fds"] = self.keep_open
            if sys.platform.startswith("linux"):
                options["preexec_fn"] = _die_with_parent
        self.log.parent.mkdir(parents=True, exist_ok=True)
        tail: list[str] = []
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} $ {' '.join(words)}\n")
            log.flush()
            with subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=env,
                cwd=cwd,
                **options,
            ) as process:
                self._process = process
                try:
                    assert process.stdout is not None
                    self._read(process.stdout, log, tail, on_line)
                except BaseException:
                    process.kill()
                    raise
                finally:
                    self._process = None
            log.write(f"exit status {process.returncode}\n")
        if self._cancelled:
            raise Cancelled("Stopped.")
        return process.returncode, tail

    @staticmethod
    def _read(stream: IO[str], log: IO[str], tail: list[str], on_line: Callable[[str], None]) -> None:
        for raw in stream:
            line = raw.rstrip()
            log.write(line + "\n")
            log.flush()
            tail.append(line)
            del tail[:-400]
            on_line(line)


def pip_env() -> dict[str, str]:
    """The variables pip runs with: the user's own configuration, without what would bend its import path."""
    dropped = {
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONDONTWRITEBYTECODE",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "__PYVENV_LAUNCHER__",
    }
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    kept.update(PYTHONUTF8="1", PYTHONNOUSERSITE="1", PYTHONUNBUFFERED="1", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return kept


def _end_processes_of(env_dir: Path) -> None:
    """End what still writes into a half-made environment: venv's own children outlive a set-up that was killed. (Linux; where
    there is no /proc, `_remove` waits for them.)"""
    prefix = os.fsencode(env_dir) + b"/"
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if entry.read_bytes().startswith(prefix):
                os.kill(int(entry.parent.name), getattr(signal, "SIGKILL", signal.SIGTERM))


def _remove(folder: Path, wait_s: float = 20.0) -> None:
    """Remove a folder in which a process may still be making files. Raises OSError."""
    deadline = time.monotonic() + wait_s
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EACCES) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


_WHOLE_PIP = """
import sys
from importlib.metadata import distribution
import pip
files = [f for f in distribution("pip").files or () if f.suffix != ".pyc"]
sys.exit(sys.prefix == sys.base_prefix or not files or not all(f.locate().exists() for f in files))
"""


# --- environments ----------------------------------------------------------------------------------------------


def requirements_hash(path: Path) -> str:
    """The hash of a requirements file's content, the same for any line ends."""
    return hashlib.sha256("\n".join(path.read_text(encoding="utf-8").splitlines()).encode()).hexdigest()


class Installer:
    """Makes the environments of one set. `torch` is chosen at first need when not given."""

    def __init__(
        self,
        overlays: Overlays,
        progress: Progress,
        *,
        torch: str | None = None,
        background: bool = False,
    ) -> None:
        self.overlays = overlays
        self.root = overlays.root
        self.specs = env_specs(overlays.root)
        self._progress = progress
        self._torch = torch
        self.runner = CommandRunner(installer_dir(self.root) / "logs" / f"setup-{datetime.now():%Y-%m-%d}.log", background)

    # -- state

    def ready(self, env: str) -> bool:
        """Complete and made from today's requirements (its layers, too)."""
        spec = self._spec(env)
        if spec.on is not None and not self.ready(spec.on):
            return False
        marker = self.overlays.marker(env)
        if env == "torch" and marker and self._torch_asked(marker):
            return False
        current = marker.get("requirements_sha256") == requirements_hash(spec.requirements)
        return current and env_python(self.overlays.env_dir(env)).exists()

    def _torch_asked(self, marker: dict[str, Any]) -> bool:
        """Whether the user now asks for another build of torch than was installed."""
        if (self._torch or os.environ.get("SWITCHYARD_TORCH") or "auto") == "auto" and not os.environ.get("GPU_CHOICE"):
            return False
        return self.torch_build().name != marker.get("torch_build")

    def _spec(self, env: str) -> EnvSpec:
        if env not in self.specs:
            raise SetupError(f"There is no environment {env!r}: {', '.join(self.specs)} are known.")
        return self.specs[env]

    def say(self, stage: str, fraction: float | None, line: str) -> None:
        self._progress(stage, fraction, line)

    # -- the work

    def ensure(self, env: str) -> bool:
        """Make or complete one environment and its layers; whether there was anything to do. Raises SetupError."""
        spec = self._spec(env)
        done = self.ensure(spec.on) if spec.on else False
        if self.ready(env):
            return done
        try:
            with set_lock(self.overlays.set_dir) as lock:
                self.runner.keep_open = (lock,) if lock is not None else ()
                self._make(spec)
        except OSError as error:
            raise SetupError(explain([str(error)], spec.title)) from error
        finally:
            self.runner.keep_open = ()
        return True

    def _make(self, spec: EnvSpec) -> None:
        self._check_space(spec)
        env_dir = self.overlays.env_dir(spec.name)
        self._make_venv(spec, env_dir)
        site = site_packages(env_dir)
        if site is None:
            raise SetupError(f"{spec.title}: Python made a virtual environment without site-packages in {env_dir}.")
        self._join_layer(spec, site)
        for name in broken_packages(site):
            self.say(spec.title, None, f"{name} was cut off; installing it again")
        if spec.name == "torch":
            self._install_torch(spec, site)
        self._install_requirements(spec, site)
        build = {"torch_build": self.torch_build().name} if spec.name == "torch" else {}
        marker = {
            **self.overlays.marker(spec.name),
            **build,
            "requirements_sha256": requirements_hash(spec.requirements),
            "packages": installed_packages(site),
            "python": ".".join(map(str, sys.version_info[:3])),
            "made": datetime.now().isoformat(timespec="seconds"),
        }
        write_json(env_dir / MARKER, marker)
        self.say(spec.title, 1.0, "ready")

    def _check_space(self, spec: EnvSpec) -> None:
        self.overlays.set_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.overlays.set_dir).free // 2**20
        if free < spec.size_mb:
            raise SetupError(
                f"{spec.title} needs about {spec.size_mb} MB on the disk of {self.root} and only {free} MB are free: "
                "free some space and run this again."
            )

    def _make_venv(self, spec: EnvSpec, env_dir: Path) -> None:
        python = env_python(env_dir)
        if python.exists() and self._runs_pip(python):
            return
        if env_dir.exists():
            _end_processes_of(env_dir)
            _remove(env_dir)
        self.say(spec.title, 0.0, "making a virtual environment")
        status, lines = self.runner.run([self._base_python(), "-m", "venv", env_dir], _ignore, pip_env())
        if status != 0:
            raise SetupError(venv_help(lines) or explain(lines, f"The virtual environment {spec.name}"))

    def _base_python(self) -> Path:
        """One Python for the whole set: a layer's packages are of no use to another minor version."""
        complete = bool(self.overlays.marker("parent"))
        return env_python(self.overlays.env_dir("parent")) if complete else Path(sys.executable)

    def _runs_pip(self, python: Path) -> bool:
        """A venv of its own, with all of pip: one that was killed while it was made has a part."""
        status, _ = self.runner.run([python, "-c", _WHOLE_PIP], _ignore, pip_env())
        return status == 0

    def _join_layer(self, spec: EnvSpec, site: Path) -> None:
        if spec.on is None:
            return
        below = site_packages(self.overlays.env_dir(spec.on))
        if below is None:
            raise SetupError(f"{spec.title}: its layer {spec.on} has no site-packages; run {start_script()} install {spec.on}.")
        (site / LAYER_FILE).write_text(Path(os.path.relpath(below, site)).as_posix() + "\n", encoding="utf-8")

    def _install_requirements(self, spec: EnvSpec, site: Path) -> None:
        constraints = self._constraints(spec)
        lock = self.root / "loaders" / "requirements" / "locks" / f"{spec.name}.txt"
        expected = len(lock.read_text(encoding="utf-8").splitlines()) if lock.is_file() else 30
        base = ["-r", str(spec.requirements), *constraints]
        locked = ["-c", str(lock)] if lock.is_file() else []
        status, lines = self._pip(spec, site, [*base, *locked], expected)
        if status != 0 and lock.is_file() and is_resolution_failure(lines):
            # The lock was made with another Python; the direct pins still hold.
            self.say(spec.title, None, "the locked versions do not fit this Python; taking others that do")
            status, lines = self._pip(spec, site, base, expected)
        if status != 0:
            raise SetupError(explain(lines, spec.title))
        broken = broken_packages(site, repair=False)
        if broken:
            raise SetupError(f"{spec.title}: pip left {broken[0]} incomplete; run this again.")

    def _constraints(self, spec: EnvSpec) -> list[str]:
        """The exact torch that is installed below, so that pip never swaps its build."""
        path = self.overlays.set_dir / "constraints.txt"
        return ["-c", str(path)] if path.is_file() and "torch" in (spec.name, spec.on) else []

    def _pip(self, spec: EnvSpec, site: Path, arguments: Sequence[str], expected: int) -> tuple[int, list[str]]:
        progress = PipProgress(expected, site, lambda fraction, what: self.say(spec.title, fraction, what))
        try:
            return self.pip_install(spec.name, arguments, progress.line)
        finally:
            progress.close()

    def pip_install(self, env: str, arguments: Sequence[str], on_line: Callable[[str], None]) -> tuple[int, list[str]]:
        """pip install in one environment. Byte code is left to the first import: compiling all of it takes longer than pip."""
        python = env_python(self.overlays.env_dir(env))
        command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--no-compile", "--no-warn-script-location"]
        return self.runner.run([*command, *arguments], on_line, pip_env())

    # -- torch

    def _install_torch(self, spec: EnvSpec, site: Path) -> None:
        constraints = self.overlays.set_dir / "constraints.txt"
        pin = _pin(spec.requirements, "torch")
        installed = installed_packages(site).get("torch")
        if installed is None or constraints_text(installed) != _text(constraints):
            build = self.torch_build()
            if installed is None or not (_same_release(installed, pin) and (not build.asked or build.matches(installed))):
                self._fetch_torch(spec, site, pin, build)
            installed = installed_packages(site)["torch"]
            constraints.write_text(constraints_text(installed), encoding="utf-8")

    def torch_build(self) -> TorchBuild:
        """What the user asked for, now or when this set was begun; else what the hardware wants."""
        set_file = self.overlays.set_dir / "set.json"
        record = read_json(set_file)
        try:
            build = choose_torch(self._torch)
            if not build.asked and record.get("torch"):
                return choose_torch(str(record["torch"]))
        except HardwareError as error:
            raise SetupError(str(error)) from error
        if build.asked and record and record.get("torch") != build.name:
            write_json(set_file, {**record, "torch": build.name})
        return build

    def _fetch_torch(self, spec: EnvSpec, site: Path, pin: str, build: TorchBuild) -> None:
        self.say(spec.title, 0.0, f"{build.name} build ({build.reason})")
        status, lines = self._pip(spec, site, ["--no-index", "--no-deps", pin], 2)
        if status == 0:
            version = installed_packages(site)["torch"]
            if not build.asked or build.matches(version):
                other = "" if build.matches(version) else f" (SWITCHYARD_TORCH={build.name} asks for the other build)"
                self.say(spec.title, 0.3, f"torch {version} from pip's local wheels{other}")
                return
        force = ["--force-reinstall"] if status == 0 else []
        attempts = [["--index-url", build.index, *TORCH_ATTEMPT]] if build.index else []
        for options in [*attempts, []]:
            status, lines = self._pip(spec, site, [pin, *force, *options], 30)
            if status == 0:
                return
            if options:
                self.say(spec.title, None, f"the {build.name} build is not to be had; trying the registry's own")
        raise SetupError(explain(lines, spec.title))


def _ignore(line: str) -> None:
    """A line nobody watches; it is in the log."""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def constraints_text(torch_version: str) -> str:
    return f"torch=={torch_version}\n"


def _pin(requirements: Path, name: str) -> str:
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if re.match(rf"{name}\s*[=<>~]", line):
            return line.partition("#")[0].strip()
    raise SetupError(f"{requirements} names no version of {name}.")


def _same_release(version: str, pin: str) -> bool:
    return version.partition("+")[0] == pin.partition("==")[2].strip()

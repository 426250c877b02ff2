"""The one-click launch behind start_linux.sh, start_macos.sh and start_windows.bat.

    one_click.py [flags]               set up what is missing, then serve (also: doctor, convert, download -> server.py)
    one_click.py install [NAME ...]    make or complete environments now: parent torch transformers llamacpp tests ...
    one_click.py test [pytest flags]   set up everything for the tests, lint, type-check, run them
    one_click.py run SCRIPT [flags]    a script of this project, such as benchmarks/startup.py, with the tests' environment
    one_click.py update | rollback     a new set of environments beside the old one; back to the old one

All of it lives in installer_files/: plain virtual environments, logs, state. Nothing is written elsewhere, nothing needs
root. Standard library only: this runs on the system's Python before anything is installed.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

MINIMUM = (3, 10)
ROOT = Path(__file__).resolve().parent
OWN_COMMANDS = ("install", "test", "run", "update", "rollback", "lock")
FIRST = ("parent", "llamacpp")  # what the first chat needs; the rest follows while the server runs

if sys.version_info < MINIMUM:
    sys.exit(
        "Switchyard needs Python 3.10 or newer, this is %d.%d: install a newer one and run this again." % sys.version_info[:2]  # noqa: UP031
    )

from modules import llamacpp_build, update  # noqa: E402
from modules.command_line import COMMANDS, normalise, read_cmd_flags, split_command  # noqa: E402
from modules.console import Console  # noqa: E402
from modules.convert.library import ConverterError, install_converter  # noqa: E402
from modules.environments import Installer, pip_env  # noqa: E402
from modules.errors import ConfigError  # noqa: E402
from modules.hardware import detect  # noqa: E402
from modules.overlays import Overlays, env_python, env_specs, site_packages, start_script, state_path, write_json  # noqa: E402
from modules.pip_output import SetupError, venv_help  # noqa: E402
from modules.sets import open_set  # noqa: E402


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was begun is cleared away
    try:
        words = normalise(argv)
        flags = [*normalise(read_cmd_flags(ROOT, words)), *words]
        command, before, after = split_command(flags, {*COMMANDS, *OWN_COMMANDS})
        launch = Launch(torch_flag(flags))
        if command in OWN_COMMANDS:
            return launch.own(command, before, after)
        return launch.server(command, argv, flags)
    except (SetupError, ConfigError) as error:
        print(f"Switchyard: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Switchyard: {error.strerror or error}: {error.filename or ROOT}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. {start_script()} goes on where this ended.", file=sys.stderr)
        return 130


def torch_flag(flags: list[str]) -> str | None:
    """The value of --torch, the one server flag that set-up needs."""
    value = None
    for index, word in enumerate(flags):
        if word == "--torch" and index + 1 < len(flags):
            value = flags[index + 1]
        elif word.startswith("--torch="):
            value = word.partition("=")[2]
    return value


def on_ray(flags: list[str]) -> bool:
    """Whether the server is to start with --engine ray, which needs an environment of its own."""
    return "--engine=ray" in flags or ("--engine", "ray") in itertools.pairwise(flags)


class Launch:
    """One run of the launcher on the current set of environments."""

    def __init__(self, torch: str | None) -> None:
        self._torch = torch
        self._check_python()
        self.overlays = Overlays(open_set(ROOT), ROOT)
        self._check_moved_python()

    @staticmethod
    def _check_python() -> None:
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError as error:
            raise SetupError(venv_help([str(error)]) or str(error)) from error

    def _check_moved_python(self) -> None:
        """A Python that was upgraded under a set leaves it useless: set it aside and begin another."""
        parent = self.overlays.env_dir("parent")
        if not parent.exists():
            return
        site = site_packages(parent)
        probe = [str(env_python(parent)), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            version = subprocess.run(probe, capture_output=True, text=True, check=False, env=pip_env()).stdout.strip()
        except OSError:
            version = ""
        if version and (site is None or sys.platform == "win32" or site.parent.name == f"python{version}"):
            return
        if not self.overlays.marker("parent"):
            return  # half made: the installer makes it anew
        print("The Python of this set is gone or was replaced; setting up anew.", file=sys.stderr)
        write_json(state_path(ROOT), {})
        self.overlays = Overlays(open_set(ROOT), ROOT)

    # -- environments

    def install(self, names: list[str], console: Console, build_llamacpp: bool = False) -> None:
        """Phases for the environments that are not ready."""
        installer = Installer(self.overlays, console.progress, torch=self._torch)
        missing = [name for name in names if not installer.ready(name)]
        build = build_llamacpp and llamacpp_build.build_state(installer) == ""
        console.total += len(missing) + build
        if missing or build:
            self._introduce(console)
        specs = env_specs(ROOT)
        for name in missing:
            console.phase(specs[name].title if name in specs else name)
            installer.ensure(name)
            console.finish()
        if build:
            console.phase(llamacpp_build.TITLE)
            state = llamacpp_build.ensure(installer)
            console.finish("done" if state == "ok" else f"left out: {state}")
        if "transformers" in missing:
            self._fetch_converter(console)

    def _fetch_converter(self, console: Console) -> None:
        """llama.cpp's converter beside Transformers, so that `convert` works offline, too; else it is fetched at first use."""
        env_dir = self.overlays.env_dir("transformers")
        try:
            install_converter(env_dir, env_python(env_dir))
        except ConverterError as error:
            console.line(str(error))

    def _introduce(self, console: Console) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        console.line(f"Setting Switchyard up in {self.overlays.set_dir}")
        console.line(f"Python {python}, {detect().name}; log in {ROOT / 'installer_files' / 'logs'}")

    # -- commands

    def server(self, command: str, argv: list[str], flags: list[str]) -> int:
        """Set up what the command needs, then become server.py."""
        serve = command == "serve"
        helps = "-h" in flags or "--help" in flags
        console = Console(1 if serve and not helps else 0)
        names = [*FIRST, *(["ray"] if on_ray(flags) else [])]
        self.install(["parent"] if helps or not serve else names, console)
        if serve and os.environ.get("LAUNCH_AFTER_INSTALL", "").lower() in ("no", "false", "0"):
            console.line("Set-up done; not started, as LAUNCH_AFTER_INSTALL says.")
            return 0
        if serve and not helps and console.total > 1:
            console.phase("Starting")
            console.finish("the server takes over")
        extra = ["--auto-launch"] if serve and has_display() and not any("auto-launch" in word for word in flags) else []
        return self._become([str(env_python(self.overlays.env_dir("parent"))), str(ROOT / "server.py"), *extra, *argv])

    @staticmethod
    def _become(command: list[str]) -> int:
        os.chdir(ROOT)
        os.environ["PYTHONUTF8"] = "1"
        # Byte code was left to the first import (Installer.pip_install): it must be written then.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        if sys.platform == "win32":
            # exec on Windows would give the prompt back while the server runs.
            return subprocess.run(command, check=False).returncode
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(command[0], command)

    def own(self, command: str, before: list[str], after: list[str]) -> int:
        if command == "test":
            return self.test(after)
        if command == "run":
            return self.run_script(after)
        if command == "install":
            return self.install_named([word for word in after if not word.startswith("-") and word != self._torch])
        if command == "lock":
            return update.write_locks(self.overlays)
        if command == "update":
            return update.update(self.overlays, self._torch, with_code="--no-pull" not in after)
        return update.rollback(ROOT)

    def install_named(self, names: list[str]) -> int:
        console = Console(0)
        everything = [name for name in env_specs(ROOT) if name != "tests"]
        unknown = [name for name in names if name not in env_specs(ROOT)]
        if unknown:
            raise SetupError(f"There is no environment {unknown[0]!r}: {', '.join(env_specs(ROOT))} are known.")
        for name in names:
            problem = env_specs(ROOT)[name].problem()
            if problem:
                raise SetupError(f"{env_specs(ROOT)[name].title} {problem}")
        chosen = names or self._usable(everything, console)
        self.install(chosen, console, build_llamacpp="llamacpp" in chosen)
        console.line("Everything asked for is installed.")
        return 0

    @staticmethod
    def _usable(names: list[str], console: Console) -> list[str]:
        """The environments that this machine has a use for; what is left out is said."""
        specs = env_specs(ROOT)
        for name in names:
            problem = specs[name].problem()
            if problem:
                console.line(f"{specs[name].title} is left out: it {problem}")
        return [name for name in names if not specs[name].problem()]

    def run_script(self, arguments: list[str]) -> int:
        """A script with the tests' environment; only that is set up, what else it needs must be installed."""
        if not arguments:
            raise SetupError(f"Name the script: {start_script()} run benchmarks/startup.py")
        self.install(["parent", "tests"], Console(1))
        python = str(env_python(self.overlays.env_dir("tests")))
        env = {**os.environ, "SWITCHYARD_SET": str(self.overlays.set_dir)}
        return subprocess.run([python, *arguments], cwd=ROOT, env=env, check=False).returncode

    def test(self, arguments: list[str]) -> int:
        """Everything in the foreground, then ruff, mypy and pytest; the last line is pytest's."""
        console = Console(3)
        specs = env_specs(ROOT)
        names = ["parent", "llamacpp", *(name for name in specs if name not in (*FIRST, "tests")), "tests"]
        self.install(self._usable(names, console), console, build_llamacpp=True)
        python = str(env_python(self.overlays.env_dir("tests")))
        env = {**pip_env(), "SWITCHYARD_SET": str(self.overlays.set_dir)}
        status = 0
        for title, command in (("ruff", ["ruff", "check", "."]), ("mypy", ["mypy"])):
            console.phase(title)
            failed = subprocess.run([python, "-m", *command], cwd=ROOT, env=env, check=False).returncode
            console.finish("failed" if failed else "done")
            status = status or failed
        console.phase("pytest")
        console.finish("started")
        tests = subprocess.run([python, "-m", "pytest", *pytest_flags(arguments)], cwd=ROOT, env=env, check=False)
        return tests.returncode or status


def pytest_flags(arguments: list[str]) -> list[str]:
    """Everything runs in parallel, one more process than cores since much of it waits, and what fails there is tried once more
    (tests/retries.py); what was named runs plainly."""
    if any(Path(ROOT, word.partition("::")[0]).exists() for word in arguments):
        return arguments
    processes = min(4, (os.cpu_count() or 1) + 1)
    return ["tests", "-n", str(processes), "--dist", "loadscope", "--reruns", "1", *arguments]


def has_display() -> bool:
    """Whether a browser can be opened here: not over SSH, not on a machine without a screen."""
    if os.environ.get("SSH_CONNECTION") or os.environ.get("CI"):
        return False
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""llama-cpp-python from source: compiled in a staging folder, tried in a child process, installed only when it passed.

gcc before 13.2 optimises away the tile configuration that ggml's AMX kernels store, and every quantised model then crashes
the process (llama.cpp PR 26954). So a build is only believed after a quantised generation in a child: when that dies, the
next attempt switches the guilty optimisations off, the last one AMX itself. A wheel that passed is kept in
installer_files/wheels, so that the next set takes it as it is. A machine without a compiler keeps xllamacpp.

Standard library only: one_click.py uses this, too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.environments import Installer, pip_env
from modules.hardware import Machine
from modules.overlays import MARKER, env_python, installer_dir, nvidia_present, read_json, write_json
from modules.pip_output import explain
from modules.sets import set_lock

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
TITLE = "llama-cpp-python"
KEEP_STORES = "-fno-tree-dse -fno-dse -fno-tree-sra -fno-tree-dce -fno-dce"
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_NINJA = re.compile(r"\[(\d+)/(\d+)\]")
_FIXED_GCC = (13, 2)
_BYTES_PER_JOB = 1_500_000_000


@dataclass(frozen=True)
class Compiler:
    """`gcc` is its version when it is GNU's, None for clang and MSVC."""

    path: str
    gcc: tuple[int, int] | None = None


@dataclass(frozen=True)
class Attempt:
    """One way to compile: `flags` go to the C and C++ compiler."""

    name: str
    flags: str = ""
    cuda: bool = False


def find_compiler(machine: Machine | None = None, which: Callable[[str], str | None] = shutil.which) -> Compiler | None:
    """The C++ compiler CMake would take, or None."""
    machine = machine or Machine()
    if machine.platform == "win32":
        cl = which("cl") or _visual_studio(machine)
        return Compiler(cl) if cl else None
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = which(name) if name else None
        if path is None:
            continue
        about = machine.run(path, "--version")
        if about is None:
            continue  # macOS has a c++ that only asks to install the developer tools
        version = re.search(r"(\d+)\.(\d+)\.\d+", about)
        gnu = "Free Software Foundation" in about and version is not None
        return Compiler(path, (int(version[1]), int(version[2])) if gnu and version else None)
    return None


def _visual_studio(machine: Machine) -> str | None:
    """Visual Studio's C++ tools, which are not on PATH; CMake finds them by itself."""
    folder = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
    vswhere = Path(folder, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    component = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    found = machine.run(str(vswhere), "-latest", "-products", "*", "-requires", component, "-property", "installationPath")
    return (found or "").strip() or None


def compiler_help(platform: str = sys.platform) -> str:
    """How to get a compiler, in one clause."""
    if platform == "win32":
        return "install Visual Studio's C++ build tools"
    return "xcode-select --install" if platform == "darwin" else "sudo apt install g++ (or your distribution's compiler)"


def cpu_has_amx(path: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return bool(re.search(r"^flags\s*:.*\bamx_tile\b", text, re.MULTILINE))


def attempts(compiler: Compiler, amx: bool, cuda: bool = False) -> list[Attempt]:
    """In which order to compile. Where the fault is known beforehand, the build that must crash is left out."""
    careful = [Attempt("keeping AMX stores", KEEP_STORES), Attempt("without AMX", NO_AMX)]
    must_crash = amx and compiler.gcc is not None and compiler.gcc < _FIXED_GCC
    plain = [] if must_crash else [Attempt("native")]
    first = KEEP_STORES if must_crash else ""
    return [*([Attempt("with CUDA", first, cuda=True)] if cuda else []), *plain, *careful]


def cuda_ready() -> bool:
    """Whether CUDA code can be compiled for a card that is here. A toolkit alone is not enough: CMake asks the card."""
    return shutil.which("nvcc") is not None and nvidia_present()


def build_state(installer: Installer) -> str:
    """ "ok", "" (to do), or why it was given up with this compiler and version."""
    marker = installer.overlays.marker("llamacpp")
    state = str(marker.get("llama_cpp", ""))
    if state == "ok":
        return state
    return state if marker.get("llama_cpp_tried") == _fingerprint(find_compiler()) else ""


def _fingerprint(compiler: Compiler | None) -> str:
    return f"{VERSION} {compiler.path if compiler else 'no compiler'} {compiler.gcc if compiler else ''}"


def ensure(installer: Installer) -> str:
    """Build, try and install llama-cpp-python into the llamacpp environment. Returns "ok" or, in one line, why not.

    Nothing is raised for a build that can't be: xllamacpp serves on. SetupError stays for what stops any set-up.
    """
    installer.ensure("llamacpp")
    state = build_state(installer)
    if state:
        return state
    gguf = smoke_model(installer.root)
    if gguf is None:
        return "no GGUF model under models/ to try a build with; xllamacpp runs on"
    compiler = find_compiler()
    if compiler is None:
        state = f"no C++ compiler; xllamacpp runs GGUF models. For all of llama.cpp's options: {compiler_help()}"
    else:
        state = _Build(installer, compiler).run(gguf)
    with set_lock(installer.overlays.set_dir):
        path = installer.overlays.env_dir("llamacpp") / MARKER
        write_json(path, {**read_json(path), "llama_cpp": state, "llama_cpp_tried": _fingerprint(compiler)})
    installer.say(TITLE, 1.0, "ready" if state == "ok" else state)
    return state


class _Build:
    def __init__(self, installer: Installer, compiler: Compiler) -> None:
        self._installer = installer
        self._compiler = compiler
        self._env_dir = installer.overlays.env_dir("llamacpp")
        self._python = env_python(self._env_dir)
        self._kept = installer_dir(installer.root) / "wheels"
        self._attempt = ""
        self._compiled = False  # by the running attempt, and not by an earlier set-up

    def run(self, gguf: Path) -> str:
        for leftover in [*self._env_dir.glob("llama-build-*"), *self._env_dir.glob("llama-smoke-*")]:
            shutil.rmtree(leftover)  # of a build that was killed
        with tempfile.TemporaryDirectory(prefix="llama-build-", dir=self._env_dir) as staging:
            kept = self._kept_wheel()
            if kept is not None and self._passes(kept, Path(staging) / "kept", gguf) is None:
                return self._install(kept)
            return self._compile(Path(staging), gguf)

    def _compile(self, staging: Path, gguf: Path) -> str:
        failure = ""
        for number, attempt in enumerate(attempts(self._compiler, cpu_has_amx(), cuda_ready())):
            # pip may have a wheel from an earlier set-up: good enough for a try, but its flags and machine are unknown.
            for fresh in (False, True) if number == 0 and not attempt.cuda else (True,):
                folder = staging / f"{number}{'-fresh' if fresh else ''}"
                wheel, problem = self._try(attempt, fresh, folder, gguf)
                if wheel is None and not attempt.cuda:
                    return failure or problem
                if wheel is not None and not problem:
                    return self._install(self._keep(wheel, attempt))
                failure = f"the build {attempt.name} failed: {problem}"
                self._say(None, failure)
                if self._compiled:
                    break
        return failure

    def _try(self, attempt: Attempt, fresh: bool, folder: Path, gguf: Path) -> tuple[Path | None, str]:
        """(wheel, "") when it passed, (wheel, what happened) when it did not, (None, why) when there is none."""
        self._attempt, self._compiled = attempt.name, fresh
        folder.mkdir()
        status, lines = self._build_wheel(attempt, fresh, folder / "wheels")
        found = sorted((folder / "wheels").glob("*.whl"))
        if status != 0 or not found:
            return None, compile_error(lines)
        return found[0], self._passes(found[0], folder / "site", gguf) or ""

    def _say(self, fraction: float | None, line: str) -> None:
        self._installer.say(TITLE, fraction, line)

    def _build_wheel(self, attempt: Attempt, fresh: bool, wheels: Path) -> tuple[int, list[str]]:
        self._say(0.0, f"compiling, {attempt.name} (some minutes)")
        if fresh:
            self._forget_cached_wheels()
        env = pip_env()
        env["CMAKE_ARGS"] = cmake_args(os.environ.get("CMAKE_ARGS", ""), attempt.cuda)
        env["CMAKE_BUILD_PARALLEL_LEVEL"] = str(build_jobs())
        for name in ("CFLAGS", "CXXFLAGS"):
            env[name] = f"{env.get(name, '')} {attempt.flags}".strip()
        command = [str(self._python), "-m", "pip", "wheel", "-v", "--no-deps", "--progress-bar", "off"]
        if fresh and self._cached_wheels():
            command.append("--no-cache-dir")
        source = ["--no-binary", PACKAGE] if os.environ.get("SWITCHYARD_BUILD_FROM_SOURCE") else []
        return self._installer.runner.run(
            [*command, *source, "--wheel-dir", str(wheels), f"{PACKAGE}=={VERSION}"], self._watch, env, cwd=wheels.parent
        )

    def _watch(self, line: str) -> None:
        match = _NINJA.search(line)
        if match and int(match[2]):
            self._compiled = True
            self._say(0.95 * int(match[1]) / int(match[2]), f"compiling {match[1]} of {match[2]} ({self._attempt})")

    def _cached_wheels(self) -> bool:
        """Whether pip would take a wheel it built before: its cache does not know with which flags."""
        done = subprocess.run(
            [str(self._python), "-m", "pip", "cache", "list", "llama_cpp_python", "--format", "abspath"],
            capture_output=True, env=pip_env(), check=False,
        )  # fmt: skip
        return done.returncode == 0 and bool(done.stdout.strip())

    def _forget_cached_wheels(self) -> None:
        """Drop the wheel that crashed from pip's cache, so that the good one takes its place there."""
        if self._cached_wheels():
            command = [str(self._python), "-m", "pip", "cache", "remove", "llama_cpp_python"]
            self._installer.runner.run(command, lambda line: None, pip_env())

    def _passes(self, wheel: Path, site: Path, gguf: Path) -> str | None:
        """None when a quantised generation works in a child process; else what happened."""
        self._say(0.96, "trying it on a quantised model")
        command = [str(self._python), "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target"]
        status, lines = self._installer.runner.run([*command, str(site), str(wheel)], lambda line: None, pip_env())
        if status != 0:
            return explain(lines, "staging")
        return self._smoke(site, gguf)

    def _smoke(self, site: Path, gguf: Path) -> str | None:
        with tempfile.TemporaryDirectory(prefix="llama-smoke-", dir=self._env_dir) as folder:
            command = [str(word) for word in (self._python, "-m", "modules.llamacpp_smoke", site, gguf, folder)]
            environment = self._installer.overlays.worker_env("llamacpp")
            status, lines = self._installer.runner.run(command, lambda line: None, environment, cwd=self._installer.root)
        return None if status == 0 else death(status, lines)

    def _keep(self, wheel: Path, attempt: Attempt) -> Path:
        self._kept.mkdir(parents=True, exist_ok=True)
        target = self._kept / wheel.name
        shutil.copyfile(wheel, target)
        write_json(
            self._kept / (wheel.name + ".json"), {"machine": machine_key(), "sha256": _sha256(target), "built": attempt.name}
        )
        return target

    def _kept_wheel(self) -> Path | None:
        """A wheel that passed here before, for this interpreter and processor."""
        for record in sorted(self._kept.glob(f"llama_cpp_python-{VERSION}-*.whl.json")):
            wheel = record.with_suffix("")
            known = read_json(record)
            if known.get("machine") == machine_key() and wheel.is_file() and known.get("sha256") == _sha256(wheel):
                return wheel
        return None

    def _install(self, wheel: Path) -> str:
        with set_lock(self._installer.overlays.set_dir):
            arguments = ["--no-deps", "--no-index", "--force-reinstall", str(wheel)]
            status, lines = self._installer.pip_install("llamacpp", arguments, lambda line: None)
        return "ok" if status == 0 else explain(lines, f"installing {PACKAGE}")


def death(status: int, lines: Sequence[str]) -> str:
    """How a test run ended, in one line."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"it died with {name}"
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}: {last.strip()}"


def smoke_model(root: Path) -> Path | None:
    """The smallest GGUF model that came with the product, or the one $SWITCHYARD_SMOKE_GGUF names."""
    named = os.environ.get("SWITCHYARD_SMOKE_GGUF")
    if named:
        return Path(named) if Path(named).is_file() else None
    found = [path for path in (root / "models").rglob("*.gguf") if path.is_file()]
    bundled = [path for path in found if "wren" in path.as_posix()]
    return min(bundled or found, key=lambda path: path.stat().st_size, default=None)


def cmake_args(given: str, cuda: bool) -> str:
    """Build for this very processor. The user's own CMAKE_ARGS come last and win."""
    return " ".join(["-DGGML_NATIVE=ON", *(["-DGGML_CUDA=ON"] if cuda else []), given]).strip()


def compile_error(lines: Sequence[str]) -> str:
    """Why it did not compile, in one line: the compiler's own words are far above pip's."""
    for index, line in enumerate(lines):
        if re.search(r"CMake Error|\bfatal error:|: error:", line):
            after = next((text.strip() for text in lines[index + 1 :] if text.strip()), "")
            return f"compiling {PACKAGE}: {line.strip()}" + (f" {after}" if line.rstrip().endswith(":") else "")
    return explain(lines, f"compiling {PACKAGE}")


def build_jobs() -> int:
    """Compilers at once: one per core, but no more than memory holds (1.5 GB each)."""
    cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return cores  # Windows has no sysconf
    return max(1, min(cores, memory // _BYTES_PER_JOB))


def machine_key() -> str:
    """What a natively compiled wheel is good for: this processor's instructions and this Python's ABI."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
    return f"{sys.platform} {Machine().arch} {digest} {VERSION} py{sys.version_info[0]}.{sys.version_info[1]}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

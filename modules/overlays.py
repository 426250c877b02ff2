"""Where each loader runs: the environments on disk, which of them are complete, and how a worker is started in one.

    installer_files/state.json                {"current": set id, "previous": set id or null, ...}
    installer_files/sets/<set id>/<env>/      plain virtual environments; `parent` runs the server
    <env>/.switchyard.json                    the marker, written last: an environment without it is half made

An environment is described by its requirements file alone: `requirements.txt` (parent), `tests/requirements.txt`,
`loaders/requirements/<env>.txt`. A `# on: NAME` line there puts it on a lower layer, whose site-packages one relative
`.pth` line joins, so a set may be moved with its folder and pip still sees the layer's packages as installed. `# needs: cuda`
leaves it out on machines without an NVIDIA GPU.

Standard library only: one_click.py uses this before anything is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.schema import LoaderSpec

MARKER = ".switchyard.json"
LAYER_FILE = "_layer.pth"
NO_CUDA = "needs an NVIDIA GPU with CUDA; none was found here."
_HEADER = re.compile(r"#\s*(on|title|size-mb|needs)\s*:\s*(.+)")
_SECRET = re.compile(r"(?i)TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|DATABASE_URL|_PASS$")
_DROPPED = frozenset(
    """PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONDONTWRITEBYTECODE PYTHONINSPECT PYTHONWARNINGS VIRTUAL_ENV PIP_REQUIRE_VIRTUALENV
    HTTP_PROXY HTTPS_PROXY ALL_PROXY FTP_PROXY""".split()
)

Progress = Callable[[str, "float | None", str], None]
"""Called with (stage, fraction or None, line)."""


# --- what environments there are -------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvSpec:
    """One environment, as its requirements file describes it. `on` is the layer below, `size_mb` its rough size, `needs` "cuda"
    or nothing."""

    name: str
    requirements: Path
    title: str
    on: str | None = None
    size_mb: int = 300
    needs: str | None = None

    def problem(self) -> str | None:
        """Why this environment is of no use on this machine, to follow its title: "needs ..."; None when it is."""
        return NO_CUDA if self.needs == "cuda" and not nvidia_present() else None


def env_specs(root: Path) -> dict[str, EnvSpec]:
    """Every environment this checkout knows, by name."""
    files = {"parent": root / "requirements.txt", "tests": root / "tests" / "requirements.txt"}
    files.update({path.stem: path for path in sorted((root / "loaders" / "requirements").glob("*.txt"))})
    return {name: _read_spec(name, path) for name, path in files.items() if path.is_file()}


def _read_spec(name: str, path: Path) -> EnvSpec:
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _HEADER.match(line)
        if match:
            found[match[1]] = match[2].strip()
    return EnvSpec(name, path, found.get("title", name), found.get("on"), int(found.get("size-mb", "300")), found.get("needs"))


# --- paths -----------------------------------------------------------------------------------------------------


def env_python(env_dir: Path, platform: str = sys.platform) -> Path:
    """The interpreter of a virtual environment: Scripts/python.exe on Windows, bin/python elsewhere."""
    return env_dir / "Scripts" / "python.exe" if platform == "win32" else env_dir / "bin" / "python"


def site_packages(env_dir: Path, platform: str = sys.platform) -> Path | None:
    """The site-packages of a virtual environment, None when it has none (yet)."""
    if platform == "win32":
        found = env_dir / "Lib" / "site-packages"
        return found if found.is_dir() else None
    return next(iter(sorted(env_dir.glob("lib/python3*/site-packages"))), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is none or it is torn (then it counts as not written)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file in one step, so that a reader or a power cut sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def installer_dir(root: Path) -> Path:
    return root / "installer_files"


def state_path(root: Path) -> Path:
    return installer_dir(root) / "state.json"


def start_script(platform: str = sys.platform) -> str:
    """What a user types on this platform."""
    return {"win32": "start_windows.bat", "darwin": "./start_macos.sh"}.get(platform, "./start_linux.sh")


# --- a set of environments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverlayStatus:
    """`installed`: the environment is complete. `importable`: its probe modules are there, too. `fix` is the command."""

    overlay: str | None
    installed: bool
    importable: bool
    missing: tuple[str, ...] = ()
    reason: str | None = None
    fix: str = ""


class Overlays:
    """The environments of one set."""

    def __init__(self, set_dir: Path, root: Path) -> None:
        self.set_dir = Path(set_dir)
        self.root = Path(root)
        self._cache: dict[tuple[str | None, tuple[str, ...]], tuple[tuple[int, ...], OverlayStatus]] = {}

    @classmethod
    def find(cls, root: Path | str | None = None) -> Overlays:
        """The set to use: $SWITCHYARD_SET, else the one this interpreter belongs to, else state.json's current."""
        base = Path(root) if root else Path(__file__).resolve().parent.parent
        chosen = os.environ.get("SWITCHYARD_SET")
        if chosen:
            return cls(Path(chosen), base)
        own = Path(sys.prefix)
        if (own / "pyvenv.cfg").is_file() and env_python(own.parent / "parent").exists():
            return cls(own.parent, base)
        current = read_json(state_path(base)).get("current") or "none"
        return cls(installer_dir(base) / "sets" / str(current), base)

    def env_dir(self, env: str) -> Path:
        return self.set_dir / env

    def python(self, overlay: str | None) -> Path:
        """The interpreter a worker of this overlay runs in; None is the parent's own."""
        return Path(sys.executable) if overlay is None else env_python(self.env_dir(overlay))

    def marker(self, env: str) -> dict[str, Any]:
        """What the marker of an environment says; {} for one that is absent or half made."""
        return read_json(self.env_dir(env) / MARKER)

    def complete(self, env: str) -> bool:
        """Whether set-up of this environment ended. A set named by $SWITCHYARD_SET needs no markers (developers')."""
        if not env_python(self.env_dir(env)).exists():
            return False
        return bool(self.marker(env)) or self._trusted()

    def _trusted(self) -> bool:
        chosen = os.environ.get("SWITCHYARD_SET")
        return bool(chosen) and Path(str(chosen)) == self.set_dir and not (self.set_dir / "set.json").exists()

    def layers(self, env: str) -> list[Path]:
        """The site-packages a module of this environment may come from: its own, then the layers'."""
        found: list[Path] = []
        own = site_packages(self.env_dir(env))
        while own is not None and own not in found:
            found.append(own)
            layer = own / LAYER_FILE
            line = layer.read_text(encoding="utf-8").strip() if layer.is_file() else ""
            own = Path(os.path.normpath(own / line)) if line else None
        return found

    def status(self, spec: LoaderSpec) -> OverlayStatus:
        """Whether a loader's environment is complete and holds its probe modules. No process is started."""
        key = (spec.overlay, spec.probe)
        signature = self._signature(spec.overlay)
        cached = self._cache.get(key)
        if cached is None or cached[0] != signature:
            cached = (signature, self._status(spec.overlay, spec.probe))
            self._cache[key] = cached
        return cached[1]

    def _signature(self, overlay: str | None) -> tuple[int, ...]:
        if overlay is None:
            return ()
        paths = [self.env_dir(overlay), self.env_dir(overlay) / MARKER, *self.layers(overlay)]
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)

    def _status(self, overlay: str | None, probe: tuple[str, ...]) -> OverlayStatus:
        if overlay is None:
            missing = tuple(name for name in probe if not _any_module(name, _importable_here))
            fix = f"{start_script()} install parent" if missing else ""
            reason = f"{', '.join(missing)} not installed: {fix}" if missing else None
            return OverlayStatus(None, True, not missing, missing, reason, fix)
        fix = f"{start_script()} install {overlay}"
        if not self.complete(overlay):
            half = self.env_dir(overlay).exists()
            what = "set-up not finished" if half else "not installed"
            return OverlayStatus(overlay, False, False, probe, f"{what}: {fix}", fix)
        layers = self.layers(overlay)
        missing = tuple(name for name in probe if not _any_module(name, lambda m: any(_has_module(site, m) for site in layers)))
        if missing:
            return OverlayStatus(overlay, True, False, missing, f"{', '.join(missing)} missing: {fix}", fix)
        return OverlayStatus(overlay, True, True)

    def has_module(self, overlay: str | None, name: str) -> bool:
        """Whether one module is in an environment or the layers below it. No process is started."""
        if overlay is None:
            return _importable_here(name)
        return any(_has_module(site, name) for site in self.layers(overlay))

    def unavailable(self, spec: LoaderSpec) -> str | None:
        """Why this loader can't run here now, with the fix, in one line; None when it can."""
        if spec.needs_cuda and not nvidia_present():
            return NO_CUDA
        return self.status(spec).reason

    def worker_env(self, overlay: str | None) -> dict[str, str]:
        """The environment variables of a worker: no credentials, nothing that bends the import path, no network use."""
        kept = {k: v for k, v in os.environ.items() if k.upper() not in _DROPPED and not _SECRET.search(k)}
        # libgomp's threads wait for each other by spinning, for milliseconds by default: beside programs that use the cores,
        # models fell to a tenth of their speed (benchmarks/busy_cores.py). With a thousand turns one alone is as fast as before.
        kept.setdefault("GOMP_SPINCOUNT", "1000")
        binaries = str(self.python(overlay).parent)
        kept.update(
            PATH=binaries + os.pathsep + kept.get("PATH", os.defpath),
            PYTHONUTF8="1",
            PYTHONIOENCODING="utf-8:backslashreplace",
            PYTHONNOUSERSITE="1",
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            DO_NOT_TRACK="1",
            TOKENIZERS_PARALLELISM="false",
            SWITCHYARD_SET=str(self.set_dir),
        )
        return kept


def _any_module(names: str, found: Callable[[str], bool]) -> bool:
    """A probe may name alternatives: "llama_cpp|xllamacpp"."""
    return any(found(name) for name in names.split("|"))


def _importable_here(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _has_module(site: Path, name: str) -> bool:
    base = site.joinpath(*name.split("."))
    if base.is_dir() or base.with_name(base.name + ".py").is_file():
        return True
    return any(p.suffix in (".so", ".pyd") for p in base.parent.glob(base.name + ".*"))


def nvidia_present(platform: str = sys.platform) -> bool:
    """Whether an NVIDIA driver is there; asks no process."""
    if platform.startswith("linux") and Path("/proc/driver/nvidia/version").exists():
        return True
    return platform != "darwin" and shutil.which("nvidia-smi") is not None

"""Which accelerator this machine has, and which build of torch fits it.

The choice, strongest first: `--torch BUILD`, $SWITCHYARD_TORCH, $GPU_CHOICE (A NVIDIA, B AMD, C Apple, D Intel, N none, as
text-generation-webui's installer asks), what was found. Whatever is chosen, a torch that pip can install without any index
(a local wheel folder in pip's configuration) comes first, unless a build was asked for by name and that wheel is another.

Standard library only: one_click.py uses this before anything is installed.
"""

from __future__ import annotations

import os
import platform as platform_module
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["nvidia", "amd", "apple", "intel", "cpu"]

# The only place that names an index: builds of torch other than the registry's default are published nowhere else.
TORCH_INDEX = "https://download.pytorch.org/whl/"
CUDA_BUILD = "cu130"
OLD_CUDA_BUILD = "cu126"  # for drivers before 580 and for GPUs older than Turing, which CUDA 13 dropped
ROCM_BUILD = "rocm7.2"
CUDA_13_DRIVER = 580
CUDA_13_CAPABILITY = (7, 5)
GPU_CHOICES: dict[str, Kind] = {"A": "nvidia", "B": "amd", "C": "apple", "D": "intel", "N": "cpu"}
_BUILD = re.compile(r"cpu|xpu|mps|cu\d{3}|rocm\d+\.\d+(\.\d+)?")
_ARC_IDS = re.compile(r"0x(4905|56[9a-c][0-9a-f]|7d[0-9a-f]{2}|64[0-9a-f]{2}|b0[0-9a-f]{2}|e2[01][0-9a-f])")


@dataclass(frozen=True)
class Hardware:
    """The best accelerator found. `driver` and `capability` are NVIDIA's."""

    kind: Kind
    name: str
    driver: str | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class TorchBuild:
    """One build of torch. `asked` is true when the user named it; `index` is None for the registry's own build."""

    name: str
    index: str | None
    reason: str
    asked: bool = False

    def matches(self, version: str) -> bool:
        """Whether an installed torch ("2.13.0+cpu") is this build. A version without a tag is the registry's."""
        tag = version.partition("+")[2]
        return tag == self.name if tag else self.index is None


class HardwareError(Exception):
    """A choice that can't be; the text is the one line to show."""


class Machine:
    """What detection asks of the machine; tests give it other answers."""

    def __init__(self, platform: str = sys.platform, arch: str | None = None) -> None:
        self.platform = platform
        self.arch = arch or platform_module.machine()

    def run(self, *command: str) -> str | None:
        """The output of a command; None when it is absent or fails."""
        path = shutil.which(command[0])
        if path is None:
            return None
        try:
            done = subprocess.run([path, *command[1:]], capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None  # a driver that hangs or a broken tool is the same as none
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None

    def pci_devices(self) -> list[tuple[str, str]]:
        """(vendor, device) of the graphics cards, as the Linux kernel lists them."""
        cards = sorted(Path("/sys/class/drm").glob("card[0-9]*/device"))
        return [(_read(card / "vendor"), _read(card / "device")) for card in cards]

    def exists(self, path: str) -> bool:
        return Path(path).exists()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def detect(machine: Machine | None = None) -> Hardware:
    """The accelerator a backend would use, best first."""
    machine = machine or Machine()
    if machine.platform == "darwin":
        if machine.arch == "arm64":
            return Hardware("apple", (machine.run("sysctl", "-n", "machdep.cpu.brand_string") or "Apple silicon").strip())
        return Hardware("cpu", "Intel Mac")
    return _nvidia(machine) or _amd(machine) or _intel(machine) or Hardware("cpu", "no supported GPU")


def _nvidia(machine: Machine) -> Hardware | None:
    query = "--query-gpu=name,driver_version,compute_cap"
    output = machine.run("nvidia-smi", query, "--format=csv,noheader")
    fields = [part.strip() for part in (output or "").strip().splitlines()[0].split(",")] if (output or "").strip() else []
    if len(fields) < 3:
        # An old nvidia-smi knows no compute_cap.
        output = machine.run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        fields = [part.strip() for part in output.strip().splitlines()[0].split(",")] if output and output.strip() else []
    if len(fields) < 2:
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", fields[2]) if len(fields) > 2 else None
    return Hardware("nvidia", fields[0], fields[1], (int(match[1]), int(match[2])) if match else None)


def _amd(machine: Machine) -> Hardware | None:
    if machine.platform.startswith("linux"):
        # A card without its compute device (/dev/kfd) can't run ROCm: a desktop's own graphics, say.
        if machine.exists("/dev/kfd") and any(vendor == "0x1002" for vendor, _ in machine.pci_devices()):
            return Hardware(
                "amd", _first_match(machine.run("rocminfo"), r"Marketing Name:\s*(.*Radeon.*|.*Instinct.*)") or "AMD GPU"
            )
        return None
    name = _windows_gpu(machine, "Radeon")
    return Hardware("amd", name) if name else None


def _intel(machine: Machine) -> Hardware | None:
    if machine.platform.startswith("linux"):
        found = [device for vendor, device in machine.pci_devices() if vendor == "0x8086" and _ARC_IDS.fullmatch(device.lower())]
        return Hardware("intel", f"Intel Arc ({found[0]})") if found else None
    name = _windows_gpu(machine, "Arc")
    return Hardware("intel", name) if name else None


def _windows_gpu(machine: Machine, word: str) -> str | None:
    if machine.platform != "win32":
        return None
    script = "Get-CimInstance Win32_VideoController | Select-Object -ExpandProperty Name"
    output = machine.run("powershell", "-NoProfile", "-Command", script) or ""
    return next((line.strip() for line in output.splitlines() if re.search(rf"\b{word}\b", line)), None)


def _first_match(text: str | None, pattern: str) -> str | None:
    match = re.search(pattern, text or "")
    return match[1].strip() if match else None


# --- the build of torch ----------------------------------------------------------------------------------------


def choose_torch(
    flag: str | None = None,
    environ: Mapping[str, str] | None = None,
    machine: Machine | None = None,
) -> TorchBuild:
    """The build to install. Raises HardwareError for a choice that names nothing."""
    environ = os.environ if environ is None else environ
    machine = machine or Machine()
    for value, origin in ((flag, "--torch"), (environ.get("SWITCHYARD_TORCH"), "SWITCHYARD_TORCH")):
        name = (value or "auto").strip().lower()
        if name == "auto":
            continue
        name = ROCM_BUILD if name == "rocm" else CUDA_BUILD if name in ("cuda", "nvidia") else name
        if not _BUILD.fullmatch(name):
            raise HardwareError(f"{origin}={value}: torch has no such build; use auto, cpu, cu126, cu130, rocm, xpu or mps.")
        return _build(name, machine, f"chosen by {origin}", asked=True)
    letter = environ.get("GPU_CHOICE", "").strip().upper()
    if letter:
        if letter not in GPU_CHOICES:
            raise HardwareError(f"GPU_CHOICE={letter}: use A (NVIDIA), B (AMD), C (Apple), D (Intel) or N (none).")
        hardware = detect(machine)
        wanted = hardware if hardware.kind == GPU_CHOICES[letter] else Hardware(GPU_CHOICES[letter], "chosen")
        return _build(_build_for(wanted, machine)[0], machine, f"chosen by GPU_CHOICE={letter}", asked=True)
    hardware = detect(machine)
    name, why = _build_for(hardware, machine)
    return _build(name, machine, why)


def _build_for(hardware: Hardware, machine: Machine) -> tuple[str, str]:
    if hardware.kind == "nvidia":
        driver = int((hardware.driver or "999").partition(".")[0] or 999)
        if driver < CUDA_13_DRIVER:
            return OLD_CUDA_BUILD, f"{hardware.name}, whose driver {hardware.driver} is too old for CUDA 13"
        if hardware.capability is not None and hardware.capability < CUDA_13_CAPABILITY:
            return OLD_CUDA_BUILD, f"{hardware.name}, which CUDA 13 no longer supports"
        return CUDA_BUILD, hardware.name
    if hardware.kind == "amd":
        if not machine.platform.startswith("linux"):
            return "cpu", f"{hardware.name}: torch has ROCm builds for Linux only"
        return ROCM_BUILD, hardware.name
    if hardware.kind == "intel":
        return "xpu", hardware.name
    if hardware.kind == "apple":
        return "mps", hardware.name
    return "cpu", hardware.name


def _build(name: str, machine: Machine, reason: str, asked: bool = False) -> TorchBuild:
    if machine.platform == "darwin":
        return TorchBuild("mps" if machine.arch == "arm64" and name != "cpu" else "cpu", None, reason, asked)
    if name == "mps":
        raise HardwareError("The mps build of torch is for Apple machines; use cpu here.")
    # The registry's own build is the CPU's on Windows and the newest CUDA's on Linux.
    registry = name == "cpu" and machine.platform == "win32"
    return TorchBuild(name, None if registry else TORCH_INDEX + name, reason, asked)

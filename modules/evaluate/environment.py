"""What the figures were taken on: hardware and versions, for every stored run."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from modules.hardware import detect
from modules.memory import total_bytes
from modules.options import ROOT

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")


def machine() -> dict[str, Any]:
    """Processor with the extensions that matter here, cores, memory, accelerator, system."""
    name, flags = _processor()
    accelerator = detect()
    return {
        "cpu": name,
        "extensions": [flag for flag in _FLAGS if flag in flags],
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": total_bytes(),
        "accelerator": None if accelerator.kind == "cpu" else accelerator.name,
        "system": platform.platform(),
    }


def software() -> dict[str, Any]:
    """Our own version; each row adds its backend's."""
    return {"switchyard": _version(), "python": platform.python_version()}


def _processor() -> tuple[str, set[str]]:
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        return found.get("model name", name), set((found.get("flags") or found.get("Features") or "").split())
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or name, set()
    return name, set()


def _version() -> str:
    import re

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"

"""Hand-made wheels, and a pip that sees them and nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path


def make_wheel(folder: Path, name: str, version: str = "1.0", requires: str = "", payload: str = "") -> Path:
    """A wheel with one module, as pip takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n{payload}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return target


def environment(config: Path, find_links: str) -> dict[str, str]:
    """This process's environment variables for a pip that finds packages at one place only. Writes `config`."""
    config.write_text(f"[global]\nfind-links = {find_links}\nno-cache-dir = true\n", encoding="utf-8")
    ours = ("SWITCHYARD_SET", "SWITCHYARD_TORCH", "GPU_CHOICE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name not in ours}
    return {**kept, "PIP_CONFIG_FILE": str(config), "PIP_NO_INDEX": "1"}

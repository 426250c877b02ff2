"""How a GPTQ checkpoint was made, read back from its folder. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules.detect.draft import read_json
from modules.errors import NotFound

FILE = "switchyard_quantization.json"


def read_provenance(folder: Path) -> dict[str, Any]:
    """What the quantiser noted: settings, base (name, sha256 by file), calibration, mean_loss, layers (loss and damp of each).

    Raises NotFound for a checkpoint that another program made, CorruptModel when the file can't be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise NotFound(
            f"{folder.name} does not say how it was made (no {FILE}).",
            hint="Only checkpoints made with `server.py quantize` do; quantize_config.json holds what other programs note.",
        )
    return read_json(path)


def described(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    settings, base, calibration = found.get("settings") or {}, found.get("base") or {}, found.get("calibration")
    group = settings.get("group_size", -1)
    parts = [
        f"{str(settings.get('method', '')).upper()}, {settings.get('bits')} bits",
        f"groups of {group}" if group > 0 else "one scale per output",
        "symmetric" if settings.get("sym") else "with zero points",
    ]
    parts += [name.replace("_", "-") for name in ("desc_act", "static_groups", "true_sequential", "mse") if settings.get(name)]
    lines = [", ".join(parts) + f"; damping {settings.get('damp_percent')}"]
    lines += [f"base {base.get('name')}: {name}, sha256 {digest}" for name, digest in (base.get("sha256") or {}).items()]
    if calibration:
        windows, length = calibration["windows"]
        lines.append(f"calibration {calibration['name']}: {windows} windows of {length} tokens, sha256 {calibration['sha256']}")
    lines.append(f"mean loss {found.get('mean_loss', 0):.2e}; by layer:")
    for name, row in (found.get("layers") or {}).items():
        lines.append(f"  {name:<40} {row['loss']:.2e}" + (f"  damping {row['damp']:g}" if row.get("damp") else ""))
    return lines

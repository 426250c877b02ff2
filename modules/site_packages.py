"""What is in a site-packages, and whether all of it is there. Standard library only."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path


def installed_packages(site: Path) -> dict[str, str]:
    """Package -> version, from the names of the .dist-info folders."""
    found = {}
    for path in sorted(site.glob("*.dist-info")):
        name, _, version = path.name[: -len(".dist-info")].partition("-")
        found[name.lower().replace("_", "-")] = version
    return found


def broken_packages(site: Path, repair: bool = True) -> list[str]:
    """Packages whose files are not all there: pip was killed while it copied them. With `repair` their records are removed,
    so that pip installs them again instead of calling them satisfied."""
    broken = []
    for info in sorted(site.glob("*.dist-info")):
        if not _record_holds(site, info):
            broken.append(info.name.partition("-")[0])
            if repair:
                shutil.rmtree(info)
    if repair:
        for leftover in site.glob("~*"):  # what pip renames a package to while it replaces it
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return broken


def _record_holds(site: Path, info: Path) -> bool:
    record = info / "RECORD"
    if not record.is_file() or not (info / "METADATA").is_file():
        return False
    with record.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            path = row[0] if row else ""
            if path.endswith((".pyc", "RECORD")) or not path:
                continue
            try:
                size = os.stat(os.path.join(site, path)).st_size
            except OSError:
                return False
            if len(row) > 2 and row[2].isdigit() and int(row[2]) != size and not path.startswith(".."):
                return False
    return True

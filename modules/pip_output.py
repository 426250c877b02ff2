"""What pip prints, as progress and as one line that says what is wrong. Standard library only."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path


class SetupError(Exception):
    """Set-up can't go on; the text is the one line to show. What is installed stays."""


class Cancelled(SetupError):
    """The user stopped it."""


_COLLECTED = re.compile(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)")
_LOCAL_WHEEL = re.compile(r"Processing (?:.*?[/\\])?([A-Za-z0-9._]+)-\d[^/\\ ]*\.(?:whl|tar\.gz|zip)\b")
_DOWNLOAD = re.compile(r"\s*(?:Downloading|Using cached) (?:\S*/)?([A-Za-z0-9._+%-]+)(?: \(([^)]+)\))?")


class PipProgress:
    """Turns pip's lines into (fraction, what). Resolving is the first 60 %, copying files the rest."""

    def __init__(self, expected: int, site: Path | None, report: Callable[[float, str], None]) -> None:
        self._expected = max(expected, 1)
        self._site = site
        self._report = report
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def line(self, line: str) -> None:
        match = _COLLECTED.match(line) or _LOCAL_WHEEL.match(line)
        if match:
            self._seen.add(match[1].lower())
            self._report(self._resolved(), match[1])
            return
        match = _DOWNLOAD.match(line)
        if match:
            name = match[1].partition("-")[0]
            size = f" ({match[2]})" if match[2] and not match[2].startswith("from") else ""
            self._report(self._resolved(), name + size)
        elif line.startswith("Installing collected packages:"):
            names = line.partition(":")[2].split(",")
            self._watcher = threading.Thread(target=self._watch, args=(len(names), self._installed()), daemon=True)
            self._watcher.start()

    def _resolved(self) -> float:
        return 0.6 * min(1.0, len(self._seen) / self._expected)

    def _watch(self, total: int, before: set[str]) -> None:
        """pip says nothing while it copies files: count what arrives."""
        while not self._stop.wait(0.3):
            new = sorted(self._installed() - before, key=str)
            latest = new[-1].partition("-")[0] if new else ""
            self._report(0.6 + 0.4 * min(1.0, len(new) / total), f"installing {len(new)} of {total} {latest}".rstrip())

    def _installed(self) -> set[str]:
        if self._site is None or not self._site.is_dir():
            return set()
        return {name for name in os.listdir(self._site) if name.endswith(".dist-info")}

    def close(self) -> None:
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()


_CAUSES: tuple[tuple[str, str], ...] = (
    (r"No space left on device|not enough space", "the disk is full: free some space"),
    (r"Permission denied|Access is denied|Read-only file system", "this folder can't be written: check its permissions"),
    (
        r"Temporary failure in name resolution|Failed to establish a new connection|getaddrinfo failed|NewConnectionError"
        r"|Network is unreachable|nodename nor servname|Name or service not known|Connection refused|ProxyError|Max retries",
        "the package index can't be reached: connect to the network (or check pip's proxy and index settings)",
    ),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted: set pip's `cert` option"),
    (r"Read timed out|ReadTimeout|IncompleteRead|ConnectionResetError", "the download broke off"),
    (r"ensurepip is not available|No module named ensurepip|No module named '?pip\b", "Python came without venv and pip"),
)


def explain(lines: Sequence[str], what: str) -> str:
    """One line for a failed command: the cause when it is known, else pip's last error."""
    text = "\n".join(lines)
    for pattern, cause in _CAUSES:
        if re.search(pattern, text):
            return f"{what}: {cause}, then run this again; what is installed stays."
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if missing:
        return f"{what}: no package {missing[1]} fits Python {sys.version_info[0]}.{sys.version_info[1]} on this machine."
    errors = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line.strip()] or ["no output"]
    return f"{what}: {errors[-1].strip()}"


def is_resolution_failure(lines: Sequence[str]) -> bool:
    """Whether other versions might do. Without a network pip finds no version of anything: that is another matter."""
    text = "\n".join(lines)
    if any(re.search(pattern, text) for pattern, _ in _CAUSES):
        return False
    return "ResolutionImpossible" in text or "No matching distribution found" in text or "requires a different Python" in text


def venv_help(lines: Sequence[str]) -> str | None:
    """The one line for a Python without venv (Debian and Ubuntu split it off)."""
    if not re.search(r"ensurepip|No module named '?venv", "\n".join(lines)):
        return None
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    return f"This Python can't make virtual environments: install {package} (sudo apt install {package}) and run this again."

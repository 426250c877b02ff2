"""Evaluations on disk: one JSON file for each run under user_data/evaluations, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from modules.errors import NotFound, StoreCorrupt
from modules.paths import confine
from modules.yaml_file import save_error

VERSION = 1


class EvaluationStore:
    """Runs by id; the newest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new_id(self) -> str:
        """Sorts by time: 20261122-140301-9f3a."""
        return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"

    def save(self, run: dict[str, Any]) -> None:
        """Write beside, sync, rename. Raises StorageError's subclasses."""
        path = self._path(run["id"])
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".part", dir=self.folder)
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                json.dump(run, file, ensure_ascii=False, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):  # the disk that has just refused
                    os.unlink(temporary)
            raise save_error(path.name, error) from error

    def load(self, run_id: str) -> dict[str, Any]:
        """Raises NotFound, or StoreCorrupt for a file that is no run."""
        try:
            data = json.loads(self._path(run_id).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFound("There is no such evaluation.", param="id") from None
        except (OSError, ValueError) as error:
            raise StoreCorrupt(f"The evaluation {run_id} can't be read: {error}.") from error
        if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("rows"), list):
            raise StoreCorrupt(f"The evaluation {run_id} is of another version.", hint="It was made by another release.")
        return data

    def delete(self, run_id: str) -> None:
        try:
            self._path(run_id).unlink()
        except FileNotFoundError:
            raise NotFound("There is no such evaluation.", param="id") from None
        except OSError as error:
            raise save_error(run_id, error) from error

    def ids(self) -> list[str]:
        return sorted((path.stem for path in self.folder.glob("*.json") if not path.name.startswith(".")), reverse=True)

    def list(self, most: int = 200) -> list[dict[str, Any]]:
        """What a list shows of each run; one that can't be read says so in `problem`."""
        found = []
        for run_id in self.ids()[:most]:
            try:
                run = self.load(run_id)
            except (StoreCorrupt, NotFound) as error:
                found.append({"id": run_id, "title": run_id, "state": "damaged", "problem": str(error), "models": []})
            else:
                found.append(summary(run))
        return found

    def newest_unfinished(self) -> str | None:
        """The latest run that was stopped or broke off."""
        return next((run["id"] for run in self.list() if run["state"] in ("cancelled", "interrupted", "partial")), None)

    def _path(self, run_id: str) -> Path:
        return confine(self.folder, f"{run_id}.json")


def this_process() -> dict[str, Any]:
    """Whose run it is: process id and start, since ids are used again."""
    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def alive(run: dict[str, Any]) -> bool:
    """Whether the process that works on this run is there."""
    owner = run.get("owner") or {}
    if run["state"] != "running" or "pid" not in owner:
        return False
    try:
        return abs(float(psutil.Process(owner["pid"]).create_time()) - float(owner["started"])) < 1
    except psutil.Error:
        return False


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """What a list shows. A run whose process is gone was interrupted, whatever its file says."""
    return {
        "id": run["id"],
        "title": run.get("title") or "",
        "state": "interrupted" if run["state"] == "running" and not alive(run) else run["state"],
        "created": run["created"],
        "finished": run.get("finished"),
        "models": [row["label"] for row in run["rows"]],
        "data": list(run["plan"]["data"]),
        "problem": None,
    }

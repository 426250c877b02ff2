"""Runs code in another environment: any at all, or a lab, which reads names of experiments and prints a line of JSON for each."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import ROOT

if TYPE_CHECKING:
    from modules.overlays import Overlays

Lab = Callable[[str], Any]


@contextlib.contextmanager
def run_lab(overlays: Overlays, overlay: str, script: str, folder: Path, **env: str) -> Iterator[Lab]:
    """Yields a function that runs an experiment once, all in one process; asked again it gives the same result."""
    results: dict[str, Any] = {}
    log = folder / "stderr.txt"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [str(overlays.python(overlay)), str(ROOT / "tests" / script), str(folder / "work")],
            env=overlays.worker_env(overlay) | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def run(name: str) -> Any:
            if name not in results:
                process.stdin.write(name + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
                assert line, log.read_text(encoding="utf-8", errors="replace")[-4000:]
                results[name] = json.loads(line)
            assert "error" not in results[name], results[name]["error"]
            return results[name]["result"]

        yield run
        process.stdin.close()


def run_in(overlays: Overlays, overlay: str, *arguments: str) -> str:
    """What the Python of that environment prints when it runs with these arguments. It must end well."""
    done = subprocess.run(
        [str(overlays.python(overlay)), "-X", "utf8", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=280,
        env=overlays.worker_env(overlay) | {"OMP_NUM_THREADS": "1"},
        cwd=overlays.root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()

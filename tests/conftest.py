"""What every test shares: the project's root, the environments, and where the real data is, if anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.overlays import Overlays
from tests import postgres_lab
from tests.retries import pytest_sessionfinish as pytest_sessionfinish
from tests.retries import pytest_terminal_summary as pytest_terminal_summary

ROOT = Path(__file__).resolve().parent.parent


def shared_data() -> Path | None:
    """The folder of real models and texts beside the checkout, where there is one."""
    folder = Path(os.environ.get("SWITCHYARD_SHARED", ROOT.parent / "shared")) / "data"
    return folder if folder.is_dir() else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Under pytest-xdist, what shares a worker process or a server stays together, and there is one browser at a time."""
    from xdist.scheduler import LoadScopeScheduling

    from tests.contract.rows import ROWS

    rows = sorted((row.id for row in ROWS), key=len, reverse=True)

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.startswith("tests/ui/"):
                return "ui"
            if file == "tests/contract/test_ray.py" or "[ray-" in test:
                return "ray"
            return next((row for row in rows if f"[{row}]" in test or f"[{row}-" in test or f"-{row}]" in test), file)

    return Groups(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def overlays() -> Overlays:
    return Overlays.find(ROOT)


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_lab.Postgres]:
    """A PostgreSQL server of the tests' own; `database()` gives the URL of a new database."""
    reason = postgres_lab.why_not()
    if reason is not None:
        pytest.skip(reason)
    with postgres_lab.running() as server:
        yield server


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data; the test skips without it. Tests that use it carry the mark `shared`."""
    folder = shared_data()
    if folder is None:
        pytest.skip("needs the data folder ../shared, which is not here")
    return folder

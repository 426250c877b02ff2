"""What every test shares: the project's root, the environments, and where the real data is, if anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modules.overlays import Overlays

ROOT = Path(__file__).resolve().parent.parent


def shared_data() -> Path | None:
    """The folder of real models and texts beside the checkout, where there is one."""
    folder = Path(os.environ.get("SWITCHYARD_SHARED", ROOT.parent / "shared")) / "data"
    return folder if folder.is_dir() else None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist: what shares a worker process or a server stays together, and there is one browser at a time."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        row = callspec.params.get("row") if callspec else None
        file = item.path.relative_to(ROOT)
        group = row.id if hasattr(row, "id") else "ui" if "ui" in file.parts else str(file)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def overlays() -> Overlays:
    return Overlays.find(ROOT)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data; the test skips without it. Tests that use it carry the mark `shared`."""
    folder = shared_data()
    if folder is None:
        pytest.skip("needs the data folder ../shared, which is not here")
    return folder

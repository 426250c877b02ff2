from __future__ import annotations

import ast
import fnmatch
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from types import ModuleType


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current() -> None:
    stale = [str(p.relative_to(ROOT)) for p in generator().stale()]
    assert stale == [], "run `python docs/generate.py`"


def test_a_part_is_replaced_and_the_rest_kept() -> None:
    text = "before\n<!-- generated: errors -->\nold\n<!-- end: errors -->\nafter\n"
    renewed = generator().renewed(text)
    assert renewed.startswith("before\n") and renewed.endswith("<!-- end: errors -->\nafter\n")
    assert "worker_crashed" in renewed and "old" not in renewed


LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


PACKAGES = sorted(path.parent for path in (ROOT / "modules").glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_package_says_what_its_files_are(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = re.findall(r"\*?\w[\w*]*", text)
    files = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    assert [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in named)] == []


def test_the_developers_map_is_true() -> None:
    text = (ROOT / "README-dev.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?:modules|loaders|docs|benchmarks)/[\w/.]*\w", text))
    gone = {name for name in named if name != "loaders/NAME.py" and not list(ROOT.glob(f"{name}*"))}
    assert gone == set()
    assert [package.name for package in PACKAGES if f"modules/{package.name}" not in named] == []

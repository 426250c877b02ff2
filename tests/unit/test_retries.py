"""The second try of a test that failed among others: shown, counted, and not for many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.retries import MOST

SUITE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_shy(number):
    tried = Path(__file__).with_name(f"tried {{number}}")
    if not tried.exists():
        tried.touch()
        assert number < 0, "the first try"
    assert {second}, "the second try"
"""


def run(folder: Path, count: int, second: bool = True) -> tuple[int, str]:
    (folder / "test_shy.py").write_text(SUITE.format(count=count, second=second), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    flags = ["-p", "tests.retries", "--reruns", "1", "-p", "no:cacheprovider", "-n", "1"]
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), *flags, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_saved_test_is_shown_with_its_first_failure(tmp_path: Path) -> None:
    status, output = run(tmp_path, 1)
    assert status == 0, output
    assert "FAILED AT THE FIRST TRY" in output and "AssertionError: the first try" in output
    assert "1 passed" in output and "1 rerun" in output


def test_two_failures_are_a_failure(tmp_path: Path) -> None:
    status, output = run(tmp_path, 1, second=False)
    assert status == pytest.ExitCode.TESTS_FAILED and "AssertionError: the second try" in output and "1 failed" in output


def test_more_than_a_few_saved_tests_fail_the_run(tmp_path: Path) -> None:
    status, output = run(tmp_path, MOST + 1)
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert f"{MOST + 1} tests needed a second try" in output

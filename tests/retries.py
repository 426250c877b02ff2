"""A test that fails among all the others is tried once more: browsers and worker processes meet other work on a small machine.

Nothing is hidden by it: the first failure is printed, the closing line counts it, and a run with more than a few fails.
"""

from __future__ import annotations

import pytest

MOST = 3  # more tests than these, saved by a second try in one run, are a fault of the product or of the tests


def _retried(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else list(reporter.stats.get("rerun", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if len(_retried(session.config)) > MOST and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    retried = _retried(config)
    if not retried:
        return
    terminalreporter.section("FAILED AT THE FIRST TRY")
    for report in retried:
        terminalreporter.write_sep("_", report.nodeid)
        terminalreporter.write_line(report.longreprtext)
    if len(retried) > MOST:
        terminalreporter.write_line(f"{len(retried)} tests needed a second try; more than {MOST} fail the run.", red=True)

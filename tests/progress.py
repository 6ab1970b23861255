"""A pytest plugin for `--progress`: one line every few seconds in place of a dot for each test."""

from __future__ import annotations

import time
from typing import Any

import pytest

INTERVAL = 15.0  # seconds


class Progress:
    def __init__(self, config: pytest.Config):
        self.config = config
        self.start = self.shown = time.monotonic()
        self.done = self.failed = 0

    @property
    def terminal(self) -> Any:
        return self.config.pluginmanager.getplugin("terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter: a failure has a line of its own, and what passes or is skipped none."""
        if report.when == "call" and report.passed:
            return "passed", "", ""
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", "", ""
        if report.failed:
            return ("failed" if report.when == "call" else "error"), "", report.outcome.upper()
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when})")
        if report.when == "teardown":
            self.done += 1
            self.tell()

    def tell(self) -> None:
        """Writes how many tests are done, and how long the rest takes if its tests are like those."""
        total, now = self.terminal._session.testscollected, time.monotonic()
        if now - self.shown < INTERVAL and self.done not in (1, total):
            return
        self.shown, elapsed = now, now - self.start
        left = elapsed / self.done * (total - self.done)
        expected = f", about {left:.0f} s left" if self.done > 0.03 * total else ""
        failed = f", {self.failed} failed" if self.failed else ""
        self.terminal.write_line(
            f"{self.done:5d} of {total} tests ({self.done / total:4.0%}){failed}, {elapsed:.0f} s{expected}",
            flush=True,
        )

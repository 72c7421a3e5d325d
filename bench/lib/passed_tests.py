"""Plugin of pytest, `-p bench.lib.passed_tests`: list the passed tests in the file that $BENCH_PASSED names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "BENCH_PASSED"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write `absolute path::name` of each; of several processes only the one that reports is asked."""
    root = terminalreporter.config.rootpath
    passed = [f"{root / report.nodeid}" for report in terminalreporter.stats.get("passed", [])]
    Path(os.environ[VARIABLE]).write_text(json.dumps(passed), encoding="utf-8")

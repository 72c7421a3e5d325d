"""A plugin of pytest's: `-p bench.lib.passed` writes which tests passed to the file that $BENCH_PASSED names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "BENCH_PASSED"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of several processes only the one that reports is asked. A test's file is told by its absolute path."""
    root = terminalreporter.config.rootpath
    passed = [f"{root / report.nodeid}" for report in terminalreporter.stats.get("passed", [])]
    Path(os.environ[VARIABLE]).write_text(json.dumps(passed), encoding="utf-8")

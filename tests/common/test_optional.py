"""Packages that may be absent: the first that can be imported is taken, and the reason for none is told."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from engine.common import optional


def test_the_first_module_that_can_be_imported_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional.load("json", "csv", missing="") is json
    monkeypatch.setitem(sys.modules, "absent_package", None)
    assert optional.load("absent_package", "json", missing="") is json


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import module_of_nobody", "No module named 'module_of_nobody'"),
        ("raise RuntimeError('built for\\n another torch')", "built for another torch"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        optional.load("broken_package", missing="--with it: `pip install {it}` ({reason})")
    assert str(error.value) == f"--with it: `pip install {{it}}` ({reason})"


def test_the_version_is_of_the_first_distribution_that_is_installed() -> None:
    assert optional.version("distribution-of-nobody", "torch", "numpy") == metadata.version("torch")
    assert optional.version("distribution-of-nobody") is None

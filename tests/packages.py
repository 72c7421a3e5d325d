"""Wheels and sdists that tests build, without network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Its output, both streams together. Raises AssertionError where it fails."""
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def make(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """The wheel or sdist that the build backend makes of a source folder."""
    pytest.importorskip("setuptools", minversion="77")
    program = f"import sys; from setuptools.build_meta import build_{kind} as build; print(build(sys.argv[1]))"
    return out / run(sys.executable, "-c", program, out, cwd=source, **environment).splitlines()[-1]


def contents(wheel: Path, about: str = "WHEEL") -> tuple[set[str], str]:
    """The files of a wheel, and the text of one of those that describe it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (described,) = [name for name in names if name.endswith(f".dist-info/{about}")]
        return names, archive.read(described).decode()

"""docs/tutorial.md, every block as it stands and in its order, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "tutorial.md"


def run(language: str, text: str, folder: Path) -> str:
    """Standard output of a block. Raises AssertionError, with all that it printed, where it fails."""
    commands = {
        "python": [sys.executable, "-c", text],
        # The command of this checkout, whether or not it is installed.
        "sh": ["bash", "-euc", f'engine() {{ "{sys.executable}" -m engine "$@"; }}\n{text}'],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        commands[language], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_tutorial_is_walked(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'iad-engine[export]'")
    printed = [run(block.language, block.text, tmp_path) for block in blocks(PAGE, "python", "sh")]
    assert printed[-1] == "temple\n"
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "exported" / "README.md").is_file()
    predictions = next(text for text in printed if "no certificate" in text)
    assert "photographs/test/flower/0.jpg" in predictions

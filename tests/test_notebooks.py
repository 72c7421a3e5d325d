"""The notebooks of examples/ run from their first cell to their last, in a kernel of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
NOT_INSTALLED = "nbclient and ipykernel are not installed: pip install 'iad-engine[notebook]'"


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook with its outputs; its kernel speaks over files of the folder, and not over ports."""
    nbclient = pytest.importorskip("nbclient", reason=NOT_INSTALLED)
    pytest.importorskip("ipykernel", reason=NOT_INSTALLED)
    import nbformat
    from jupyter_client.manager import AsyncKernelManager

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the other tests, of which some run at the same time
    monkeypatch.setenv("ENGINE_CACHE", str(folder / "cache"))
    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(transport="ipc", ip=str(folder / "kernel"))
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, km=manager, timeout=600, resources=resources).execute()


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason=NOT_INSTALLED)
    source = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in source.cells), "outputs are not kept in the repository"
    cells = [cell for cell in executed(path, tmp_path, monkeypatch).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert not errors
    assert len(pictures) >= 2

"""A trained network and its exports, shared by tests of exported files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.deployment.exporting import formats, writers
from engine.models.weights import LoadedModel, load_model, save_safetensors

SIZE = (8, 8)


def needs_onnx() -> None:
    """Skip, visibly, where the packages of ONNX are absent."""
    for package in formats.FORMATS["onnx"].packages:
        pytest.importorskip(package)


def subject(path: Path, size: tuple[int, int] = SIZE) -> writers.ExportSubject:
    return writers.ExportSubject(load_model(path), size)


def written(path: Path, folder: Path, names: Sequence[str]) -> Path:
    """A folder with the exports of a checkpoint, of images 8x8."""
    made = subject(path)
    folder.mkdir(parents=True)
    for name in names:
        writers.write(formats.FORMATS[name], made, folder)
    return folder


def untrained(name: str, folder: Path) -> LoadedModel:
    """A network of that architecture with random weights and random running statistics, from a file."""
    from engine import models

    torch.manual_seed(0)
    network = models.build(name, 3, normalize=models.get(name).normalization is None).eval()
    for key, buffer in network.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    normalize = ([0.5] * 3, [0.5] * 3)
    made = LoadedModel(
        path=folder / "memory",
        module=network,
        name=name,
        num_classes=3,
        class_names=("a", "b", "c"),
        taken="",
        normalize=normalize,  # type: ignore[arg-type]
        dataset=None,
        config=None,
        sha256="0" * 64,
        notes=(),
    )
    path = folder / "network.safetensors"
    save_safetensors(made, path)
    return load_model(path)

"""A trained checkpoint and short attacks, for tests of saved adversarial images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine import config, models
from engine.attacks.auto import standard
from engine.common.tensor_files import write_tensors
from engine.runs import checkpoints
from tests.conftest import CLASSES

EPSILON = "24/255"
SHORT = standard.Steps(apgd=3, fab=3, square=20)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let AutoAttack and its parts run a few steps."""
    patch.setattr(standard, "STANDARD", SHORT)


def trained(path: Path, folder: Path) -> Path:
    """A checkpoint of a resnet8 that classifies most images of `tiny_folder`, some of them barely."""
    torch.manual_seed(0)
    found = [(file, label) for label, name in enumerate(CLASSES) for file in (folder / "train" / name).iterdir()]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file, _ in found])
    x, labels = images.permute(0, 3, 1, 2) / 255, torch.tensor([label for _, label in found])
    network = models.build("resnet8", len(CLASSES))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()
    run = config.load({"model": "resnet8", "dataset": "folder", "method": "at"})
    part = checkpoints.student_part(network, run, CLASSES)
    write_tensors(path, checkpoints.content(part, checkpoints.Progress()))
    return path

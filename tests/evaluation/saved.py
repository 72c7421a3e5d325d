"""A trained checkpoint and short attacks, for tests of saved adversarial images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine import config, models
from engine.attacks.auto import standard
from engine.attacks.auto.apgd import Apgd
from engine.attacks.auto.fab import FabT
from engine.attacks.auto.search import Ball, Logits, Search
from engine.attacks.auto.square import Square
from engine.common.tensor_files import write_tensors
from engine.kernels.philox import Stream
from engine.runs import checkpoints
from tests.conftest import CLASSES

EPSILON = "24/255"
SHORT: dict[str, Callable[[Logits, Ball, int], Search[Any]]] = {
    "apgd-ce": lambda network, ball, seed: Apgd(
        network, "ce", ball, seed=seed, stream=Stream.APGD_CE, num_steps=3
    ),
    "fab-t": lambda network, ball, seed: FabT(network, ball, num_steps=3),
    "square": lambda network, ball, seed: Square(network, ball, seed=seed, num_queries=20),
}
"""The attacks with a few steps; square is the last part, as in AutoAttack for three classes."""


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let AutoAttack and its parts run a few steps."""
    patch.setattr(standard, "_SEARCHES", SHORT)


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

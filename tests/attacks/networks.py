"""Networks whose BatchNorm does something, for tests of what is folded and frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine import models
from engine.system.precision import Precision


def normalising(name: str, precision: Precision, images: Callable[[], Tensor]) -> nn.Module:
    """A network of 4 classes in training mode, with running statistics that folding cannot take for 0 and 1.

    images: of the passes that move them, drawn anew for each.
    """
    torch.manual_seed(0)
    network = precision.place(models.build(name, 4))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    for _ in range(3):
        network(images().to(precision.dtype))
    return network

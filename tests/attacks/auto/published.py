"""AutoAttack's package in float64, and the networks on which it and ours are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks.auto.search import Search, Start, put, taken


def package(module: str) -> ModuleType:
    """A module of the package; the test is skipped without it."""
    found: ModuleType = pytest.importorskip(f"pyautoattack.{module}", reason="pyautoattack is not installed")
    return found


@contextmanager
def in_float64() -> Iterator[None]:
    """The package asks for float32 in places, and gets float64."""
    narrow = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = narrow  # type: ignore[method-assign]


class Network(nn.Module):
    """Convolution, softplus, linear, in float64. It notes the images that it sees."""

    def __init__(self, classes: int = 6, seed: int = 5, side: int = 6, factor: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator, dtype=torch.float64) / sizes[-1])

        self.conv, self.linear = drawn(8, 3, 3, 3), drawn(classes, 8 * side * side)
        self.side, self.factor = side, factor
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        hidden = F.softplus(F.conv2d(images - 0.5, 4 * self.conv, padding=1), beta=8)
        logits: Tensor = self.factor * hidden.flatten(1) @ (self.side * self.linear.T)
        return logits


def images_of(count: int, side: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def trained(classes: int = 6, side: int = 6) -> Network:
    """A network that has learnt noisy prototypes, so that it is right far from the boundaries."""
    network, generator = Network(classes, 7, side), torch.Generator().manual_seed(3)
    prototypes = images_of(classes, side, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        labels = torch.randint(classes, (48,), generator=generator)
        noise = torch.rand(48, 3, side, side, generator=generator, dtype=torch.float64) - 0.5
        loss = F.cross_entropy(network((prototypes[labels] + noise).clamp(0, 1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


def start_of(network: nn.Module, x_nat: Tensor, rank: int = 2) -> Start:
    """Images with the class that the network sees in each as label, and the class of a rank as target."""
    with torch.no_grad():
        classes = network(x_nat).sort(dim=1)[1]
    ranks = torch.full((len(x_nat),), rank)
    return Start(x_nat, classes[:, -1], torch.arange(len(x_nat)) * 37 + 1000, ranks, classes[:, -rank])


def sure(network: nn.Module, count: int) -> Tensor:
    """Those of many images that are farthest from the boundaries, by DLR."""
    images = images_of(20 * count)
    with torch.no_grad():
        largest_BC = network(images).sort(dim=1, descending=True).values
    distance_B = (largest_BC[:, 0] - largest_BC[:, 1]) / (largest_BC[:, 0] - largest_BC[:, 2])
    return images[distance_B.argsort(descending=True)[:count].sort().values]


def ways(
    attack: Search[Any], start: Start, rounds: Sequence[Sequence[int]]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The state of each image in the end: alone, and beside others, moved between states round by round."""
    state = attack.begin(start)
    for rows in rounds:
        moved = taken(state, torch.tensor(rows))
        attack.advance(moved, last=False)
        put(state, torch.tensor(rows), moved)
    for row in range(len(start.x_nat)):
        alone = attack.begin(Start(*(value[[row]] for value in start)))
        for _ in range(sum(row in rows for rows in rounds)):
            attack.advance(alone, last=False)
        yield [own[0] for own in alone.tensors()], [tensor[row] for tensor in state.tensors()]

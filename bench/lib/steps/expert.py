"""The same training steps as an expert would write them in an afternoon: plain fast torch, no op of this project.

The passes are the textbook's under `paper` semantics. What differs: networks that are compiled, channels-last and
under autocast; weights that are frozen while they are attacked; no wait for the device; fused SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.lib.steps import textbook


@dataclass(frozen=True)
class ExpertStep(textbook.TextbookStep):
    """A step of `AutocastNetwork`s. graphs: they are replayed from CUDA graphs. scaler: for float16."""

    graphs: bool = False
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))

    def __call__(self, x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """One step on a batch, as the textbook's; the loss stays on the device."""
        a = self.attack(x, labels, start) if self.setting.method != "st" else x
        self._begin()
        loss = self.loss(x, a, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def attack(self, x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """x~ as the textbook's; weights are frozen, as a compiled network would compute their gradients too."""
        self._begin()
        with frozen(self.student):
            return super().attack(x, labels, start)

    def ascend(
        self, a: Tensor, x: Tensor, objective: Callable[[Tensor], Tensor], numbers: textbook.AttackNumbers
    ) -> Tensor:
        """One step of PGD, as the textbook's."""
        self._begin()
        return super().ascend(a, x, objective, numbers)

    def _begin(self) -> None:
        """Nobody reads any more what the graphs have left in their memory."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()


class AutocastNetwork(nn.Module):
    """A network as it is run: compiled if that is wanted, under autocast; logits in the dtype of the images.

    autocast: makes the context of a pass. compiler: arguments of torch.compile, None for no compilation.
    """

    def __init__(
        self,
        network: nn.Module,
        autocast: Callable[[], AbstractContextManager[object]],
        compiler: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.autocast = network.to(memory_format=torch.channels_last), autocast
        if compiler is not None:
            self.network.compile(fullgraph=True, dynamic=False, **compiler)

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.network(images)
        return logits.to(images.dtype)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No weight needs a gradient inside."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def sgd(student: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD as in the textbook's step, one launch for all weights."""
    return torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=2e-4, fused=True)

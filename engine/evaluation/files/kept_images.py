"""Attacked images of chosen samples, of all processes of an evaluation.

Shape suffixes: B batch, K chosen samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.system.distributed import World


class KeptImages:
    """Images of samples, as an attack has left them. samples: K indices in the data; None: none is kept."""

    def __init__(self, samples: Tensor | None) -> None:
        self._samples = torch.empty(0, dtype=torch.int64) if samples is None else samples
        self._rows = {sample: row for row, sample in enumerate(self._samples.tolist())}
        self._found: dict[int, Tensor] = {}

    def __contains__(self, sample: int) -> bool:
        return sample in self._rows

    def wants(self, sample_B: Tensor) -> bool:
        """True if there is one of them in a batch."""
        return any(sample in self for sample in sample_B.tolist())

    def add(self, sample_B: Tensor, x_adv: Tensor) -> None:
        """Keep those of a batch that are chosen."""
        for place, sample in enumerate(sample_B.tolist()):
            if sample in self:
                self._found[self._rows[sample]] = x_adv[place].detach().cpu().clone()

    def gathered(self, world: World, batch: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor | None:
        """The images of all processes, KCHW; of a sample that none has, the image as it is. None if K = 0."""
        if not self._rows:
            return None
        x_nat = batch(self._samples)[0].cpu()
        mine, has_K = torch.zeros_like(x_nat), torch.zeros(len(x_nat), dtype=torch.bool)
        for row, image in self._found.items():
            mine[row], has_K[row] = image, True
        everyone_has_K = world.gather(has_K.int()).amax(0) > 0
        everyone = world.gather(mine.contiguous()).sum(0)  # each of them is of one process
        return torch.where(everyone_has_K[:, None, None, None], everyone, x_nat)

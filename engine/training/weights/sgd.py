"""SGD that writes copies of weights in half precision, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels import SgdNumbers, SgdTensors, sgd_update
from engine.training.weights.half_weights import HalfWeights


class HalfSGD(torch.optim.SGD):
    """torch's fused SGD of weights of which some have copies, and gradients in half precision.

    State and groups are torch's, but that the momentum begins at 0.
    """

    def __init__(self, groups: list[dict[str, Any]], halves: HalfWeights, **keys: Any) -> None:
        super().__init__(groups, **keys, fused=True)
        self._halves = halves
        # By group, the host's memory that the last update has read, and a captured one reads at each replay.
        self._read: dict[int, Tensor | None] = {}
        self._captured: dict[int, Tensor | None] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have gradients, and their copies."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for number, group in enumerate(self.param_groups):
            tensors, numbers = self._of(group)
            if any(weight.is_cuda for weight in tensors.weights) and torch.cuda.is_current_stream_capturing():
                # A capture waits for the device before, so that nothing reads the last update's memory any more.
                self._captured[number] = sgd_update(tensors, numbers, self._read.pop(number, None))
            else:
                self._read[number] = sgd_update(tensors, numbers)
        self._halves.note()
        return loss

    def _of(self, group: dict[str, Any]) -> tuple[SgdTensors, SgdNumbers]:
        weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
        momenta = [self._momentum(weight) for weight in weights] if group["momentum"] else []
        tensors = SgdTensors(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            momenta,
            [self._halves.of.get(weight) for weight in weights],
        )
        numbers = SgdNumbers(
            group["lr"],
            group["momentum"],
            group["weight_decay"],
            group["nesterov"],
            getattr(self, "grad_scale", None),  # as torch's scaler gives them
            getattr(self, "found_inf", None),
        )
        return tensors, numbers

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        found: Tensor = state["momentum_buffer"]
        return found

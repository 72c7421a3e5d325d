"""The numbers that differ from step to step, on the device: a captured step reads them anew."""

from __future__ import annotations

import torch

from engine.training import optimizer as optimizers

_EPOCH, _STEP, _PART, _RATES = range(4)


class StepNumbers:
    """Epoch, step and learning rates of a step, which `set` changes by one copy to the device.

    epoch, step: int64 scalars. lr_part: float64 scalar, the rate relative to `peak`. lr: the rate, on the host.
    On a GPU each group of the optimizer has its own rate as a float32 tensor, elsewhere as a number.
    peak: the highest rate of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, peak: float) -> None:
        self._optimizer, self._peak = optimizer, peak
        self._on_gpu = device.type == "cuda"
        self._values = torch.zeros(_RATES + len(optimizer.param_groups), dtype=torch.int64, device=device)
        self.epoch, self.step = self._values[_EPOCH], self._values[_STEP]
        self.lr_part = self._values[_PART:].view(torch.float64)[0]
        self.lr = 0.0
        self.give_rates()

    def give_rates(self) -> None:
        """Give the optimizer's groups their tensors: after it was made, or has loaded a state."""
        if self._on_gpu:
            rates = self._values[_RATES:].view(torch.float32)[::2]
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def set(self, lr: float, epoch: int, step: int) -> None:
        """The numbers of the step to come; the device is not waited for."""
        self.lr = lr
        host = torch.zeros(self._values.shape, dtype=torch.int64, pin_memory=self._on_gpu)
        host[_EPOCH], host[_STEP] = epoch, step
        host[_PART:].view(torch.float64)[0] = lr / self._peak
        if self._on_gpu:
            scales = torch.tensor(
                [group["lr_scale"] for group in self._optimizer.param_groups], dtype=torch.float64
            )
            host[_RATES:].view(torch.float32)[::2] = lr * scales
        else:
            optimizers.set_rate(self._optimizer, lr)
        self._values.copy_(host, non_blocking=True)

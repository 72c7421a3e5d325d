"""The numbers that differ from step to step, on the device: a captured step reads them anew."""

from __future__ import annotations

import torch

_EPOCH, _STEP, _PART, _RATES = range(4)


class StepNumbers:
    """Epoch, step and learning rates of a step, which `set` changes by one copy to the device.

    epoch, step: int64 scalars. lr_part: float64 scalar, the rate relative to `peak`, the highest of the run.
    rates: of each group of the optimizer, on the host. On a GPU a group has its own as a float32 tensor, elsewhere
    as a number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, peak: float) -> None:
        self._optimizer, self._peak = optimizer, peak
        self._on_gpu = device.type == "cuda"
        self._values = torch.zeros(_RATES + len(optimizer.param_groups), dtype=torch.int64, device=device)
        self.epoch, self.step = self._values[_EPOCH], self._values[_STEP]
        self.lr_part = self._values[_PART:].view(torch.float64)[0]
        self.give_rates([group["lr"] for group in optimizer.param_groups])

    def give_rates(self, rates: list[float]) -> None:
        """Give the optimizer's groups their rates, also after it has loaded a state; on a GPU `set` fills them."""
        self.rates = rates
        given = self._values[_RATES:].view(torch.float32)[::2] if self._on_gpu else rates
        for group, rate in zip(self._optimizer.param_groups, given, strict=True):
            group["lr"] = rate

    def set(self, lr: float, epoch: int, step: int) -> None:
        """The numbers of the step to come; the device is not waited for."""
        host = torch.zeros(self._values.shape, dtype=torch.int64, pin_memory=self._on_gpu)
        host[_EPOCH], host[_STEP] = epoch, step
        host[_PART:].view(torch.float64)[0] = lr / self._peak
        rates = [lr * group["lr_scale"] for group in self._optimizer.param_groups]
        host[_RATES:].view(torch.float32)[::2] = torch.tensor(rates, dtype=torch.float64)
        self._values.copy_(host, non_blocking=True)
        if self._on_gpu:
            self.rates = rates
        else:
            self.give_rates(rates)

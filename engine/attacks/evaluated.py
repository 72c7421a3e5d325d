"""The form and the state in which a network is evaluated: for any attack, and without a trace on the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.attacks.pgd import batch_norm_mode, frozen
from engine.attacks.twin import Twin
from engine.models.layers import use_winograd
from engine.system.precision import Precision, full_precision


def prepared(network: nn.Module, precision: Precision) -> nn.Module:
    """The network frozen, its BatchNorm folded into convolutions, channels-last, its passes in that precision.

    Logits are those of the network in evaluation mode up to rounding, and gradients of images are of their true
    size in half precision too. The network stays as it is, and shares with this one what is neither folded nor
    converted. In full precision it is returned itself where there is no BatchNorm, where no tracer sees its
    operations, and where it cannot be copied. Raises RuntimeError or TypeError for the last in half precision.
    """
    if precision.amp_dtype is None and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return network
    try:
        twin = Twin(network, "eval", precision, follows=False)
    except (TypeError, RuntimeError):
        if precision.amp_dtype is None:
            return network  # a module of anybody's may refuse to be copied
        raise
    if precision.amp_dtype is None and twin.is_opaque:
        return network
    twin.module.to(memory_format=torch.channels_last)
    use_winograd(twin.module, wanted=precision.winograd, keeps=True)
    return twin.module if precision.amp_dtype is None else _InHalf(twin, precision.attack_loss_scale)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, precision: Precision | None = None) -> Iterator[None]:
    """Eval mode, no gradient, no autocast inside; everything comes back afterwards.

    precision: float32 is computed as in its network passes; None: in full.
    """
    with (
        batch_norm_mode(model, "eval"),
        frozen(model),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        full_precision() if precision is None else precision.float32(),
    ):
        yield


class _InHalf(nn.Module):
    """A twin as a module. scale: power of 2 by which gradients are larger inside, where small ones are lost."""

    def __init__(self, twin: Twin, scale: float) -> None:
        super().__init__()
        self.network = twin.module
        self._twin, self._scale = twin, scale
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W), both in float32."""
        logits_BC: Tensor = self._twin(_GradientTimes.apply(images, 1 / self._scale))
        scaled_BC: Tensor = _GradientTimes.apply(logits_BC, self._scale)
        return scaled_BC


class _GradientTimes(torch.autograd.Function):
    """The identity, with the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None

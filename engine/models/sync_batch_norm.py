"""BatchNorm over the batch of all processes: on GPUs torch's own, which refuses CPUs; between CPUs this one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.models.layers import BatchNorm2d, added, is_plain


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with every BatchNorm normalising over all processes; parameters and buffers are the same.

    device: on which it will be trained. Raises ValueError for a BatchNorm that does something else, too.
    """
    replaced = nn.BatchNorm2d if device.type == "cpu" else _BatchNorm
    for name, norm in network.named_modules():
        is_one = isinstance(norm, SyncBatchNorm) or (isinstance(norm, replaced) and is_plain(norm))
        if isinstance(norm, _BatchNorm) and not is_one:
            raise ValueError(
                f"sync_bn: {name} of the network is a {type(norm).__name__}, which no other can replace"
            )
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.BatchNorm2d) and not isinstance(norm, SyncBatchNorm):
            own = SyncBatchNorm(
                norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
            ).train(norm.training)
            own._parameters.update(norm._parameters)
            own._buffers.update(norm._buffers)
            network.set_submodule(name, own)
    return network


def is_synchronised(network: nn.Module) -> bool:
    """True if some BatchNorm in it normalises over all processes."""
    return any(isinstance(module, SyncBatchNorm | nn.SyncBatchNorm) for module in network.modules())


class SyncBatchNorm(BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all processes' images together. x: (B, C, H, W), on a CPU.

    A process without images takes part with none.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """As of `BatchNorm2d`; running statistics move as its own do."""
        if not self.training:
            return super().forward(input, residual, relu)
        out: Tensor
        out, mean_C, var_C = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                momentum = self.momentum
                if momentum is None:
                    assert self.num_batches_tracked is not None
                    self.num_batches_tracked.add_(1)
                    momentum = 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(var_C.to(self.running_var.dtype), momentum)
        return added(out, residual, relu=relu)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with one collective in each direction."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = input.to(weight.dtype)
        count = x.numel() // x.shape[1]
        mean_C = x.sum((0, 2, 3)) / max(count, 1)
        squares_C = (x - _by_channel(mean_C)).square().sum((0, 2, 3))
        mine = torch.cat((mean_C.new_tensor([count]), mean_C, squares_C))
        theirs = mine.new_empty(dist.get_world_size(), len(mine))
        dist.all_gather(list(theirs.unbind()), mine)
        # Chan's way to join means and sums of squared deviations of parts.
        count_W1, mean_WC, squares_WC = theirs.split((1, len(mean_C), len(mean_C)), dim=1)
        total = count_W1.sum()
        mean_C = (count_W1 * mean_WC).sum(0) / total
        squares_C = (squares_WC + count_W1 * (mean_WC - mean_C).square()).sum(0)
        rstd_C = (squares_C / total + eps).rsqrt()
        ctx.save_for_backward(input, weight, mean_C, rstd_C, total)
        out = (x - _by_channel(mean_C)) * _by_channel(rstd_C * weight) + _by_channel(bias)
        var_C = squares_C / (total - 1)
        ctx.mark_non_differentiable(mean_C, var_C)
        return out.to(input.dtype), mean_C, var_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean_C, rstd_C, total = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        normal = (input.to(weight.dtype) - _by_channel(mean_C)) * _by_channel(rstd_C)
        sums = torch.stack((grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))))
        grad_bias, grad_weight = sums.clone().unbind()  # of this process's images: gradients are joined later
        grad_input = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)
            along_bias, along_weight = (sums / total).unbind()
            grad_input = (grad - _by_channel(along_bias) - normal * _by_channel(along_weight)) * _by_channel(
                rstd_C * weight
            )
            grad_input = grad_input.to(input.dtype)
        return grad_input, grad_weight, grad_bias, None


def _by_channel(value_C: Tensor) -> Tensor:
    return value_C[:, None, None]

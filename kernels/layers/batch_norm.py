"""BatchNorm by the statistics of the batch, with the addition and the ReLU that follow it in a residual network.

Shape suffixes: B batch, C channels, H height, W width; 2C: two numbers of each channel, in rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels import dispatch, reference
from engine.kernels.contract import check_device, is_transformed

# Formats of maps that the fused implementations take, by type of device.
_FUSED = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

_FEW = 1024  # rows, of which a compiler for a GPU makes one kernel itself


# many parameters: those of torch's function, and what follows it
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """[max(0, .)] of (x - mean) / sqrt(var + eps) * weight + bias [+ residual], by x's own mean and variance.

    mean, var: of each channel, over the batch and its pixels (Ioffe & Szegedy, 2015), computed in float32.
    The running ones, if given, move as torch's: running <- (1 - momentum) running + momentum batch, where the
    variance of the batch is the unbiased one.

    x: (B, C, H, W), or what torch's function takes. weight, bias, running_mean, running_var: (C,). residual: as x.
    Fused: x and residual of one format in channels_last, the rest float32. Half precision is rounded once, at the
    end. What the ReLU let through is told by y where there is a residual, and is else computed again.

    Raises ValueError for a single value of each channel, for a residual of another shape, and for one running
    statistic without the other.
    """
    if x.dim() > 1 and x.numel() == x.shape[1]:
        raise ValueError(f"x: one value of each channel has no variance, got shape {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: one is given without the other")
    check_device(
        x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, residual=residual
    )
    fused = _is_fused(x, weight, bias, running_mean, running_var, residual)
    implementation = dispatch.choose("batch_norm", x.device, fused=fused)
    arguments = (x, weight, bias, running_mean, running_var, residual, float(momentum), float(eps), relu)
    if implementation == "reference":
        return reference.batch_norm(*arguments)
    y: Tensor = _Fused.apply(*arguments)
    return y


def _is_fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Tensor | None) -> bool:
    """True for a call that the fused implementations know. others: running statistics, and the residual."""
    if weight is None or bias is None or x.dtype not in _FUSED.get(x.device.type, ()) or not _is_map(x):
        return False
    running_mean, running_var, residual = others
    if residual is not None and residual.dtype != x.dtype:
        return False
    for given in (weight, bias, running_mean, running_var):
        if given is not None and (
            given.dtype != torch.float32 or given.shape != x.shape[1:2] or not given.is_contiguous()
        ):
            return False
    if torch.compiler.is_compiling():
        return x.device.type == "cpu" or x.numel() > _FEW * x.shape[1]
    return not is_transformed(x)


def _is_map(x: Tensor) -> bool:
    return x.dim() == 4 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


# many parameters: those of the op, in one order for all implementations
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """y, and (2, C) mean and 1 / sqrt(var + eps), by the fused implementation that serves."""
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    serve = dispatch.fused(dispatch.choose("batch_norm", x.device), "batch_norm", "batch_norm")
    found: tuple[Tensor, Tensor] = serve(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu)
    return found


def _backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, statistics_2C: Tensor, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of the residual where y tells the mask, and (2, C) of weight and bias."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    serve = dispatch.fused(dispatch.choose("batch_norm", x.device), "batch_norm", "batch_norm_backward")
    found: tuple[Tensor, Tensor | None, Tensor] = serve(grad, x, y, weight, bias, statistics_2C, relu)
    return found


class _Fused(torch.autograd.Function):
    """The arguments of `reference.batch_norm`; saved are x, the numbers of channels, and y where it is needed."""

    # many parameters: those of the op, in one order for all implementations
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        serve = _op if torch.compiler.is_compiling() else _forward
        y, statistics_2C = serve(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu)
        ctx.has_residual, ctx.relu, ctx.eps = residual is not None, relu, eps
        if relu and residual is not None:
            ctx.save_for_backward(x, weight, bias, statistics_2C, y)
        else:
            ctx.save_for_backward(x, weight, bias, statistics_2C)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics_2C, *rest = ctx.saved_tensors
        y = rest[0] if rest else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx, grad, (x, weight, bias), y)
        serve = _op_backward if torch.compiler.is_compiling() else _backward
        grad_x, grad_residual, grad_parameters_2C = serve(grad, x, y, weight, bias, statistics_2C, ctx.relu)
        grad_weight, grad_bias = grad_parameters_2C.unbind()
        if y is None:  # nothing lies between y and the residual
            grad_residual = grad if ctx.has_residual else None
        return grad_x, grad_weight, grad_bias, None, None, grad_residual, None, None, None


def _differentiable(
    ctx: Any, grad: Tensor, inputs: tuple[Tensor, ...], y: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as torch's own functions of grad and the inputs, for a derivative of them."""
    x, weight, bias = inputs
    out = reference.batch_norm(x, weight, bias, None, None, None, 0.0, ctx.eps, False)
    if ctx.relu:
        grad = grad.masked_fill((out if y is None else y).detach() <= 0, 0)
    asking = [given for given in inputs if given.requires_grad]
    found = iter(torch.autograd.grad(out, asking, grad, create_graph=True) if asking else ())
    gradients = [next(found) if given.requires_grad else None for given in inputs]
    return *gradients, None, None, grad if ctx.has_residual else None, None, None, None


# ---------------------------------------------------------------- the same as registered ops, for torch.compile


# many parameters: the schema of an op is flat
@torch.library.custom_op("engine::batch_norm", mutates_args=("running_mean", "running_var"))
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu)


@_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(2, x.shape[1])


@torch.library.custom_op("engine::batch_norm_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, statistics_2C: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_residual, grad_parameters_2C = _backward(grad, x, y, weight, bias, statistics_2C, relu)
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, grad_parameters_2C


@_op_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, statistics_2C: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_residual = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, torch.empty_like(statistics_2C)

"""The first convolution of a network, with the normalisation of the images before it, and an attack's step by it.

Shape suffixes: B batch, O channels out, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels import dispatch, reference
from engine.kernels.contract import check_device, check_step, is_transformed
from engine.kernels.pgd_update import pgd_update

# Formats of the output, and of its gradient, that the fused implementations know, by type of device.
_FUSED = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_MOST_NUMBERS = 2**31  # of images, whose places they count in 32 bits


def image_conv3x3(
    images_B3HW: Tensor,
    weight_O333: Tensor,
    bias_O: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y[b, o, h, w] = bias[o] + sum over c, i, j of weight[o, c, i, j] n[b, c, h + i - 1, w + j - 1], in `dtype`.

    n = (images - mean) / std, and 0 outside of the images; n = images where mean and std, (3, 1, 1), are None.
    Computed in the dtype of the images, which is that of the other tensors, too, and rounded once at the end.
    dtype: None: that of the images. Gradients of any order.
    Fused for float32 images in channels_last, where mean and std ask for no gradient: nothing between images and
    output is written. Torch's where a network is exported or traced: who runs it may not have the op.

    Raises ValueError for other shapes, for several dtypes or devices, and for mean without std.
    """
    _check_weight(weight_O333, mean, std)
    if images_B3HW.dim() != 4 or images_B3HW.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W), got shape {tuple(images_B3HW.shape)}")
    if bias_O is not None and bias_O.shape != weight_O333.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight_O333.shape[0]},), got {tuple(bias_O.shape)}")
    given = {"images": images_B3HW, "weight": weight_O333, "bias": bias_O, "mean": mean, "std": std}
    dtypes = {name: tensor.dtype for name, tensor in given.items() if tensor is not None}
    if len({*dtypes.values()}) > 1 or not images_B3HW.is_floating_point():
        named = ", ".join(f"{name} {found}" for name, found in dtypes.items())
        raise ValueError(f"images, weight, bias, mean and std must have one floating dtype, got {named}")
    check_device(**given)
    arguments = (images_B3HW, weight_O333, bias_O, mean, std, dtype or images_B3HW.dtype)
    if _choose(images_B3HW, fused=_is_fused(*arguments)) == "reference":
        return reference.image_conv3x3(*arguments)
    y: Tensor = _Fused.apply(*arguments)
    return y


def image_conv3x3_update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    weight_O333: Tensor,
    std: Tensor | None = None,
    *,
    epsilon: float,
    step_size: float,
    counts: Tensor | None = None,
) -> Tensor:
    """`pgd_update` in L-inf, in place, by the gradient of `image_conv3x3` to its images x_adv.

    grad: the gradient of its output, (B, O, H, W), of any floating dtype. weight, std: as it took them.
    x_nat, epsilon, step_size, counts: of `pgd_update`. Fused where the convolution is: the gradient of the images
    is not written.

    Raises ValueError as `pgd_update` and `image_conv3x3` do, and for a gradient of another shape.
    """
    _check_weight(weight_O333, std, std)
    expected = (len(x_adv), len(weight_O333), *x_adv.shape[2:])
    if x_adv.dim() != 4 or grad.shape != expected or x_nat.shape != x_adv.shape:
        shapes = ", ".join(str(tuple(given.shape)) for given in (x_adv, grad, x_nat))
        wanted = f"(B, 3, H, W), (B, {len(weight_O333)}, H, W) and x_adv's"
        raise ValueError(f"x_adv, grad and x_nat: expected {wanted}, got {shapes}")
    check_device(x_adv=x_adv, grad=grad, x_nat=x_nat, weight=weight_O333, std=std, counts=counts)
    check_step(x_adv, counts)
    fused = _is_fused(x_adv, weight_O333, None, std, std, grad.dtype) and x_nat.dtype == x_adv.dtype
    if _choose(x_adv, fused=fused) == "reference":
        of_images = reference.image_conv3x3_backward(grad, weight_O333, std)
        return pgd_update(
            x_adv, of_images, x_nat, threat_model="Linf", epsilon=epsilon, step_size=step_size, counts=counts
        )
    serve = _op_update if torch.compiler.is_compiling() else _update
    serve(x_adv, grad, x_nat, weight_O333, std, epsilon, step_size, counts)
    return x_adv


def _check_weight(weight: Tensor, mean: Tensor | None, std: Tensor | None) -> None:
    if weight.dim() != 4 or weight.shape[1:] != (3, 3, 3):
        raise ValueError(f"weight: expected shape (O, 3, 3, 3), got {tuple(weight.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std: one is given without the other")
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and given.shape != (3, 1, 1):
            raise ValueError(f"{name}: expected shape (3, 1, 1), got {tuple(given.shape)}")


def _choose(images: Tensor, *, fused: bool) -> str:
    return dispatch.choose("image_conv3x3", images.device, fused=fused)


def _is_fused(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """True for a call that the fused implementations know."""
    # torch.compiler.is_exporting() is always true in a compiled function of torch 2.11.
    if torch.compiler._is_exporting_flag:
        return False
    if not torch.compiler.is_compiling() and (is_transformed(images) or torch._C._is_tracing()):
        return False
    if images.dtype != torch.float32 or dtype not in _FUSED.get(images.device.type, ()) or not len(weight):
        return False
    if not 0 < images.numel() < _MOST_NUMBERS or not images.is_contiguous(memory_format=torch.channels_last):
        return False
    if any(given is not None and (given.requires_grad or not given.is_contiguous()) for given in (mean, std)):
        return False
    return bias is None or bias.is_contiguous()


def _serve(function: str, images: Tensor) -> Any:
    return dispatch.fused(_choose(images, fused=True), "image_conv3x3", function)


def _last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y: Tensor = _serve("image_conv3x3", images)(images, _last(weight), bias, mean, std, dtype)
    return y


def _backward(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    of_images: Tensor = _serve("image_conv3x3_backward", grad)(_last(grad), _last(weight), std)
    return of_images


def _update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    weight: Tensor,
    std: Tensor | None,
    epsilon: float,
    step_size: float,
    counts: Tensor | None,
) -> None:
    serve = _serve("image_conv3x3_update", x_adv)
    serve(x_adv, _last(grad), _last(x_nat), _last(weight), std, epsilon, step_size, counts)
    # Autograd does not see what a kernel writes: it must refuse to use the old values of either.
    increment_version(x_adv if counts is None else (x_adv, counts))


class _Fused(torch.autograd.Function):
    """The arguments of `reference.image_conv3x3`. Images are saved where the weight asks for a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor | None,
        std: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight, mean, std, images if weight.requires_grad else None)
        serve = _op if torch.compiler.is_compiling() else _forward
        y: Tensor = serve(images, weight, bias, mean, std, dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, std, images = ctx.saved_tensors
        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                of_images = reference.image_conv3x3_backward(grad, weight, std)
            else:
                of_images = (_op_backward if torch.compiler.is_compiling() else _backward)(grad, weight, std)
        if ctx.needs_input_grad[1]:
            of_weight = reference.image_conv3x3_weight(grad, images, weight, mean, std)
        if ctx.needs_input_grad[2]:
            of_bias = grad.to(weight.dtype).sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None, None


# ---------------------------------------------------------------- the same as registered ops, for torch.compile


@torch.library.custom_op("engine::image_conv3x3", mutates_args=())
def _op(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return _forward(images, weight, bias, mean, std, dtype)


@_op.register_fake
def _(images: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    shape = (images.shape[0], weight.shape[0], *images.shape[2:])
    return torch.empty(shape, dtype=rest[-1], device=images.device, memory_format=torch.channels_last)


@torch.library.custom_op("engine::image_conv3x3_backward", mutates_args=())
def _op_backward(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    return _backward(grad, weight, std)


@_op_backward.register_fake
def _(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    shape = (grad.shape[0], 3, *grad.shape[2:])
    return torch.empty(shape, dtype=weight.dtype, device=grad.device, memory_format=torch.channels_last)


@torch.library.custom_op("engine::image_conv3x3_update", mutates_args=("x_adv", "counts"))
def _op_update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    weight: Tensor,
    std: Tensor | None,
    epsilon: float,
    step_size: float,
    counts: Tensor | None,
) -> None:
    _update(x_adv, grad, x_nat, weight, std, epsilon, step_size, counts)


@_op_update.register_fake
def _(*_: object) -> None:
    return None

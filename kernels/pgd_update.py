"""One step of a projected-gradient attack (Eq. 2).

Shape suffixes: B batch; an image may have any shape after it. L2 norms are taken per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels import dispatch, reference
from engine.kernels.contract import check_device, check_step, dense_layout, look_up

# True where a step goes along the gradient divided by its L2 norm, False where along its sign.
IS_L2 = {"Linf": False, "L2": True}


def pgd_update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    *,
    threat_model: str,
    epsilon: float,
    step_size: float,
    counts: Tensor | None = None,
) -> Tensor:
    """x_adv <- clamp(project(x_adv + step_size * sign(grad))), in place, and returned.

    project: onto the epsilon-ball around x_nat, the whole space where epsilon is infinite. clamp: to [0, 1].
    L2: grad / |grad| in place of the sign.
    A sample whose gradient is zero stays where it is. Where a gradient is NaN, in L-inf the pixel stays, and in
    L2 the sample becomes NaN.

    x_adv, x_nat: (B, ...) of one dtype and any strides, x_adv without overlaps. grad: of any floating dtype.
    counts: (2,) int64 on the device, to which the zero and the non-finite entries of grad are added: where most
    are zero the gradient is masked, and robustness looks better than it is.
    """
    l2 = look_up("threat_model", threat_model, IS_L2)
    if not x_adv.shape == grad.shape == x_nat.shape:
        shapes = ", ".join(str(tuple(given.shape)) for given in (x_adv, grad, x_nat))
        raise ValueError(f"x_adv, grad and x_nat must have one shape, got {shapes}")
    if x_adv.dim() < 2:
        raise ValueError(f"x_adv: expected images (B, ...), got shape {tuple(x_adv.shape)}")
    if x_adv.dtype != x_nat.dtype or not (x_adv.dtype.is_floating_point and grad.dtype.is_floating_point):
        dtypes = ", ".join(str(given.dtype) for given in (x_adv, grad, x_nat))
        raise ValueError(f"x_adv and x_nat must have one floating dtype and grad a floating one, got {dtypes}")
    check_device(x_adv=x_adv, grad=grad, x_nat=x_nat, counts=counts)
    check_step(x_adv, counts)
    update = _op if torch.compiler.is_compiling() else _update
    update(x_adv, grad, x_nat, l2, epsilon, step_size, counts)
    return x_adv


def _update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    """The step by the implementation that serves here; a fused one reads and writes memory in its order."""
    layout = dense_layout(x_adv)
    fused = layout is not None and x_adv.dtype == torch.float32 and grad.dtype in _GRADIENTS
    implementation = dispatch.choose("pgd_update", x_adv.device, fused=fused)
    if layout is None or implementation == "reference":
        reference.pgd_update(x_adv, grad, x_nat, l2, epsilon, step_size, counts)
        return
    grad, x_nat = grad.contiguous(memory_format=layout), x_nat.contiguous(memory_format=layout)
    serve = dispatch.fused(implementation, "pgd_update", "pgd_update")
    serve(x_adv, grad, x_nat, l2, epsilon, step_size, counts)
    # Autograd does not see what a kernel writes: it must refuse to use the old values of either.
    increment_version(x_adv if counts is None else (x_adv, counts))


_GRADIENTS = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("engine::pgd_update", mutates_args=("x_adv", "counts"))
def _op(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    _update(x_adv, grad, x_nat, l2, epsilon, step_size, counts)


@_op.register_fake
def _(*_: object) -> None:
    return None

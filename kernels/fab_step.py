"""One step of the FAB attack (Croce & Hein, 2020), with projections that sort nothing.

Shape suffixes: B batch; an image may have any shape after it. Norms are taken per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels import dispatch, reference
from engine.kernels.contract import check_device, check_step, dense_layout, is_transformed, look_up
from engine.kernels.pgd_update import IS_L2


def fab_step(
    x_adv: Tensor,
    x_nat: Tensor,
    grad: Tensor,
    difference_B: Tensor,
    *,
    threat_model: str,
    alpha_max: float = 0.1,
    eta: float = 1.05,
) -> Tensor:
    """x_adv <- clamp((1 - alpha) (x_adv + eta p) + alpha (x_nat + eta p_nat)), in place, and returned.

    p: the shortest way, in the norm of the threat model and in the box [0, 1], from x_adv to the plane
    {v: difference + <grad, v - x_adv> = 0}, or to the corner nearest to it where the box does not reach it; p_nat:
    the same from x_nat. alpha = min(|p| / (|p| + |p_nat|), alpha_max), each norm at least 1e-8.
    A sample whose gradient or difference is not finite stays. In L2 entries of grad below 1e-8 count as
    zero. Exact but for roundings, without sorting; computed in float64, so that grad may have any scale.

    x_adv, x_nat: (B, ...) of one floating dtype and any strides, x_adv without overlaps, in [0, 1].
    grad: gradient at x_adv of a difference of two logits. difference_B: (B,), that difference.
    Raises ValueError for other shapes, dtypes and devices, and an unknown threat_model.
    Source: Croce & Hein, arXiv:1907.02044, Algorithm 1.
    """
    l2 = look_up("threat_model", threat_model, IS_L2)
    if not x_adv.shape == x_nat.shape == grad.shape:
        shapes = ", ".join(str(tuple(given.shape)) for given in (x_adv, x_nat, grad))
        raise ValueError(f"x_adv, x_nat and grad must have one shape, got {shapes}")
    if x_adv.dim() < 2:
        raise ValueError(f"x_adv: expected images (B, ...), got shape {tuple(x_adv.shape)}")
    if difference_B.shape != x_adv.shape[:1]:
        raise ValueError(f"difference_B: expected ({len(x_adv)},), got {tuple(difference_B.shape)}")
    if x_adv.dtype != x_nat.dtype or not all(
        given.dtype.is_floating_point for given in (x_adv, grad, difference_B)
    ):
        dtypes = ", ".join(str(given.dtype) for given in (x_adv, x_nat, grad, difference_B))
        raise ValueError(
            f"x_adv and x_nat must have one floating dtype, grad and difference_B floating ones, got {dtypes}"
        )
    check_device(x_adv=x_adv, x_nat=x_nat, grad=grad, difference_B=difference_B)
    check_step(x_adv, None)
    update = _op if torch.compiler.is_compiling() else _update
    update(x_adv, x_nat, grad, difference_B, l2, alpha_max, eta)
    return x_adv


def _update(
    x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor, l2: bool, alpha_max: float, eta: float
) -> None:
    """The step by the implementation that serves here; a fused one reads and writes memory in its order."""
    layout = dense_layout(x_adv)
    single = torch.float32
    fused = layout is not None and not is_transformed(x_adv)
    fused = fused and all(given.dtype == single for given in (x_adv, grad, difference_B))
    implementation = dispatch.choose("fab_step", x_adv.device, fused=fused)
    if layout is None or implementation == "reference":
        reference.fab_step(x_adv, x_nat, grad, difference_B, l2, alpha_max, eta)
        return
    x_nat, grad = x_nat.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    serve = dispatch.fused(implementation, "fab_step", "fab_step")
    serve(x_adv, x_nat, grad, difference_B.contiguous(), l2, alpha_max, eta)
    increment_version(x_adv)  # autograd does not see what a kernel writes


@torch.library.custom_op("engine::fab_step", mutates_args=("x_adv",))
def _op(
    x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor, l2: bool, alpha_max: float, eta: float
) -> None:
    _update(x_adv, x_nat, grad, difference_B, l2, alpha_max, eta)


@_op.register_fake
def _(*_: object) -> None:
    return None

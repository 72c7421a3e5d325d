"""An update of weights by SGD, which also writes their copies in half precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels import dispatch, reference
from engine.kernels.contract import SgdNumbers, SgdTensors, check_device, dense_layout

_HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def sgd_update(tensors: SgdTensors, numbers: SgdNumbers, table: Tensor | None = None) -> Tensor | None:
    """Update in place: g = grad / grad_scale + weight_decay w; m <- momentum m + g; w <- w - lr m; half <- w.

    nesterov: w <- w - lr (g + momentum m). Without momentum: w <- w - lr g. Where found_inf is not 0, all stay as
    they were, but that a copy may be written again. Gradients and copies are of any floating dtype; the gradients
    may be divided in place.

    Returned is the host's memory, None where there is none, in which a fused implementation lists the tensors:
    a CUDA graph that has captured the call reads it at each replay, and it has to stay as it is as long as the
    graph. table: such memory of an earlier call with as many tensors, which nothing reads any more, to use again.
    Raises ValueError for lists, shapes, dtypes and devices that do not fit. Source: torch.optim.SGD(fused=True).
    """
    _check(tensors, numbers)
    if not tensors.weights:
        return None
    kept = _serve(tensors, numbers, table)
    # Autograd sees neither: it must refuse to use the old values, and who keeps copies must notice.
    halves = [half for half in tensors.halves if half is not None]
    increment_version([*tensors.weights, *tensors.momenta, *halves])
    return kept


def _serve(tensors: SgdTensors, numbers: SgdNumbers, table: Tensor | None) -> Tensor | None:
    fused = _in_order(tensors)
    device = tensors.weights[0].device
    implementation = dispatch.choose("sgd_update", device, fused=fused is not None)
    if fused is None or implementation == "reference":
        reference.sgd_update(tensors, numbers)
        return None
    kept: Tensor = dispatch.fused(implementation, "sgd_update", "sgd_update")(fused, numbers, table)
    return kept


def _in_order(tensors: SgdTensors) -> SgdTensors | None:
    """The same, of float32 and one half format, with gradients in the order of the weights' memory.

    None where a fused implementation does not know them: other formats, or memory with gaps.
    """
    given = [half for half in (*tensors.gradients, *tensors.halves) if half is not None]
    formats = {tensor.dtype for tensor in given} - {torch.float32}
    if len(formats) > 1 or not formats.issubset(_HALVES):
        return None
    if any(half is not None and half.dtype not in _HALVES for half in tensors.halves):
        return None
    gradients = []
    momenta = tensors.momenta or tensors.weights
    for weight, gradient, momentum, half in zip(
        tensors.weights, tensors.gradients, momenta, tensors.halves, strict=True
    ):
        layout = dense_layout(weight)
        if layout is None or weight.dtype != torch.float32 or momentum.dtype != torch.float32:
            return None
        written = (momentum,) if half is None else (momentum, half)
        if not all(tensor.is_contiguous(memory_format=layout) for tensor in written):
            return None
        gradients.append(gradient.contiguous(memory_format=layout))
    return tensors._replace(gradients=gradients)


def _check(tensors: SgdTensors, numbers: SgdNumbers) -> None:
    """Raise ValueError for what does not fit together."""
    weights, gradients, momenta, halves = tensors
    expected = len(weights) if numbers.momentum else 0
    if not len(gradients) == len(halves) == len(weights) or len(momenta) != expected:
        lengths = ", ".join(f"{len(given)} {name}" for name, given in tensors._asdict().items())
        raise ValueError(
            f"tensors: expected one of each for a weight, momenta if momentum is not 0, got {lengths}"
        )
    if numbers.nesterov and not numbers.momentum:
        raise ValueError("nesterov: it needs a momentum, got 0")
    for weight, gradient, momentum, half in zip(weights, gradients, momenta or weights, halves, strict=True):
        others = (gradient, momentum) if half is None else (gradient, momentum, half)
        if not all(weight.shape == other.shape for other in others):
            shapes = ", ".join(str(tuple(given.shape)) for given in (weight, *others))
            raise ValueError(
                f"tensors: a weight, its gradient, momentum and copy must have one shape, got {shapes}"
            )
        if weight.dtype != momentum.dtype or not all(t.dtype.is_floating_point for t in (weight, *others)):
            dtypes = ", ".join(str(given.dtype) for given in (weight, *others))
            raise ValueError(f"tensors: weight and momentum must have one floating dtype, got {dtypes}")
    if weights:
        scalars = {"lr": numbers.lr, "grad_scale": numbers.grad_scale, "found_inf": numbers.found_inf}
        given = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
        for name, value in given.items():
            if value.dim() or value.dtype != torch.float32:
                raise ValueError(f"{name}: expected a () float32, got {value.dtype} of {tuple(value.shape)}")
        every = [*weights, *gradients, *momenta, *(half for half in halves if half is not None)]
        elsewhere = next((tensor for tensor in every if tensor.device != weights[0].device), None)
        check_device(weights=weights[0], tensors=elsewhere, **given)

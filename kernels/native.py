"""The native library: where it lies, what it can do, and the calls into it."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.contract import LossAndGradients, LossInputs, LossRow


def missing(device_type: str) -> str:
    """Why the library cannot serve on a device; empty where it can."""
    return "the native library is not built (make native)"


def description(device_type: str) -> str:
    """What of the processor or the device the library uses, for the user."""
    return ""


def loss_and_gradients(inputs: LossInputs, row: LossRow, want_adv: bool, want_nat: bool) -> LossAndGradients:
    """`reference.loss_and_gradients` on a CPU, in float32."""
    raise NotImplementedError


def pgd_update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    """`reference.pgd_update` of dense tensors of one layout: images float32, grad float32, float16 or bfloat16."""
    raise NotImplementedError


def crop_flip(
    x_BCHW: Tensor,
    labels_B: Tensor,
    images_NHWC: Tensor,
    labels_N: Tensor,
    sample_B: Tensor,
    seed: int,
    epoch: int,
    padding: int,
    flip: bool,
    augment: bool,
) -> None:
    """`reference.crop_flip` of contiguous images into float32."""
    raise NotImplementedError

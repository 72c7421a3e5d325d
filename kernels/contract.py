"""Shared by the implementations of an op: inputs, outputs, checks, and the logits that each term reads.

Shape suffixes: B batch, C classes, K the six terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")

# The terms in their order, and the logits that each reads.
READS: dict[str, tuple[str, ...]] = {
    "ce_nat": ("s_nat",),
    "ce_adv": ("s_adv",),
    "kl_self": ("s_adv", "s_nat"),
    "kl_at_nat": ("s_adv", "t_at_nat"),
    "kl_at_adv": ("s_adv", "t_at_adv"),
    "kl_st_adv": ("s_adv", "t_st_adv"),
}

# A Triton program holds whole rows of logits in registers, and there are no more; beyond, the reference serves.
MAX_CLASSES = 4096


class DistillLoss(NamedTuple):
    """The result of `distill_loss`; only `loss` carries a gradient.

    loss: scalar, mean over the batch. alpha: (B,), trust in the teacher, 1 where no T_at(x~) is given.
    terms: (6,), batch means of the unweighted terms, 0 for a term of zero weight. per_sample: (B,), whose mean is
    the loss. All are 0 (alpha and per_sample empty) where B = 0.
    """

    loss: Tensor
    alpha: Tensor
    terms: Tensor
    per_sample: Tensor


class LossInputs(NamedTuple):
    """The tensors of one call: logits (B, C), None where no term reads them; labels (B,); sample_weights (B,)."""

    s_adv: Tensor | None
    s_nat: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None
    t_st_adv: Tensor | None
    labels: Tensor
    sample_weights: Tensor | None

    @property
    def student(self) -> Tensor:
        """Logits of the student: s_adv, or s_nat where s_adv is absent."""
        given = self.s_adv if self.s_adv is not None else self.s_nat
        assert given is not None
        return given


class LossRow(NamedTuple):
    """The numbers of one call; see `distill_loss`. weights: six pairs (a, b)."""

    weights: tuple[tuple[float, float], ...]
    tau: float
    tau_self: float
    beta: float
    detach_self: bool
    label_smoothing: float

    @property
    def active(self) -> tuple[bool, ...]:
        """True for each of the six terms that has a nonzero weight."""
        return tuple(bool(a or b) for a, b in self.weights)


class LossAndGradients(NamedTuple):
    """The output of a fused implementation, computed in one pass, all in float32.

    grad_adv, grad_nat: (B, C) contiguous, the gradient of `loss` to s_adv and s_nat; None where not asked for.
    """

    loss: Tensor
    alpha: Tensor
    terms: Tensor
    per_sample: Tensor
    grad_adv: Tensor | None
    grad_nat: Tensor | None


def look_up(argument: str, name: Any, table: Mapping[Any, Entry]) -> Entry:
    """The table's entry of that name. Raises ValueError where it has none."""
    if name not in table:
        raise ValueError(f"{argument}: {name!r} is unknown; known are {', '.join(map(str, table))}")
    return table[name]


def check_terms(implementation: str, computed: tuple[str, ...], row: LossRow) -> None:
    """Raise ValueError where an implementation computes other terms than the loss and the row have."""
    if computed != tuple(READS) or len(computed) != len(row.weights):
        raise ValueError(
            f"weights: {implementation} computes {', '.join(computed)}; "
            f"the loss has {', '.join(READS)}, and the row {len(row.weights)} weights"
        )


def check_labels(inputs: LossInputs) -> None:
    """Raise ValueError for a label out of range on a CPU.

    On an accelerator the kernel asserts that on the device: a check here would wait for it.
    """
    labels, classes = inputs.labels, inputs.student.shape[1]
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < classes:
            raise ValueError(f"labels: expected 0 <= label < {classes}, got {low}..{high}")


def check_indices(sample_B: Tensor, index_B: Tensor | None, count: int) -> None:
    """Raise IndexError on a CPU for an index, or a sample where none is given, that is none of `count` images.

    On an accelerator the kernel asserts that on the device.
    """
    name, image_B = ("sample_B", sample_B) if index_B is None else ("index_B", index_B)
    if image_B.device.type == "cpu":
        wrong_X = image_B[(image_B < 0) | (image_B >= count)]
        if len(wrong_X):
            raise IndexError(f"{name}: there is no image {int(wrong_X[0])} among {count}")


def check_device(**given: Tensor | None) -> None:
    """Raise ValueError for tensors on several devices: a kernel would read addresses of another device."""
    devices = {name: tensor.device for name, tensor in given.items() if tensor is not None}
    first, device = next(iter(devices.items()))
    for name, other in devices.items():
        if other != device:
            raise ValueError(f"{name} is on {other}, and {first} on {device}: one device is needed")


def dense_layout(images: Tensor) -> torch.memory_format | None:
    """The order in which a tensor fills its memory without gaps, or None where it does not."""
    if images.is_contiguous():
        return torch.contiguous_format
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None

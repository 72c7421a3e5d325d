"""Shared by the implementations of an op: inputs, outputs, checks, and the kinds of terms.

Shape suffixes: B batch, C classes, K terms, L logits, G those of them with a gradient, F factors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Entry = TypeVar("Entry")

# The kinds of terms: True where one compares with other logits, False where with the labels.
KINDS: dict[str, bool] = {"ce": False, "kl": True, "margin": False, "kl_live": True}

# A Triton program holds whole rows of logits in registers, and there are no more; beyond, the reference serves.
MAX_CLASSES = 4096


class Term(NamedTuple):
    """One term of a loss, by the names of logits: w_i l_i of each sample, w_i = (a + b alpha_i) f_i.

    kind: the l of `KINDS`, of student s and target t at a temperature, summed over the classes:
    ce: -sum y log softmax(s), y the label; it has no temperature. kl: KL(softmax(t) || softmax(s)).
    Of MART (Wang et al., 2020), p = softmax(s): margin: -log(1.0001 - max_{c != y} p_c + 1e-12); no temperature.
    kl_live: (1.0000001 - softmax(t)_y) KL, where the factor, of temperature 1, has a gradient, too, and the
    logarithm of p is log(p + 1e-12).
    target: None where the kind compares with labels. weight: (a, b). detach: no gradient into the target.
    factor: name of f, a constant of each sample; None: 1.
    """

    kind: str
    student: str
    target: str | None = None
    weight: tuple[float, float] = (1.0, 0.0)
    temperature: float = 1.0
    detach: bool = False
    factor: str | None = None


class _Transform(NamedTuple):
    """A transform and the weight that it was computed of, whose memory is no other's while this is kept."""

    weight: Tensor
    version: int
    transform: Tensor


class WeightTransforms:
    """Transforms that `conv3x3` computes of one weight, for its next calls: of each direction and tile.

    A weight that has changed meanwhile is transformed anew.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[bool, int], _Transform] = {}

    def get(self, weight: Tensor, flip: bool, tile: int) -> Tensor | None:
        """The transform of the weight as it is; None where it is not known."""
        known = self._found.get((flip, tile))
        if known is None or weight.is_inference():
            return None
        is_same = known.weight.data_ptr() == weight.data_ptr() and known.version == weight._version
        return known.transform if is_same else None

    def put(self, weight: Tensor, flip: bool, tile: int, transform: Tensor) -> None:
        """Keep a transform in place of an older one. One in inference mode has no version, and none is kept."""
        if not weight.is_inference():
            self._found[flip, tile] = _Transform(weight.detach(), weight._version, transform)

    @staticmethod
    def most_bytes(weight: Tensor) -> int:
        """Memory of both directions, of the larger tile, but for what fills up the channels."""
        return 2 * weight.nbytes * 36 // 9


class DistillLoss(NamedTuple):
    """The result of `distill_loss`; only `loss` carries a gradient.

    loss: scalar, mean over the batch. alpha: (B,), trust in the teacher, 1 where none is asked for.
    terms: (K,), batch means of the terms without their weights and factors. per_sample: (B,), whose mean is the
    loss. All are 0 (alpha and per_sample empty) where B = 0.
    """

    loss: Tensor
    alpha: Tensor
    terms: Tensor
    per_sample: Tensor


class LossInputs(NamedTuple):
    """The tensors of one call: logits (B, C), L of them; labels (B,); sample_weights (B,); factors (B, F)."""

    logits: tuple[Tensor, ...]
    labels: Tensor
    sample_weights: Tensor | None = None
    factors: Tensor | None = None


class LossTerm(NamedTuple):
    """A `Term` whose logits and factor are numbers: target -1: the labels. factor -1: none."""

    kind: str
    student: int
    target: int
    a: float
    b: float
    temperature: float
    detach: bool
    factor: int


class LossSpec(NamedTuple):
    """All of a call that is no tensor. trust: the logits that alpha is made of; -1: alpha is 1."""

    terms: tuple[LossTerm, ...]
    trust: int
    beta: float
    label_smoothing: float

    def reaches(self, logits: int) -> bool:
        """True if the loss has a gradient to those logits."""
        return any(term.student == logits or (term.target == logits and not term.detach) for term in self.terms)


class LossAndGradients(NamedTuple):
    """The output of a fused implementation, computed in one pass, all in float32.

    gradients: (G, B, C) contiguous, of `loss` to each of the wanted logits in their order; None where G is 0.
    """

    loss: Tensor
    alpha: Tensor
    terms: Tensor
    per_sample: Tensor
    gradients: Tensor | None


ALPHA_BINS = 20  # equal bins of [0, 1]
MEASURED_LOGITS = ("s_nat", "s_adv", "t_at_nat", "t_at_adv")


class BatchSums(NamedTuple):
    """Sums over batches on a device, all float64 and contiguous, which `batch_sums` adds to.

    totals: (18 + K,), in this order: samples, loss, the K terms, alpha, its samples; right answers and samples of
    each of the logits of `MeasuredBatch`; samples whose t_at_nat and t_at_adv are both right, only the first,
    none, only the second, and the samples of these four; entries of the attack's gradients.
    histogram: (ALPHA_BINS,), samples by alpha. record: (1 + K,), of the first loss that was not finite its step,
    and 1 for each term that was not finite; the step is negative while there is none.
    """

    totals: Tensor
    histogram: Tensor
    record: Tensor


class MeasuredBatch(NamedTuple):
    """Input of `batch_sums`, of one batch: loss (), terms (K',) and alpha (B,) of one floating dtype, labels (B,).

    sources: for each of the K terms of the sums its place among the batch's, -1 where the batch has none of it.
    alpha: None where there is none. logits: those of MEASURED_LOGITS, (B, C); None: not computed.
    step: () int64. entries: of the gradients that the attack on one image computes.
    """

    loss: Tensor
    terms: Tensor
    sources: tuple[int, ...]
    alpha: Tensor | None
    logits: tuple[Tensor | None, ...]
    labels: Tensor
    step: Tensor
    entries: int


class SgdTensors(NamedTuple):
    """Input of `sgd_update`: for each weight its gradient, its momentum and its copy in half precision.

    momenta: empty without momentum. halves: None where there is no copy.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]
    halves: list[Tensor | None]


class SgdNumbers(NamedTuple):
    """Numbers of `sgd_update`. lr: also a () float32 tensor on the device of the weights.

    grad_scale, found_inf: () float32 of a gradient scaler, by which the gradients are divided, and which is not 0
    where one of them is not finite.
    """

    lr: float | Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def look_up(argument: str, name: Any, table: Mapping[Any, Entry]) -> Entry:
    """The table's entry of that name. Raises ValueError where it has none."""
    if name not in table:
        raise ValueError(f"{argument}: {name!r} is unknown; known are {', '.join(map(str, table))}")
    return table[name]


def check_kinds(implementation: str, computed: Collection[str], spec: LossSpec) -> None:
    """Raise ValueError for a kind of term that an implementation does not compute."""
    for term in spec.terms:
        if term.kind not in computed:
            raise ValueError(f"terms: {implementation} computes {', '.join(computed)}, and not {term.kind!r}")


def check_labels(inputs: LossInputs) -> None:
    """Raise ValueError for a label out of range on a CPU.

    On an accelerator the kernel asserts that on the device: a check here would wait for it.
    """
    labels, classes = inputs.labels, inputs.logits[0].shape[1]
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


def check_step(x_adv: Tensor, counts: Tensor | None) -> None:
    """Raise ValueError for images that cannot change in place, and for `counts` of another kind."""
    if counts is not None and (counts.shape != (2,) or counts.dtype != torch.int64 or not counts.is_contiguous()):
        kind = f"{counts.dtype} of {tuple(counts.shape)}, strides {counts.stride()}"
        raise ValueError(f"counts: expected int64 of shape (2,), contiguous, got {kind}")
    if torch.is_grad_enabled() and x_adv.requires_grad:
        raise ValueError("x_adv asks for a gradient and would change in place: call under torch.no_grad()")


def is_transformed(values: Tensor) -> bool:
    """True for what has no memory of its own, in transforms and in forward derivatives: it is torch's."""
    in_transform = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return type(values) is not Tensor or in_transform


def dense_layout(images: Tensor) -> torch.memory_format | None:
    """The order in which a tensor fills its memory without gaps, or None where it does not."""
    if images.is_contiguous():
        return torch.contiguous_format
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None

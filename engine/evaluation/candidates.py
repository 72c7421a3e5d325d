"""Measures of a candidate teacher: how right and how sure it is, on images and on the same images attacked.

Shape suffixes: B batch, N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks.pgd import batch_norm_mode, pgd
from engine.common.lookup import look_up
from engine.common.stopping import Stop
from engine.config import AttackSpec
from engine.evaluation.arguments import LabelledImages
from engine.evaluation.batches import batch_of
from engine.evaluation.statistics import intervals
from engine.kernels import ALPHA_BINS, trust
from engine.system.precision import full_precision
from engine.training.telemetry import CASES

ECE_BINS = 15
LOW_ALPHA = 0.5


@dataclass(frozen=True, eq=False)
class AttackedImages:
    """Images x, the same ones attacked on a student, x~, and what the student makes of both; float32, on the CPU.

    zero_gradients: share of zero entries in all gradients of the attack.
    """

    x_nat: Tensor
    x_adv: Tensor
    labels: Tensor
    s_nat: Tensor
    s_adv: Tensor
    zero_gradients: float

    @property
    def fooled_N(self) -> Tensor:
        """True where the student is right on x and wrong on x~."""
        return (self.s_nat.argmax(1) == self.labels) & (self.s_adv.argmax(1) != self.labels)


@dataclass(frozen=True, eq=False)
class CandidateTeacher:
    """A candidate teacher T on images: its logits on x and x~ in float64, (N, C), and its own robustness.

    withstands_N: True where it is right on x^, the images attacked on itself. fooled_N: as of `AttackedImages`.
    beta: exponent of alpha.
    """

    parameters: int
    labels: Tensor
    t_nat: Tensor
    t_adv: Tensor
    withstands_N: Tensor
    fooled_N: Tensor
    beta: float = 1.0

    @property
    def right_N(self) -> Tensor:
        """True where T(x) is right."""
        return self.t_nat.argmax(1) == self.labels

    @property
    def right_adv_N(self) -> Tensor:
        """True where T(x~) is right."""
        return self.t_adv.argmax(1) == self.labels

    @property
    def alpha_N(self) -> Tensor:
        """P_T(x~ | y) ** beta (Eq. 4)."""
        return trust(self.t_adv, self.labels, self.beta)

    def cases(self) -> dict[str, Tensor]:
        """True where the image is of that case of Section 3.2, by name, (N,)."""
        nat_N, adv_N = self.right_N, self.right_adv_N
        return dict(zip(CASES, (nat_N & adv_N, nat_N & ~adv_N, ~nat_N & ~adv_N, ~nat_N & adv_N), strict=True))

    def alpha_histogram(self) -> list[float]:
        """Share of images in each of `ALPHA_BINS` equal bins of [0, 1]."""
        bins_N = (self.alpha_N * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1)
        return (bins_N.bincount(minlength=ALPHA_BINS) / len(bins_N)).tolist()


def attack_student(
    student: nn.Module,
    images: LabelledImages,
    spec: AttackSpec,
    *,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], object],
    stop: Stop,
) -> AttackedImages:
    """The images, attacked on the student in evaluation mode and full precision.

    A random start depends on the seed and the image's index alone. on_batch: called with the images done.
    Raises FloatingPointError where the student's logits are not finite, and Interrupted after a stop.
    """
    parameter = next(student.parameters())
    counts = torch.zeros(2, dtype=torch.int64, device=parameter.device)
    parts = []
    for sample_B in torch.arange(len(images.labels)).split(batch_size):
        x_B, labels_B = batch_of(images.images, images.labels, sample_B, parameter.device, parameter.dtype)
        with batch_norm_mode(student, "eval"), full_precision(), torch.no_grad():
            adv_B = pgd(student, x_B, labels_B, spec, seed=seed, sample=sample_B.to(x_B.device), counts=counts)
        parts.append((x_B.float().cpu(), adv_B.float().cpu()))
        on_batch(int(sample_B[-1]) + 1)
        stop.check()
    x_nat, x_adv = (torch.cat(column) for column in zip(*parts, strict=True))
    s_nat, s_adv = (logits_of(student, x_N, batch_size=batch_size, stop=stop) for x_N in (x_nat, x_adv))
    zeros = int(counts[0]) / max(1, spec.num_steps * x_nat.numel())
    return AttackedImages(x_nat, x_adv, images.labels, s_nat, s_adv, zeros)


def logits_of(network: nn.Module, x_N: Tensor, *, batch_size: int, stop: Stop) -> Tensor:
    """Logits of the network in evaluation mode and full precision, (N, C) float64 on the CPU.

    Raises FloatingPointError where some are not finite, and Interrupted after a stop.
    """
    parameter, found = next(network.parameters()), []
    with batch_norm_mode(network, "eval"), full_precision(), torch.no_grad():
        for x_B in x_N.split(batch_size):
            x_B = x_B.to(parameter.device, parameter.dtype, memory_format=torch.channels_last)
            found.append(network(x_B).double().cpu())
            stop.check()
    logits_NC = torch.cat(found)
    if lost := int((~logits_NC.isfinite().all(dim=1)).sum()):
        raise FloatingPointError(f"the logits of {lost:,} of {len(x_N):,} images are NaN or infinite")
    return logits_NC


# ---------------------------------------------------------------- statistics: numbers by image, (..., N) -> (...)


def mean(values: Tensor) -> Tensor:
    """Mean over images."""
    return values.double().mean(-1)


def exact(values: Tensor) -> Tensor:
    """A number that is known and not measured on images."""
    return values[..., 0]


def quantile(share: float) -> Callable[[Tensor], Tensor]:
    """The value that so large a share of images does not exceed, linear between neighbours."""
    return lambda values: torch.quantile(values, share, dim=-1)


def calibration_error(values: Tensor) -> Tensor:
    """ECE with 15 equal-width bins ((b-1)/15, b/15] of the confidence (Guo et al., 2017).

    sum_b n_b/n |accuracy_b - confidence_b| = 1/n sum_b |sum_{i in b} (right_i - confidence_i)|
    values: (2, ..., N): confidence max_c p_c, and 1 where that class is right, else 0.
    """
    confidence, right = values
    bins, gaps = _bins(confidence), right - confidence
    by_bin = [torch.where(bins == index, gaps, 0).sum(-1).abs() for index in range(ECE_BINS)]
    return torch.stack(by_bin).sum(0) / values.shape[-1]


def calibration_error_by_chance(confidence_N: Tensor) -> float:
    """Expected ECE of a perfectly calibrated network with these confidences p on so few images.

    sqrt(2/pi)/n sum_b sqrt(sum_{i in b} p_i (1 - p_i)): each bin's sum of gaps as a normal variable of mean 0.
    """
    variances, bins = confidence_N * (1 - confidence_N), _bins(confidence_N)
    roots = [variances[bins == index].sum().sqrt() for index in range(ECE_BINS)]
    return math.sqrt(2 / math.pi) * float(torch.stack(roots).sum()) / len(confidence_N)


def _bins(confidence: Tensor) -> Tensor:
    edges = torch.arange(1, ECE_BINS, dtype=confidence.dtype) / ECE_BINS
    return torch.bucketize(confidence.contiguous(), edges)


def _confidence_and_right(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    confidence_N, predicted_N = logits_NC.softmax(dim=1).max(dim=1)
    return torch.stack((confidence_N, (predicted_N == labels_N).to(confidence_N.dtype)))


# ---------------------------------------------------------------- the table of measures


class Estimate(NamedTuple):
    """A number measured on n images. low, high: its interval, None: it has none. value: None where n is 0.

    by_chance: the value to expect of a network without fault, where that is not 0.
    """

    value: float | None
    low: float | None
    high: float | None
    by_chance: float | None
    n: int


@dataclass(frozen=True)
class Measure:
    """A column of the comparison.

    values: numbers by image, (N,) or (2, N), and statistic of them. higher: so are they of a good teacher, else
    lower. style: of the number in words. by_chance: see `Estimate`.
    """

    title: str
    definition: str
    values: Callable[[CandidateTeacher], Tensor]
    statistic: Callable[[Tensor], Tensor] = mean
    higher: bool = True
    style: str = "{:.2%}"
    by_chance: Callable[[Tensor], float] | None = None

    def of(self, candidate: CandidateTeacher) -> Estimate:
        """The estimate for a candidate, with Wilson's interval of a share, and mean +- z s / sqrt(n) of a mean."""
        values = self.values(candidate)
        n = values.shape[-1]
        if not n:
            return Estimate(None, None, None, None, 0)
        low = high = None
        if self.statistic is mean:
            is_share = values.dtype == torch.bool
            low, high = intervals.wilson(int(values.sum()), n) if is_share else intervals.of_mean(values)
        chance = None if self.by_chance is None else self.by_chance(values)
        return Estimate(float(self.statistic(values)), low, high, chance, n)


def _calibration(title: str, answers: Callable[[CandidateTeacher], Tensor]) -> Measure:
    return Measure(
        title,
        "expected calibration error, sum_b n_b/n |accuracy_b - confidence_b| over "
        f"{ECE_BINS} equal-width bins of the largest probability (Guo et al., 2017); chance: that of a perfectly "
        "calibrated network on so few images",
        lambda candidate: _confidence_and_right(answers(candidate), candidate.labels),
        statistic=calibration_error,
        higher=False,
        style="{:.3f}",
        by_chance=lambda values: calibration_error_by_chance(values[0]),
    )


def _likelihood(title: str, answers: Callable[[CandidateTeacher], Tensor]) -> Measure:
    return Measure(
        title,
        "negative log-likelihood, mean of -log P_T(x | y) or of -log P_T(x~ | y), natural logarithm",
        lambda candidate: F.cross_entropy(answers(candidate), candidate.labels, reduction="none"),
        higher=False,
        style="{:.3f}",
    )


def _alpha_quantile(title: str, share: float) -> Measure:
    return Measure(
        title,
        "alpha that so many of the images do not exceed",
        lambda candidate: candidate.alpha_N,
        statistic=quantile(share),
        style="{:.3f}",
    )


MEASURES: dict[str, Measure] = {
    "reliability": Measure(
        "reliability",
        "mean of two accuracies: on x~, crafted on a small student, as where a distillation begins, and on x^, "
        "crafted on the candidate itself, the hardest that a student may come to ask",
        lambda candidate: (candidate.right_adv_N.double() + candidate.withstands_N.double()) / 2,
    ),
    "natural": Measure("natural", "accuracy on x", lambda candidate: candidate.right_N),
    "transfer": Measure("transfer", "accuracy on x~", lambda candidate: candidate.right_adv_N),
    "robust": Measure("PGD-10", "accuracy on x^", lambda candidate: candidate.withstands_N),
    "effective": Measure(
        "effective",
        "share wrong on x~ among the images whose x~ fools the student: the adversarial transferability of Lee "
        "and Chung (2025)",
        lambda candidate: ~candidate.right_adv_N[candidate.fooled_N],
    ),
    "parameters": Measure(
        "parameters",
        "trained numbers of the network",
        lambda candidate: torch.tensor([candidate.parameters]),
        statistic=exact,
        higher=False,
        style="{:,.0f}",
    ),
    "alpha": Measure(
        "alpha",
        "mean of alpha = P_T(x~ | y)^beta, the trust of IAD (Eq. 4)",
        lambda candidate: candidate.alpha_N,
        style="{:.3f}",
    ),
    "alpha_q25": _alpha_quantile("25 %", 0.25),
    "alpha_median": _alpha_quantile("50 %", 0.5),
    "alpha_q75": _alpha_quantile("75 %", 0.75),
    "alpha_low": Measure(
        f"< {LOW_ALPHA}",
        f"share of images with alpha below {LOW_ALPHA}",
        lambda candidate: candidate.alpha_N < LOW_ALPHA,
        higher=False,
    ),
    "ece_natural": _calibration("ECE x", lambda candidate: candidate.t_nat),
    "ece_transfer": _calibration("ECE x~", lambda candidate: candidate.t_adv),
    "nll_natural": _likelihood("NLL x", lambda candidate: candidate.t_nat),
    "nll_transfer": _likelihood("NLL x~", lambda candidate: candidate.t_adv),
    "both_right": Measure(
        "both right",
        "T(x) and T(x~) right: case 1 of the paper's Section 3.2, to be trusted",
        lambda candidate: candidate.cases()["both_right"],
    ),
    "only_natural_right": Measure(
        "only x right",
        "T(x) right and T(x~) wrong: case 2, to be trusted partially",
        lambda candidate: candidate.cases()["only_natural_right"],
        higher=False,
    ),
    "both_wrong": Measure(
        "both wrong",
        "T(x) and T(x~) wrong: case 3, robustly wrong, not to be trusted",
        lambda candidate: candidate.cases()["both_wrong"],
        higher=False,
    ),
    "only_adversarial_right": Measure(
        "only x~ right",
        "T(x) wrong and T(x~) right: case 4, which the paper takes for empty, as if x~ were crafted on T",
        lambda candidate: candidate.cases()["only_adversarial_right"],
        higher=False,
    ),
}
"""Every number that candidates can be ordered by, by name."""


class Comparison(NamedTuple):
    """Two candidates by their index, the first the better one. p_value: adjusted for all comparisons (Holm)."""

    better: int
    worse: int
    difference: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """True where the two can be told apart on so many images."""
        return self.p_value < 1 - intervals.CONFIDENCE


def ranking(candidates: Sequence[CandidateTeacher], name: str) -> list[int]:
    """Indices of the candidates by that measure, the best first; equal ones as given."""
    measure = look_up("--sort-by", name, MEASURES)
    sign = -1 if measure.higher else 1
    values = [measure.of(candidate).value for candidate in candidates]
    return sorted(range(len(candidates)), key=lambda index: sign * (values[index] or 0.0))


def comparisons(candidates: Sequence[CandidateTeacher], name: str, seed: int) -> list[Comparison]:
    """Comparisons of all pairs of candidates by that measure, in their order; none of what is exact."""
    measure = look_up("--sort-by", name, MEASURES)
    if measure.statistic is exact:
        return []
    values = [measure.values(candidate) for candidate in candidates]
    pairs = list(combinations(ranking(candidates, name), 2))
    p_values = [
        intervals.permutation_test(values[better], values[worse], measure.statistic, seed)
        for better, worse in pairs
    ]
    estimates = [measure.of(candidate).value or 0.0 for candidate in candidates]
    return [
        Comparison(better, worse, abs(estimates[better] - estimates[worse]), p_value)
        for (better, worse), p_value in zip(pairs, intervals.holm(p_values), strict=True)
    ]

"""Measurements of the training: sums on the device, one host read per log interval; the teacher's reliability.

Reliability follows the paper's Figures 1-3 and Section 3.2: whether T(x) and T(x~) are right, in four cases, the
fourth of which (T(x) wrong, T(x~) right) the paper says does not exist; how large alpha is; and how often teacher
and student are right on x~.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks.parts import parts
from engine.attacks.pgd import batch_norm_mode
from engine.common.lookup import check_known
from engine.kernels import (
    ALPHA_BINS,
    MEASURED_LOGITS,
    BatchSums,
    MeasuredBatch,
    batch_sums,
    count_cases,
    histogram,
    trust,
)
from engine.objectives import TERMS, TRUST
from engine.system.distributed import World
from engine.system.precision import full_precision
from engine.training.step import StepOutput

SIX_TERMS = tuple(TERMS)[:6]
"""The terms of the paper's Table 1, which earlier checkpoints have sums of, whatever their method."""
CASES = ("both_right", "only_natural_right", "both_wrong", "only_adversarial_right")
_ACCURACIES = ("student_natural", "student_adversarial", "teacher_natural", "teacher_adversarial")
_SUMS = (
    "alpha", "alpha_samples",
    *(f"{name}_{part}" for name in _ACCURACIES for part in ("right", "samples")),
    *CASES, "case_samples", "attack_entries",
)  # fmt: skip

# Gradient masking: an attack whose gradient is zero stands still, and robustness looks better than it is.
_GRADIENTS = ("attack_zero_gradients", "attack_non_finite_gradients")
_ALPHA_BINS = tuple(f"alpha_bin_{index}" for index in range(ALPHA_BINS))


def totals_of(terms: Sequence[str]) -> tuple[str, ...]:
    """Keys of `Telemetry.read` for these terms."""
    return ("samples", "loss", *terms, *_SUMS, *_ALPHA_BINS, *_GRADIENTS, "seconds")


Totals = dict[str, float]


class Telemetry:
    """Sums over steps, kept on the device in float64: `update` never waits for it, `read` does.

    A non-finite loss is noted on the device too, with its step and its terms. Each process sums its own images:
    `read`, `check` and `state_dict` bring the sums together, and so all processes call them.
    """

    def __init__(
        self,
        device: torch.device,
        attack_entries: int = 0,
        world: World | None = None,
        *,
        terms: Sequence[str],
    ) -> None:
        """Sums of zero.

        attack_entries: entries of the input gradients that the attack on one image computes. terms: names of all
        terms that steps will have.
        """
        self.attack_entries, self.terms = attack_entries, tuple(terms)
        self._world = world or World()
        self.attack_counts = torch.zeros(len(_GRADIENTS), dtype=torch.int64, device=device)
        self.sums = torch.zeros(2 + len(self.terms) + len(_SUMS), dtype=torch.float64, device=device)
        self.alpha_histogram = torch.zeros(ALPHA_BINS, dtype=torch.float64, device=device)
        # [step, one flag per term] of the first non-finite loss; step -1 while there is none
        self.non_finite = torch.full((1 + len(self.terms),), -1.0, dtype=torch.float64, device=device)
        self._earlier_seconds = 0.0  # of sums that a checkpoint brought
        self.start_clock()

    @property
    def seconds(self) -> float:
        """Time that the steps of these sums took."""
        return self._earlier_seconds + time.perf_counter() - self._clock

    def start_clock(self) -> None:
        """Training goes on from here: what went before, an evaluation say, belongs to no step."""
        self._clock = time.perf_counter()

    @torch.no_grad()
    def update(self, output: StepOutput, labels: Tensor, step: int | Tensor) -> None:
        """Add one step's batch; alpha counts wherever T(x~) was run, whether or not the row weighs with it.

        step: from 0; on the device a () int64 tensor, so that a captured graph reads the number of its replay.
        Every tensor of the sums is written in place.
        Raises ValueError for a term that there are no sums of.
        """
        for name in output.terms:
            check_known("term", name, self.terms)
        loss, alpha_B, terms_K, _ = output.loss
        measured = MeasuredBatch(
            loss,
            terms_K,
            tuple(output.terms.index(name) if name in output.terms else -1 for name in self.terms),
            alpha_B if TRUST in output.logits else None,
            tuple(output.logits.get(name) for name in MEASURED_LOGITS),
            labels,
            step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=labels.device),
            self.attack_entries,
        )
        batch_sums(BatchSums(self.sums, self.alpha_histogram, self.non_finite), measured)

    def check(self) -> None:
        """Raise FloatingPointError, naming step and terms, if a loss was not finite in any process."""
        self._gathered()

    def _gathered(self) -> Tensor:
        """The sums of all processes, (processes, sums). Raises as `check` does."""
        mine = torch.cat((self.non_finite, self.sums, self.alpha_histogram, self.attack_counts))
        everybodys = self._world.gather(mine)
        for step, *flags in everybodys[:, : len(self.non_finite)].tolist():
            if step >= 0:
                bad = [term for term, flag in zip(self.terms, flags, strict=True) if flag] or ["the weighted sum"]
                raise FloatingPointError(f"the loss of step {int(step)} is not finite: {', '.join(bad)}")
        return everybodys[:, len(self.non_finite) :]

    def read(self) -> Totals:
        """Move the sums to the host and start again from zero. Raises as `check` does."""
        values = self._gathered().sum(0).tolist()
        totals = dict(zip(totals_of(self.terms), (*values, self.seconds), strict=True))
        self.sums.zero_()
        self.attack_counts.zero_()
        self.alpha_histogram.zero_()
        self._earlier_seconds = 0.0
        self.start_clock()
        return totals

    def state_dict(self) -> dict[str, Any]:
        """The sums so far of every process, for a checkpoint. Raises as `check` does."""
        return {"sums": self._gathered(), "seconds": self.seconds, "terms": list(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; with another number of processes the first one takes all sums."""
        rows = self._in_order(state["sums"], state.get("terms", SIX_TERMS))
        if len(rows) != self._world.size:
            everybodys, rows = rows, torch.zeros(self._world.size, rows.shape[1], dtype=rows.dtype)
            rows[0] = everybodys.sum(0)
        own = (self.sums, self.alpha_histogram, self.attack_counts)
        for tensor, values in zip(own, rows[self._world.rank].split([len(tensor) for tensor in own]), strict=True):
            tensor.copy_(values)
        self._earlier_seconds = state["seconds"]

    def _in_order(self, sums: Tensor, terms: Sequence[str]) -> Tensor:
        """The columns of a checkpoint with these terms, in the order of these sums; an absent one is 0."""
        columns = dict(zip(totals_of(terms)[:-1], sums.unbind(1), strict=True))
        zero = sums.new_zeros(len(sums))
        return torch.stack([columns.get(name, zero) for name in totals_of(self.terms)[:-1]], dim=1)


def add(left: Totals, right: Totals) -> Totals:
    """Sum of two readings."""
    return {key: left.get(key, 0.0) + value for key, value in right.items()}


def summarise(totals: Totals, terms: tuple[str, ...]) -> dict[str, Any]:
    """Means of a reading, as rows of `metrics.jsonl` hold them; what was not measured is left out."""
    samples = totals["samples"]
    row: dict[str, Any] = {
        "loss": totals["loss"] / samples,
        "images_per_second": samples / totals["seconds"],
        "seconds": totals["seconds"],
    }
    row |= {term: totals[term] / samples for term in terms}
    if count := totals["alpha_samples"]:
        row["alpha"] = totals["alpha"] / count
        row["alpha_histogram"] = [totals[name] / count for name in _ALPHA_BINS]
    for name in _ACCURACIES:
        if count := totals[f"{name}_samples"]:
            row[f"train_{name}_accuracy"] = totals[f"{name}_right"] / count
    if count := totals["case_samples"]:
        row["train_cases"] = {case: totals[case] / count for case in CASES}
    if count := totals["attack_entries"]:
        row |= {name: totals[name] / count for name in _GRADIENTS}
    return row


@torch.no_grad()
def probe(
    student: nn.Module,
    teacher: nn.Module | None,
    x_nat: Tensor,
    labels: Tensor,
    attack: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    beta: float,
) -> dict[str, Any]:
    """Reliability on a fixed set of images, for every method, in evaluation mode and full precision.

    x_nat: (B, C, H, W); attack: of the student, (x_nat, labels, samples) -> x_adv. Shares lie in [0, 1].
    """
    with batch_norm_mode(student, "eval"), full_precision():
        found = []
        for x_B, labels_B, sample_B in parts(x_nat, labels):
            x_adv = attack(x_B, labels_B, sample_B)
            found.append([student(x_adv)] if teacher is None else [student(x_adv), teacher(x_B), teacher(x_adv)])
    s_adv, *of_teacher = map(torch.cat, zip(*found, strict=True))
    row: dict[str, Any] = {"probe_student_adversarial_accuracy": _accuracy(s_adv, labels)}
    if teacher is None:
        return row
    t_nat, t_adv = of_teacher
    alpha_B = trust(t_adv, labels, beta)
    nat_B, adv_B = t_nat.argmax(dim=1) == labels, t_adv.argmax(dim=1) == labels
    cases = torch.stack(count_cases(nat_B, adv_B)).tolist()
    return row | {
        "probe_teacher_natural_accuracy": _accuracy(t_nat, labels),
        "probe_teacher_adversarial_accuracy": _accuracy(t_adv, labels),
        "probe_alpha": float(alpha_B.mean()),
        "probe_alpha_histogram": (histogram(alpha_B) / len(labels)).tolist(),
        "probe_cases": {case: count / len(labels) for case, count in zip(CASES, cases, strict=True)},
    }


def _accuracy(logits_BC: Tensor, labels: Tensor) -> float:
    return float((logits_BC.argmax(dim=1) == labels).double().mean())

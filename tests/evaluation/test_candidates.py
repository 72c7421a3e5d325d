"""Measures of candidate teachers, by hand on tiny logits; and the attack on the student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks.pgd import pgd, preset
from engine.common.stopping import Interrupted, Stop
from engine.evaluation import candidates
from engine.evaluation.candidates import MEASURES, CandidateTeacher
from engine.kernels import ALPHA_BINS
from engine.pipelines.splits import Split
from engine.training import telemetry

P = torch.tensor(  # of 4 images and 2 classes; the classes are 0, 0, 1, 1
    [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]], dtype=torch.float64
)
P_ADV = torch.tensor([[0.62, 0.38], [0.31, 0.69], [0.93, 0.07], [0.44, 0.56]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


def candidate(
    p: Tensor = P,
    p_adv: Tensor = P_ADV,
    labels: Tensor = LABELS,
    *,
    withstands: tuple[int, ...] = (1, 0, 0, 0),
    fooled: tuple[int, ...] = (1, 1, 0, 1),
    beta: float = 1.0,
) -> CandidateTeacher:
    withstands_N, fooled_N = (torch.tensor(values, dtype=torch.bool) for values in (withstands, fooled))
    return CandidateTeacher(100, labels, p.log(), p_adv.log(), withstands_N, fooled_N, beta)


def value(name: str, of: CandidateTeacher) -> float:
    found = MEASURES[name].of(of).value
    assert found is not None
    return found


def test_accuracies_and_cases_by_hand() -> None:
    found = candidate()
    # T is right on x: yes, yes, no, yes; on x~: yes, no, no, yes; on x^: yes, no, no, no.
    assert value("natural", found) == 0.75
    assert value("transfer", found) == 0.5
    assert value("robust", found) == 0.25
    assert value("reliability", found) == 0.375
    assert value("effective", found) == pytest.approx(1 / 3)  # of images 0, 1 and 3, image 1
    assert MEASURES["effective"].of(found).n == 3
    assert value("parameters", found) == 100
    assert [value(case, found) for case in telemetry.CASES] == [0.5, 0.25, 0.25, 0.0]


def test_the_fourth_case_is_counted() -> None:
    found = candidate(P_ADV, P)
    assert [value(case, found) for case in telemetry.CASES] == [0.5, 0.0, 0.25, 0.25]


def test_an_attack_that_fools_on_no_image_gives_no_share() -> None:
    assert MEASURES["effective"].of(candidate(fooled=(0, 0, 0, 0))) == (None, None, None, None, 0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 3.0])
def test_alpha_by_hand(beta: float) -> None:
    found = candidate(beta=beta)
    alpha = np.array([0.62, 0.31, 0.07, 0.56]) ** beta
    assert value("alpha", found) == pytest.approx(alpha.mean(), abs=1e-12)
    for name, share in (("alpha_q25", 25), ("alpha_median", 50), ("alpha_q75", 75)):
        assert value(name, found) == pytest.approx(np.percentile(alpha, share), abs=1e-12)
    assert value("alpha_low", found) == (alpha < 0.5).mean()
    histogram, _ = np.histogram(alpha, bins=ALPHA_BINS, range=(0, 1))
    assert found.alpha_histogram() == pytest.approx(histogram / 4)


def test_negative_log_likelihoods_by_hand() -> None:
    found = candidate()
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.3) + math.log(0.6)) / 4
    assert value("nll_natural", found) == pytest.approx(expected, abs=1e-12)
    expected = -(math.log(0.62) + math.log(0.31) + math.log(0.07) + math.log(0.56)) / 4
    assert value("nll_transfer", found) == pytest.approx(expected, abs=1e-12)


def test_calibration_by_hand() -> None:
    """Confidences 0.9, 0.8, 0.7, 0.6; of 15 bins (13/15, 14/15], (11/15, 12/15], (10/15, 11/15], (8/15, 9/15]."""
    expected = (abs(1 - 0.9) + abs(1 - 0.8) + abs(0 - 0.7) + abs(1 - 0.6)) / 4
    assert value("ece_natural", candidate()) == pytest.approx(expected, abs=1e-12)
    # Two images in one bin cancel: (1 - 0.75) + (0 - 0.78).
    p = torch.tensor([[0.75, 0.25], [0.78, 0.22]], dtype=torch.float64)
    both = candidate(p, p, torch.tensor([0, 1]), withstands=(0, 0), fooled=(0, 0))
    assert value("ece_natural", both) == pytest.approx(abs(0.25 - 0.78) / 2, abs=1e-12)


def test_calibration_over_many_images_and_at_the_edges_of_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_N = torch.rand(500, generator=generator, dtype=torch.float64)
    confidence_N[:15] = torch.arange(1, 16, dtype=torch.float64) / 15  # each in the bin that it ends
    right_N = (confidence_N * 15).floor() % 2  # of neighbouring bins one is right, and one wrong
    expected = 0.0
    for index in range(15):
        low, high = index / 15, (index + 1) / 15
        inside = [i for i in range(500) if low < confidence_N[i] <= high]
        if inside:
            accuracy = sum(float(right_N[i]) for i in inside) / len(inside)
            confidence = sum(float(confidence_N[i]) for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(accuracy - confidence)
    values = torch.stack((confidence_N, right_N))
    assert float(candidates.calibration_error(values)) == pytest.approx(expected, abs=1e-12)
    many = values[:, None, :].expand(2, 3, 500)
    assert candidates.calibration_error(many).tolist() == pytest.approx([expected] * 3)


def test_the_error_of_a_calibrated_network_by_chance() -> None:
    """The closed form, against labels drawn by the confidences."""
    generator = torch.Generator().manual_seed(0)
    confidence_N = 0.1 + 0.9 * torch.rand(600, generator=generator, dtype=torch.float64)
    drawn = (torch.rand(400, 600, generator=generator) < confidence_N).double()
    simulated = float(candidates.calibration_error(torch.stack((confidence_N.expand(400, 600), drawn))).mean())
    assert candidates.calibration_error_by_chance(confidence_N) == pytest.approx(simulated, rel=0.05)


def test_intervals_are_wilson_s_of_shares_and_the_normal_ones_of_means() -> None:
    found = candidate()
    low, high = MEASURES["natural"].of(found)[1:3]
    assert (low, high) == pytest.approx((0.3006418, 0.9544127), abs=1e-6)  # Wilson, 3 of 4
    estimate = MEASURES["reliability"].of(found)
    half = 1.959964 * np.std([1, 0, 0, 0.5], ddof=1) / 2
    assert estimate[1:3] == pytest.approx((0.375 - half, 0.375 + half), abs=1e-6)
    for name in ("ece_natural", "alpha_median", "parameters"):
        assert MEASURES[name].of(found)[1:3] == (None, None)


def test_the_order_and_which_can_be_told_apart() -> None:
    """On 200 images: one right on 150, one on 148 of these, one on 60."""
    labels = torch.zeros(200, dtype=torch.int64)

    def right_on(count: int) -> CandidateTeacher:
        p = torch.tensor([[0.8, 0.2]] * count + [[0.3, 0.7]] * (200 - count), dtype=torch.float64)
        none = (0,) * 200
        return candidate(p, p, labels, withstands=none, fooled=none)

    three = [right_on(60), right_on(150), right_on(148)]
    assert candidates.ranking(three, "natural") == [1, 2, 0]
    assert candidates.ranking(three, "both_wrong") == [1, 2, 0]  # the least is the best
    assert candidates.ranking(three, "effective") == [0, 1, 2]  # on no image: as given
    pairs = candidates.comparisons(three, "natural", seed=0)
    assert [(pair.better, pair.worse, pair.is_clear) for pair in pairs] == [
        (1, 2, False),
        (1, 0, True),
        (2, 0, True),
    ]
    assert pairs[1].difference == pytest.approx(0.45)
    assert pairs[0].p_value == pytest.approx(0.5, abs=0.05)  # two images differ: 2 * (1/2)^2
    assert candidates.comparisons(three, "parameters", seed=0) == []
    with pytest.raises(ValueError, match="did you mean 'natural'"):
        candidates.ranking(three, "naturall")


@pytest.fixture(scope="module")
def images() -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.tensor([0, 1, 2, 0, 1, 2, 0]), ("a", "b", "c"))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(3)
    return models.build("resnet8", 3).train()


def test_the_images_are_those_of_pgd_whatever_the_batches(images: Split, student: nn.Module) -> None:
    spec = preset("pgd10", 0.1)
    sizes: list[int] = []
    found = candidates.attack_student(
        student, images, spec, seed=5, batch_size=3, on_batch=sizes.append, stop=Stop()
    )
    assert sizes == [3, 6, 7]
    x_nat = images.images.permute(0, 3, 1, 2).float() / 255
    expected = pgd(student, x_nat, images.labels, spec, seed=5)
    assert torch.equal(found.x_nat, x_nat)
    assert (found.x_adv - expected).abs().max() < 1e-6
    assert student.training
    student.eval()
    with torch.no_grad():
        assert torch.allclose(found.s_adv, student(expected).double(), atol=1e-4)
    natural, adversarial = (logits.argmax(1) == images.labels for logits in (found.s_nat, found.s_adv))
    assert torch.equal(found.fooled_N, natural & ~adversarial)
    student.train()


def test_a_student_without_gradients_is_noticed(images: Split) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.flatten(1)[:, :3]

    found = candidates.attack_student(
        Constant(), images, preset("pgd10", 0.1), seed=0, batch_size=4, on_batch=lambda done: None, stop=Stop()
    )
    assert found.zero_gradients == 1.0


def test_logits_that_are_not_finite_and_a_wish_to_stop_end_it(images: Split, student: nn.Module) -> None:
    x_N = torch.rand(4, 3, 8, 8)
    x_N[1] = torch.inf
    with pytest.raises(FloatingPointError, match="logits of 1 of 4 images"):
        candidates.logits_of(student, x_N, batch_size=2, stop=Stop())
    stop = Stop()
    stop.requested = True
    with pytest.raises(Interrupted):
        candidates.logits_of(student, x_N, batch_size=2, stop=stop)

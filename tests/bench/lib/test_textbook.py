"""The textbook's formulas: values for two samples of three classes, and what is known of each method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.lib.steps import textbook
from bench.lib.steps.textbook import attacks, formulas, losses
from bench.lib.steps.textbook.parts import StepParts

LABELS = torch.tensor([0, 1])


class Fixture(NamedTuple):
    """Logits of student and teacher: on natural, adversarial and mirrored images."""

    s_x: Tensor
    s_a: Tensor
    s_m: Tensor
    t_x: Tensor
    t_a: Tensor
    t_m: Tensor


def fixture() -> Fixture:
    rows = (
        [[1, 0, -1], [0.5, 0.2, 0]],
        [[0.4, 0.3, -0.2], [-0.1, 0.6, 0.1]],
        [[1.2, -0.1, -1.3], [0.7, 0, -0.2]],
        [[2, 0, -1], [1, 0.5, 0]],
        [[1, 0.4, -0.5], [0, 0.8, 0.2]],
        [[2.3, -0.3, -1.4], [1.3, 0.2, -0.1]],
    )
    return Fixture(*(torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows))


def adaiad(given: Fixture) -> Tensor:
    own = formulas.adaiad_self(given.s_x, given.s_a, given.t_a, LABELS)
    return formulas.adaiad(given.s_a, given.t_a) + own


def saad(given: Fixture, b: float = 0.5) -> Tensor:
    w, certain = formulas.saad_weights(given.t_a)
    robust = formulas.kl(given.t_a, given.s_a) + 0.5 * igdm(given)
    return w * robust + b * certain * formulas.kl(given.t_x, given.s_x)


def igdm(given: Fixture) -> Tensor:
    return formulas.igdm(given.s_a, given.s_m, given.t_a, given.t_m)


def mart(given: Fixture) -> Tensor:
    return formulas.mart(given.s_x, given.s_a, LABELS)


FORMULAS: dict[str, tuple[Callable[[Fixture], Tensor], float]] = {
    "rslad": (lambda given: formulas.rslad(given.s_x, given.s_a, given.t_x), 0.250357),
    "adaad": (lambda given: formulas.adaad(given.s_x, given.s_a, given.t_x, given.t_a), 0.029278),
    "adaiad": (adaiad, 0.041550),
    "igdm": (igdm, 0.023293),
    "saad": (saad, 0.021852),
    "mart": (mart, 1.501007),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_the_value_of_the_two_samples(method: str) -> None:
    """The values were rounded in float32, in which AdaIAD's tau^2 = 900 leaves five digits."""
    formula, value = FORMULAS[method]
    found = float(formula(fixture()).mean().detach())
    assert found == pytest.approx(value, abs=1e-5 if method == "adaiad" else 1e-6)


@pytest.mark.parametrize(("formula", "norm"), [(adaiad, 0.026954), (mart, 1.012349)])
def test_the_target_s_gradient_is_part_of_the_loss(formula: Callable[[Fixture], Tensor], norm: float) -> None:
    given = fixture()
    (gradient,) = torch.autograd.grad(formula(given).mean(), given.s_x)
    assert float(gradient.abs().sum()) == pytest.approx(norm, abs=6e-7)
    detached = given._replace(s_x=given.s_x.detach())
    torch.testing.assert_close(formula(detached), formula(given), rtol=0, atol=0)


def test_a_floor_in_the_target_s_logarithm_moves_the_value_and_no_gradient() -> None:
    given = fixture()
    plain, floored = (formulas.rslad(given.s_x, given.s_a, given.t_x.detach(), floor=f) for f in (0.0, 1e-5))
    assert 1e-5 < float((floored - plain).detach().min()) < 1e-4
    for student in (given.s_x, given.s_a):
        left, right = (torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (plain, floored))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-15)


def test_mtard_s_weights_follow_both_terms() -> None:
    balance = textbook.Balance()
    followed = [balance.follow(*pair)[1] for pair in ((0.2, 0.1), (0.1, 0.1), (0.1, 0.05))]
    assert followed == pytest.approx([0.5, 0.504167, 0.504062], abs=6e-7)
    assert balance.follow(0.1, 0.05)[0] == 1 - balance.natural


def test_igdm_compares_differences_alone() -> None:
    given = fixture()
    assert float(formulas.igdm(given.s_a, given.s_m, given.s_a, given.s_m).detach().abs().max()) < 1e-15
    shift = torch.tensor([[3.0], [-2.0]], dtype=torch.float64)
    for name in ("s_a", "s_m", "t_a", "t_m"):
        shifted = given._replace(**{name: getattr(given, name) + shift})
        torch.testing.assert_close(igdm(shifted), igdm(given), rtol=0, atol=1e-14)
    gradients = torch.autograd.grad(igdm(given).sum(), (given.s_a, given.s_m))
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_saad_leaves_out_the_sample_of_the_lowest_entropy() -> None:
    given = fixture()
    lowest = int(formulas.renyi_entropy(given.t_a).argmin())
    gradients = torch.autograd.grad(saad(given, b=0).sum(), (given.s_a, given.s_m))
    for gradient in gradients:
        assert gradient[lowest].abs().max() == 0
        assert gradient[1 - lowest].abs().max() > 1e-3


def test_renyi_s_entropy_becomes_shannon_s() -> None:
    logits = fixture().t_x.detach()
    near = formulas.renyi_entropy(logits, 1 + 1e-7)
    torch.testing.assert_close(near, formulas.renyi_entropy(logits), rtol=0, atol=1e-6)
    uniform = torch.zeros(1, 5, dtype=torch.float64)
    for order in (0.5, 1.0, 2.0):
        assert float(formulas.renyi_entropy(uniform, order)) == pytest.approx(math.log(5))


# ---------------------------------------------------------------- attacks


def parts(method: str, **numbers: Any) -> textbook.TextbookStep:
    """A step between linear networks of 3 * 4 * 4 pixels."""
    torch.manual_seed(3)
    student, at, st = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5, bias=False)).double() for _ in range(3))
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    setting = replace(textbook.StepSetting(method), **numbers)
    return textbook.TextbookStep(setting, student, at, st, sgd)


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(5, (count,), generator=generator)


def gradient_of(make: attacks.MakeObjective, step: StepParts, x: Tensor, labels: Tensor, a: Tensor) -> Tensor:
    a = a.clone().requires_grad_()
    return torch.autograd.grad(make(step, x, labels)(a), a)[0]


def test_adaad_s_attack_goes_through_the_teacher() -> None:
    step, (x, labels) = parts("adaad"), images()
    through = gradient_of(attacks.from_moving_teacher, step, x, labels, x)
    fixed = gradient_of(attacks.from_teacher, step, x, labels, x)  # the same value, T(x) detached
    assert (through.sign() != fixed.sign()).double().mean() > 0.1


def test_saad_s_target_moves_along_the_gradient_of_the_label_s_probability() -> None:
    """Its objective by finite differences, in a direction."""
    step, (x, labels) = parts("saad", saad_lam=1.0), images(2)
    a, direction = x + 0.01, torch.randn_like(x)
    objective = attacks.from_linear_teacher(step, x, labels)
    gradient = gradient_of(attacks.from_linear_teacher, step, x, labels, a)
    with torch.no_grad():
        numeric = (objective(a + 1e-6 * direction) - objective(a - 1e-6 * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)
    still = replace(step, setting=replace(step.setting, saad_lam=0.0))
    torch.testing.assert_close(
        gradient_of(attacks.from_linear_teacher, still, x, labels, a),
        gradient_of(attacks.from_teacher, still, x, labels, a),
    )
    assert (gradient - gradient_of(attacks.from_teacher, step, x, labels, a)).abs().max() > 1e-4


def test_n_fgsm_leaves_the_ball_and_fgsm_rs_does_not() -> None:
    (x, labels), epsilon = images(), 8 / 255
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1
    around = parts("n-fgsm").attack(x, labels, (x + 2 * epsilon * noise).clamp(0, 1))
    inside = parts("fgsm-rs").attack(x, labels, (x + epsilon * noise).clamp(0, 1))
    assert 2 * epsilon < (around - x).abs().max() <= 3 * epsilon + 1e-15
    assert (inside - x).abs().max() <= epsilon + 1e-15
    assert (inside - x).abs().max() > epsilon - 1e-9
    for a in (around, inside):
        assert a.min() >= 0
        assert a.max() <= 1


def test_attacks_and_losses_are_of_the_same_methods() -> None:
    assert set(attacks.ATTACK_OF) == {name.partition("+")[0] for name in losses.METHOD_LOSSES}

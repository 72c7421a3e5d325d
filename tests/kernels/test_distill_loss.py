"""`distill_loss` against formulas typed again, method by method, and against its gradients in closed form.

The methods' formulas are written with exp, log and sum in float64 and share nothing with the code under test.
Each implementation that runs here is held to them in turn, in the dtypes it knows (the fixture `dtype`).
B batch, C classes, K the six terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import methods
from engine.config import LossConfig
from engine.kernels import DistillLoss, Term, distill_loss
from tests.kernels.cases import table_loss

LOGITS = ("s_adv", "s_nat", "t_at_nat", "t_at_adv", "t_st_adv")
READS = (
    ("s_nat",),
    ("s_adv",),
    ("s_adv", "s_nat"),
    ("s_adv", "t_at_nat"),
    ("s_adv", "t_at_adv"),
    ("s_adv", "t_st_adv"),
)
SEEDS = st.integers(0, 2**31)


@dataclass(frozen=True)
class Batch:
    """Logits (B, C) under the names of `distill_loss`, and labels."""

    s_adv: Tensor
    s_nat: Tensor
    t_at_nat: Tensor
    t_at_adv: Tensor
    t_st_adv: Tensor
    labels: Tensor

    def map(self, change: Callable[[Tensor], Tensor], labels: Tensor | None = None) -> Batch:
        """The batch with changed logits, of which the student's ask for a gradient."""
        changed = {name: change(getattr(self, name).detach()) for name in LOGITS}
        for name in ("s_adv", "s_nat"):
            changed[name].requires_grad_()
        return Batch(**changed, labels=self.labels if labels is None else labels)

    def double(self) -> Batch:
        return self.map(Tensor.double)

    def loss(self, weights: Any, **options: Any) -> DistillLoss:
        logits = {name: getattr(self, name) for name in LOGITS}
        return table_loss(labels=self.labels, **logits, weights=weights, **options)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients to s_adv and s_nat, 0 where the loss does not reach."""
        if not loss.requires_grad:
            return [torch.zeros_like(self.s_adv), torch.zeros_like(self.s_nat)]
        student = (self.s_adv, self.s_nat)
        return list(
            torch.autograd.grad(loss, student, retain_graph=True, allow_unused=True, materialize_grads=True)
        )


def draw(
    seed: int,
    rows: int = 5,
    classes: int = 7,
    scale: float = 2.0,
    limit: float = 150.0,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Normal logits times scale, cut to +-limit."""
    generator = torch.Generator().manual_seed(seed)
    logits = {
        name: (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).clamp(-limit, limit)
        for name in LOGITS
    }
    labels = torch.randint(classes, (rows,), generator=generator)
    return Batch(**logits, labels=labels).map(lambda logits_BC: logits_BC.to(dtype))


def draw_weights(seed: int) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(float(a), float(b)) for a, b in torch.randn(6, 2, generator=generator, dtype=torch.float64)]


def pairs(method: methods.Method) -> list[tuple[float, float]]:
    """The weights (a, b) of the six terms of Table 1."""
    names = ("ce_nat", "ce_adv", "kl_self", "kl_at_nat", "kl_at_adv", "kl_st_adv")
    assert set(method.weights) <= set(names)
    return [method.weights[name][:2] if name in method.weights else (0.0, 0.0) for name in names]


# The methods' formulas: PAPER and OFFICIAL map a name to the loss of a batch.


def soft(logits_BC: Tensor, tau: float = 1.0) -> Tensor:
    exp_BC = (logits_BC / tau).exp()
    return exp_BC / exp_BC.sum(dim=1, keepdim=True)


def ce(logits_BC: Tensor, labels: Tensor) -> Tensor:
    return -soft(logits_BC)[range(len(labels)), labels].log()


def kl(target_BC: Tensor, student_BC: Tensor) -> Tensor:
    """KL(target || student), which the paper writes the other way round."""
    return (target_BC * (target_BC.log() - student_BC.log())).sum(dim=1)


def trust(x: Batch, p: LossConfig) -> Tensor:
    """Eq. 4."""
    return soft(x.t_at_adv)[range(len(x.labels)), x.labels] ** p.beta


def gamma(x: Batch, p: LossConfig) -> Tensor | float:
    return 1 - trust(x, p) if p.gamma is None else p.gamma


def ard(x: Batch, p: LossConfig) -> Tensor:
    teacher = kl(soft(x.t_at_nat, p.tau), soft(x.s_adv, p.tau)).mean()
    return p.lam * ce(x.s_nat, x.labels).mean() + (1 - p.lam) * p.tau**2 * teacher


def akd2(x: Batch, p: LossConfig) -> Tensor:
    label = ce(x.s_adv, x.labels).mean()
    robust = kl(soft(x.t_at_adv, p.tau), soft(x.s_adv, p.tau)).mean()
    standard = kl(soft(x.t_st_adv, p.tau), soft(x.s_adv, p.tau)).mean()
    return p.lam1 * label + p.lam2 * p.tau**2 * robust + p.lam3 * p.tau**2 * standard


def trades(x: Batch, p: LossConfig) -> Tensor:
    self_B = kl(soft(x.s_nat, p.tau_self), soft(x.s_adv, p.tau_self))
    return ce(x.s_nat, x.labels).mean() + p.trades_lambda * self_B.mean()


def iad1_paper(x: Batch, p: LossConfig) -> Tensor:
    """Algorithm 1, with a temperature of its own for the self term."""
    self_B = kl(soft(x.s_nat, p.tau_self), soft(x.s_adv, p.tau_self))
    return ard(x, p) + (1 - p.lam) * p.tau_self**2 * (gamma(x, p) * self_B).mean()


def iad1_official(x: Batch, p: LossConfig) -> Tensor:
    a = 1 - p.lam
    return ard(x, p) + a * ((1 - trust(x, p)) * kl(soft(x.s_nat), soft(x.s_adv))).mean()


def down(x: Batch, p: LossConfig) -> Tensor:
    """The addition of IAD-I-Down (Table 8) to IAD-I: the teacher's term weighted alpha in place of 1."""
    teacher_B = kl(soft(x.t_at_nat, p.tau), soft(x.s_adv, p.tau))
    return (1 - p.lam) * p.tau**2 * ((trust(x, p) - 1) * teacher_B).mean()


def iad2_paper(x: Batch, p: LossConfig) -> Tensor:
    """Algorithm 1, its bracket closed before gamma."""
    robust_B = kl(soft(x.t_at_adv, p.tau), soft(x.s_adv, p.tau))
    standard_B = kl(soft(x.t_st_adv, p.tau), soft(x.s_adv, p.tau))
    self_B = kl(soft(x.s_nat, p.tau_self), soft(x.s_adv, p.tau_self))
    return (
        p.lam1 * ce(x.s_adv, x.labels)
        + p.lam2 * p.tau**2 * trust(x, p) * robust_B
        + p.lam3 * p.tau**2 * standard_B
        + gamma(x, p) * self_B
    ).mean()


def iad2_official(x: Batch, p: LossConfig) -> Tensor:
    alpha_B = trust(x, p)
    robust_B = kl(soft(x.t_at_adv, p.tau), soft(x.s_adv, p.tau))
    self_B = kl(soft(x.s_nat), soft(x.s_adv))
    standard = kl(soft(x.t_st_adv, p.tau), soft(x.s_adv, p.tau)).mean()
    introspection = (alpha_B * robust_B + (1 - alpha_B) * self_B).mean()
    return p.lam1 * ce(x.s_adv, x.labels).mean() + p.lam2 * p.tau**2 * introspection + p.lam3 * p.tau**2 * standard


Formula = Callable[[Batch, LossConfig], Tensor]
PAPER: dict[str, Formula] = {
    "st": lambda x, p: ce(x.s_nat, x.labels).mean(),
    "at": lambda x, p: ce(x.s_adv, x.labels).mean(),
    "trades": trades,
    "ard": ard,
    "akd2": akd2,
    "iad1": iad1_paper,
    "iad1-down": lambda x, p: iad1_paper(x, p) + down(x, p),
    "iad2": iad2_paper,
}
OFFICIAL = PAPER | {
    "iad1": iad1_official,
    "iad1-down": lambda x, p: iad1_official(x, p) + down(x, p),
    "iad2": iad2_official,
}
FORMULAS = {"paper": PAPER, "official": OFFICIAL}


@st.composite
def hyper_parameters(draw_: st.DrawFn, semantics: str) -> LossConfig:
    def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
        return st.floats(math.log(low), math.log(high)).map(math.exp).map(lambda tau: min(max(tau, low), high))

    weight = st.just(0.0) | st.floats(0.01, 2)
    published = semantics == "official"
    return LossConfig(
        tau=draw_(log_uniform(0.1, 100)),
        tau_self=1.0 if published else draw_(log_uniform(0.1, 100)),
        beta=draw_(st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0))),
        gamma=None if published else draw_(st.none() | weight),
        lam=draw_(st.sampled_from((0.0, 1.0)) | st.floats(0.01, 0.99)),
        lam1=draw_(weight),
        lam2=draw_(weight),
        lam3=draw_(weight),
        trades_lambda=draw_(st.floats(0.01, 10)),
    )


def close(got: Any, wanted: Any, *, ulps: float, scale: float = 0.0) -> None:
    """Equal to a float64 value, relative to itself or to scale, within ulps rounding units of the dtype."""
    dtype = got[0].dtype if isinstance(got, tuple) else got.dtype
    unit = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(got, wanted, rtol=unit, atol=unit * scale, check_dtype=False)


def assert_equal_up_to_rounding(
    batch: Batch, actual: Tensor, formula: Formula, weights: Any, p: LossConfig
) -> None:
    """Value and gradients within rounding of the sizes that were added up: a sum may cancel, its terms round."""
    exact = batch.double()
    wanted = formula(exact, p)
    coldest = min(p.tau, p.tau_self, 1.0)
    largest = float(max(getattr(batch, name).detach().abs().max() for name in LOGITS))
    size = sum(abs(a) + abs(b) for a, b in weights) * (1 + batch.s_adv.shape[1] / 50 + largest / coldest)
    close(actual, wanted, ulps=500, scale=size)
    for got, right in zip(batch.gradients(actual), exact.gradients(wanted), strict=True):
        close(got, right, ulps=500, scale=size / coldest)


@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize("name", sorted(PAPER))
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=SEEDS, rows=st.integers(1, 9), classes=st.integers(2, 50), scale=st.floats(1e-2, 50))
def test_every_method_and_its_warm_up_equal_the_formulas(
    dtype: torch.dtype,
    name: str,
    semantics: str,
    data: st.DataObject,
    seed: int,
    rows: int,
    classes: int,
    scale: float,
) -> None:
    p = data.draw(hyper_parameters(semantics))
    # Probabilities of at least exp(-300) keep the plain formulas away from the end of float64.
    batch = draw(seed, rows, classes, scale, limit=150 * min(p.tau, p.tau_self, 1.0), dtype=dtype)
    method = methods.get(name, semantics=semantics, loss=p)
    phases = [(name, method)] if method.warmup is None else [(name, method), (method.warmup.name, method.warmup)]
    assume(all(row.weights for _, row in phases))
    for phase, row in phases:
        result = batch.loss(pairs(row), tau=p.tau, tau_self=p.tau_self, beta=p.beta)
        assert_equal_up_to_rounding(batch, result.loss, FORMULAS[semantics][phase], pairs(row), p)


def test_warm_ups_are_ard_and_akd2() -> None:
    warmups = {name: methods.get(name).warmup for name in PAPER}
    assert {name: base.name for name, base in warmups.items() if base} == {
        "iad1": "ard",
        "iad1-down": "ard",
        "iad2": "akd2",
    }


def test_algorithm_1_and_the_published_code_are_two_values_of_tau_self(dtype: torch.dtype) -> None:
    """tau_self = tau: tau^2 around both divergences (Algorithm 1). tau_self = 1: Appendix A.4 and the code."""
    batch = draw(0, dtype=dtype)
    x = batch.double()
    p = LossConfig(tau=3, tau_self=3, lam=0.3)
    teacher_B = kl(soft(x.t_at_nat, 3), soft(x.s_adv, 3))
    self_B = kl(soft(x.s_nat, 3), soft(x.s_adv, 3))
    algorithm_1 = 0.3 * ce(x.s_nat, x.labels) + 0.7 * 9 * (teacher_B + (1 - trust(x, p)) * self_B)
    row = pairs(methods.get("iad1", loss=p))
    close(batch.loss(row, tau=3, tau_self=3).loss, algorithm_1.mean(), ulps=32)

    p = LossConfig(tau=3, lam=0.3)
    row = pairs(methods.get("iad1", loss=p))
    close(batch.loss(row, tau=3).loss, iad1_official(x, p), ulps=32)


# The table itself: six terms, alpha, and gradients in closed form.


def six_terms(x: Batch, tau: float = 1.0, tau_self: float = 1.0) -> list[Tensor]:
    """The terms per sample from torch's log-softmax, in the dtype of the logits."""

    def divergence(target_BC: Tensor, temperature: float) -> Tensor:
        log_t_BC = (target_BC / temperature).log_softmax(dim=1)
        log_s_BC = (x.s_adv / temperature).log_softmax(dim=1)
        return (log_t_BC.exp() * (log_t_BC - log_s_BC)).sum(dim=1)

    return [
        F.cross_entropy(x.s_nat, x.labels, reduction="none"),
        F.cross_entropy(x.s_adv, x.labels, reduction="none"),
        divergence(x.s_nat, tau_self),
        divergence(x.t_at_nat, tau),
        divergence(x.t_at_adv, tau),
        divergence(x.t_st_adv, tau),
    ]


def weighted(terms: list[Tensor], weights: list[tuple[float, float]], alpha_B: Tensor) -> Tensor:
    total: Tensor = sum((a + b * alpha_B) * term_B for (a, b), term_B in zip(weights, terms, strict=True))  # type: ignore[assignment]
    return total


def closed_form(x: Batch, w_BK: Tensor, tau: float, tau_self: float, detach_self: bool) -> tuple[Tensor, Tensor]:
    """The gradients of docs/loss.md; w_BK are the weights after alpha, each divided by B."""
    y_BC = F.one_hot(x.labels, x.s_adv.shape[1]).double()
    w = w_BK[:, :, None].unbind(dim=1)
    q_BC, p_BC = soft(x.s_nat, tau_self), soft(x.s_adv, tau_self)
    grad_adv = w[1] * (soft(x.s_adv) - y_BC) + w[2] / tau_self * (p_BC - q_BC)
    for w_k, teacher in zip(w[3:], (x.t_at_nat, x.t_at_adv, x.t_st_adv), strict=True):
        grad_adv = grad_adv + w_k / tau * (soft(x.s_adv, tau) - soft(teacher, tau))
    grad_nat = w[0] * (soft(x.s_nat) - y_BC)
    if not detach_self:
        d_BC = q_BC.log() - p_BC.log()
        grad_nat = grad_nat + w[2] / tau_self * q_BC * (d_BC - (q_BC * d_BC).sum(dim=1, keepdim=True))
    return grad_adv, grad_nat


@pytest.mark.parametrize("detach_self", [False, True])
@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, tau=st.floats(0.5, 10), tau_self=st.floats(0.5, 10), beta=st.floats(0, 1))
def test_gradients_of_any_table_have_the_closed_form(
    dtype: torch.dtype, detach_self: bool, seed: int, tau: float, tau_self: float, beta: float
) -> None:
    batch, weights = draw(seed, dtype=dtype), draw_weights(seed)
    v_B = torch.linspace(0, 2, 5, dtype=torch.float64)
    result = batch.loss(
        weights, tau=tau, tau_self=tau_self, beta=beta, detach_self=detach_self, sample_weights=v_B
    )
    table = torch.tensor(weights, dtype=torch.float64)
    x = batch.double()
    w_BK = table[:, 0] + table[:, 1] * (soft(x.t_at_adv)[range(5), x.labels] ** beta)[:, None]
    expected = closed_form(x, v_B[:, None] * w_BK / 5, tau, tau_self, detach_self)
    for got, wanted in zip(batch.gradients(result.loss), expected, strict=True):
        close(got, wanted, ulps=500, scale=1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(label_smoothing: float) -> None:
    batch, weights = draw(1), draw_weights(1)

    def loss(s_adv: Tensor, s_nat: Tensor) -> Tensor:
        student = Batch(s_adv, s_nat, batch.t_at_nat, batch.t_at_adv, batch.t_st_adv, batch.labels)
        return student.loss(weights, tau=2.0, tau_self=0.7, beta=0.5, label_smoothing=label_smoothing).loss

    assert torch.autograd.gradcheck(loss, (batch.s_adv, batch.s_nat), atol=1e-8, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=st.floats(0, 2))
def test_alpha_and_terms_are_those_of_the_batch(dtype: torch.dtype, seed: int, beta: float) -> None:
    batch = draw(seed, dtype=dtype)
    x = batch.double()
    result = batch.loss(draw_weights(seed), tau=3.0, tau_self=2.0, beta=beta)
    true_probability = F.softmax(x.t_at_adv, dim=1)[range(5), x.labels]
    close(result.alpha, true_probability**beta, ulps=200)
    means_K = torch.stack([term_B.mean() for term_B in six_terms(x, 3.0, 2.0)])
    close(result.terms, means_K.detach(), ulps=500, scale=0.1)


def test_alpha_is_one_without_the_robust_teacher_on_adversarial_images(dtype: torch.dtype) -> None:
    batch = draw(2, dtype=dtype)
    result = table_loss(batch.s_adv, batch.labels, weights=pairs(methods.get("at")))
    assert torch.equal(result.alpha, torch.ones(5, dtype=dtype))
    expected = F.cross_entropy(batch.s_adv.detach().double(), batch.labels)
    close(result.terms, expected[None], ulps=8)


@pytest.mark.parametrize("extreme", [1e4, 3e38, math.inf])
def test_alpha_is_finite_where_the_probability_underflows(extreme: float, dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 0])
    t_at_adv = torch.tensor([[-extreme, 1.0, 2.0], [0.0, -extreme, 1e4], [1e4, -1e4, 0.0]], dtype=dtype)
    s_adv = torch.zeros(3, 3, dtype=dtype, requires_grad=True)

    def weigh_by_alpha(beta: float) -> DistillLoss:
        row = ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0), (0, 0))
        return table_loss(s_adv, labels, t_at_adv=t_at_adv, weights=row, beta=beta)

    at_zero = weigh_by_alpha(0.0)
    assert at_zero.alpha.tolist() == [1, 1, 1]
    torch.testing.assert_close(at_zero.loss, torch.tensor(math.log(3), dtype=dtype))
    assert torch.isfinite(*torch.autograd.grad(at_zero.loss, s_adv)).all()
    assert weigh_by_alpha(0.1).alpha.tolist() == [0, 0, 1]


def test_extreme_logits_give_finite_values_and_gradients(dtype: torch.dtype) -> None:
    batch = draw(3, scale=1e6, limit=1e4, dtype=dtype)
    result = batch.loss([(1, 1)] * 6, tau=0.5, beta=0.0)
    for value in (result.loss, result.alpha, result.terms, *batch.gradients(result.loss)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("k", range(6))
def test_a_term_of_zero_weight_needs_no_logits_and_is_blind_to_nan(dtype: torch.dtype, k: int) -> None:
    batch = draw(4, dtype=dtype)
    weights = [(0.0, 0.0)] * 6
    weights[k] = (0.7, 0.0)
    read: dict[str, Any] = {name: getattr(batch, name) for name in READS[k]}
    alone = table_loss(read.pop("s_adv", None), batch.labels, **read, weights=weights, tau=2.0, tau_self=3.0)
    close(alone.loss, 0.7 * six_terms(batch.double(), 2.0, 3.0)[k].mean(), ulps=32)

    spoiled = batch.map(torch.clone)
    with torch.no_grad():
        for name in set(LOGITS) - set(READS[k]):
            getattr(spoiled, name).fill_(math.nan)
    result = spoiled.loss(weights, tau=2.0, tau_self=3.0)
    assert torch.equal(result.loss, alone.loss)
    assert torch.equal(result.terms, alone.terms)
    for got, wanted in zip(spoiled.gradients(result.loss), batch.gradients(alone.loss), strict=True):
        assert torch.equal(got, wanted)


def test_logits_that_ask_get_a_gradient_and_nothing_else_does(dtype: torch.dtype) -> None:
    batch = draw(5, dtype=dtype)
    weights, sample_weights = draw_weights(5), torch.linspace(0, 2, 5, dtype=dtype, requires_grad=True)
    teachers = [batch.t_at_nat, batch.t_st_adv, batch.t_at_adv]
    for tensor in teachers[:2]:
        tensor.requires_grad_()
    result = batch.loss(weights, tau=2.0, sample_weights=sample_weights)
    assert result.loss.requires_grad
    assert not result.alpha.requires_grad
    assert not result.terms.requires_grad
    assert not result.per_sample.requires_grad
    torch.autograd.backward(result.loss)
    assert sample_weights.grad is None
    assert batch.t_at_adv.grad is None
    assert batch.s_adv.grad is not None
    assert batch.s_nat.grad is not None
    x, v_B = batch.double(), sample_weights.detach().double()
    for k, teacher, right in ((3, batch.t_at_nat, x.t_at_nat), (5, batch.t_st_adv, x.t_st_adv)):
        q_BC, p_BC = soft(right, 2.0), soft(x.s_adv, 2.0)
        d_BC = q_BC.log() - p_BC.log()
        w_B = v_B * (weights[k][0] + weights[k][1] * trust(x, LossConfig())) / 5 / 2
        wanted = w_B[:, None] * q_BC * (d_BC - (q_BC * d_BC).sum(dim=1, keepdim=True))
        assert teacher.grad is not None
        close(teacher.grad, wanted.detach(), ulps=500, scale=1)


def test_a_detached_self_target_changes_the_gradient_and_not_the_value(dtype: torch.dtype) -> None:
    batch, weights = draw(6, dtype=dtype), [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (0, 0)]
    attached, detached = batch.loss(weights).loss, batch.loss(weights, detach_self=True).loss
    assert torch.equal(attached, detached)
    assert batch.gradients(attached)[1].any()
    assert not batch.gradients(detached)[1].any()
    assert torch.equal(batch.gradients(attached)[0], batch.gradients(detached)[0])


def test_sample_weights_multiply_and_the_mean_still_divides_by_b(dtype: torch.dtype) -> None:
    batch, weights = draw(7, dtype=dtype), draw_weights(7)
    x = batch.double()
    v_B = torch.tensor([0, 0.5, 1, 2, 3], dtype=torch.float64)
    loss_B = v_B * weighted(six_terms(x), weights, trust(x, LossConfig()))
    result = batch.loss(weights, sample_weights=v_B)
    close(result.per_sample, loss_B.detach(), ulps=50, scale=1)
    close(result.loss, loss_B.sum() / 5, ulps=50, scale=1)
    assert torch.equal(result.terms, batch.loss(weights).terms)
    assert not batch.gradients(result.loss)[0][0].any()


def test_label_smoothing_is_that_of_cross_entropy_and_of_no_other_term(dtype: torch.dtype) -> None:
    batch, weights = draw(8, dtype=dtype), draw_weights(8)
    x = batch.double()
    smoothed = six_terms(x)
    for k, logits in enumerate((x.s_nat, x.s_adv)):
        uniform_B = -logits.log_softmax(dim=1).mean(dim=1)
        smoothed[k] = 0.9 * smoothed[k] + 0.1 * uniform_B
        torch.testing.assert_close(
            smoothed[k], F.cross_entropy(logits, x.labels, reduction="none", label_smoothing=0.1)
        )
    result = batch.loss(weights, label_smoothing=0.1)
    close(result.loss, weighted(smoothed, weights, trust(x, LossConfig())).mean(), ulps=50, scale=1)
    assert torch.equal(result.alpha, batch.loss(weights).alpha)


# Precision and layout.


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype, seed: int) -> None:
    """Against float64 of the same rounded logits: at most twice the error of plain float32."""
    tau, tau_self, beta = 2.0, 0.7, 0.3
    weights = [(abs(a), abs(b)) for a, b in draw_weights(seed)]  # nothing cancels

    def plain(x: Batch) -> Tensor:
        log_p_B = x.t_at_adv.log_softmax(dim=1)[range(len(x.labels)), x.labels]
        return weighted(six_terms(x, tau, tau_self), weights, (beta * log_p_B).exp()).mean()

    batch = draw(seed, rows=128, classes=100, dtype=dtype)
    result = batch.loss(weights, tau=tau, tau_self=tau_self, beta=beta)
    assert {result.loss.dtype, result.alpha.dtype, result.terms.dtype} == {torch.float32}
    exact, eager = batch.double(), batch.map(Tensor.float)
    exact_loss, eager_loss = plain(exact), plain(eager)
    ulp = torch.finfo(torch.float32).eps

    error, eager_error = (abs(value.item() - exact_loss.item()) for value in (result.loss, eager_loss))
    # A single number may be exact by luck: a few rounding units are granted.
    assert error <= 2 * eager_error + 8 * ulp * abs(exact_loss.item())

    for got, wanted, other in zip(
        batch.gradients(result.loss), exact.gradients(exact_loss), eager.gradients(eager_loss), strict=True
    ):
        assert got.dtype == dtype
        error = float((got.double() - wanted).abs().max())
        eager_error = float((other.to(dtype).double() - wanted).abs().max())
        assert error <= 2 * eager_error + ulp * float(wanted.abs().max())


def test_float64_stays_float64_and_float32_float32(dtype: torch.dtype) -> None:
    batch = draw(9, dtype=dtype)
    result = batch.loss(draw_weights(9))
    assert {value.dtype for value in (*result, *batch.gradients(result.loss))} == {dtype}


@pytest.mark.usefixtures("implementation")
def test_float64_sample_weights_leave_a_float32_loss_in_float32() -> None:
    batch = draw(9, dtype=torch.float32)
    assert batch.loss(draw_weights(9), sample_weights=torch.ones(5).double()).loss.dtype == torch.float32


def columns_first(logits_BC: Tensor) -> Tensor:
    return logits_BC.t().contiguous().t()


def every_second(logits_BC: Tensor) -> Tensor:
    padded = torch.full((2 * logits_BC.shape[0], 3 * logits_BC.shape[1]), math.nan, dtype=logits_BC.dtype)
    padded[::2, 1::3] = logits_BC
    return padded[::2, 1::3]


@pytest.mark.parametrize("layout", [columns_first, every_second])
def test_strides_do_not_matter(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    batch, weights = draw(10, dtype=dtype), draw_weights(10)
    strided = batch.map(layout, labels=torch.stack((batch.labels, batch.labels), dim=1)[:, 0])
    assert not any(getattr(strided, name).is_contiguous() for name in (*LOGITS, "labels"))
    two_B = torch.tensor([2.0], dtype=torch.float64).expand(5)
    got, wanted = strided.loss(weights, sample_weights=two_B), batch.loss(weights)
    close(got.loss, 2 * wanted.loss, ulps=50, scale=1)
    close((got.alpha, got.terms), (wanted.alpha, wanted.terms), ulps=50)
    for one, other in zip(strided.gradients(got.loss), batch.gradients(wanted.loss), strict=True):
        close(one, 2 * other, ulps=50, scale=0.1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, shift=st.floats(-100, 100))
def test_a_constant_added_to_a_row_of_logits_changes_nothing(dtype: torch.dtype, seed: int, shift: float) -> None:
    batch, weights = draw(seed, dtype=dtype), draw_weights(seed)
    shift_B1 = torch.linspace(-shift, shift, 5, dtype=dtype)[:, None]
    shifted = batch.map(lambda logits_BC: logits_BC + shift_B1)
    got, wanted = shifted.loss(weights, tau=2.0), batch.loss(weights, tau=2.0)
    # The shift itself rounds the logits.
    close(tuple(got), tuple(wanted), ulps=5_000, scale=1)
    for one, other in zip(shifted.gradients(got.loss), batch.gradients(wanted.loss), strict=True):
        close(one, other, ulps=5_000, scale=1)
        # ... so a gradient has no component along that shift.
        close(one.sum(dim=1), torch.zeros(5), ulps=500, scale=1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(7)))
def test_the_order_of_classes_and_of_samples_does_not_matter(
    dtype: torch.dtype, seed: int, order: list[int]
) -> None:
    batch, weights = draw(seed, rows=7, classes=7, dtype=dtype), draw_weights(seed)
    renamed = torch.tensor(order).argsort()[batch.labels[order]]
    permuted = batch.map(lambda logits_BC: logits_BC[order][:, order], labels=renamed)
    got, wanted = permuted.loss(weights), batch.loss(weights)
    close((got.loss, got.terms), (wanted.loss, wanted.terms), ulps=500, scale=1)
    close((got.alpha, got.per_sample), (wanted.alpha[order], wanted.per_sample[order]), ulps=500, scale=1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 9))
def test_the_loss_of_a_batch_is_the_mean_over_its_samples(dtype: torch.dtype, seed: int, rows: int) -> None:
    batch, weights = draw(seed, rows=rows, dtype=dtype), draw_weights(seed)
    samples = [slice(i, i + 1) for i in range(rows)]
    alone = [batch.map(lambda logits_BC, i=i: logits_BC[i], labels=batch.labels[i]) for i in samples]  # type: ignore[misc]
    losses = torch.stack([one.loss(weights).loss for one in alone])
    together = batch.loss(weights)
    close(together.loss, losses.mean(), ulps=500, scale=1)
    close(together.per_sample, losses.detach(), ulps=500, scale=1)


def test_a_divergence_is_zero_at_its_target_and_positive_elsewhere(dtype: torch.dtype) -> None:
    batch = draw(11, dtype=dtype)
    same = batch.map(lambda _: batch.s_adv.detach()).loss([(1, 0)] * 6, tau=3.0, tau_self=2.0)
    assert same.terms[2:].abs().max() < 4 * torch.finfo(dtype).eps
    assert (batch.loss([(1, 0)] * 6).terms[2:] > 0.1).all()


def test_an_empty_batch_costs_nothing(dtype: torch.dtype) -> None:
    batch = draw(12, rows=0, dtype=dtype)
    result = batch.loss(draw_weights(12), sample_weights=torch.ones(0))
    assert [result.loss.item(), *result.terms.tolist()] == [0] * 7
    assert result.alpha.shape == result.per_sample.shape == (0,)
    assert [gradient.shape for gradient in batch.gradients(result.loss)] == [(0, 7), (0, 7)]


# Terms of any kind.


@pytest.mark.parametrize(("order", "left"), [((0, 1, 2), math.log(2)), ((2, 0, 1), 0.0)])
def test_terms_are_summed_in_their_order(dtype: torch.dtype, order: tuple[int, ...], left: float) -> None:
    """2**60 and -2**60 cancel before the last term comes, or after it was lost in them."""
    logits, labels = {"z": torch.zeros(1, 2, dtype=dtype)}, torch.zeros(1, dtype=torch.int64)
    weights = [2.0**60, -(2.0**60), 1.0]
    terms = [Term("ce", "z", weight=(weights[k], 0.0)) for k in order]
    torch.testing.assert_close(distill_loss(logits, labels, terms).loss, torch.tensor(left, dtype=dtype))


def test_the_terms_of_mart_equal_its_published_code(dtype: torch.dtype) -> None:
    """Line by line from github.com/YisenWang/MART, mart.py, with its gradients."""
    batch = draw(13, rows=9, dtype=dtype)
    x, rows = batch.double(), range(9)
    adv_probs = F.softmax(x.s_adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == x.labels, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(x.s_adv, x.labels) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
    nat_probs = F.softmax(x.s_nat, dim=1)
    true_probs = nat_probs[rows, x.labels]
    divergence_B = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(dim=1)
    wanted = loss_adv + 5 * (divergence_B * (1.0000001 - true_probs)).mean()
    logits = {"s_adv": batch.s_adv, "s_nat": batch.s_nat}
    terms = [Term("ce", "s_adv"), Term("margin", "s_adv"), Term("kl_live", "s_adv", "s_nat", (5.0, 0.0))]
    got = distill_loss(logits, batch.labels, terms).loss
    close(got, wanted, ulps=50, scale=1)
    for one, right in zip(batch.gradients(got), x.gradients(wanted), strict=True):
        close(one, right, ulps=500, scale=1)


# What is refused.

CE = Term("ce", "s")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"terms": []}, ["terms", "none"]),
        ({"terms": [CE, Term("hinge", "s")]}, ["terms[1].kind", "'hinge'", "ce, kl, margin, kl_live"]),
        ({"terms": [Term("ce", "s", "t")]}, ["terms[0]", "'ce'", "no target", "'t'"]),
        ({"terms": [Term("margin", "s", "t")]}, ["terms[0]", "'margin'", "no target"]),
        ({"terms": [Term("kl", "s")]}, ["terms[0]", "'kl'", "a target", "None"]),
        ({"terms": [Term("kl_live", "s")]}, ["terms[0]", "'kl_live'", "a target"]),
        ({"terms": [CE, Term("kl", "u", "t")]}, ["terms[1]", "u is absent"]),
        ({"terms": [Term("kl", "s", "u")]}, ["terms[0]", "u is absent"]),
        ({"terms": [Term("ce", "s", factor="g")]}, ["terms[0]", "factor g is absent"]),
        ({"terms": [Term("kl", "s", "t", temperature=0.0)]}, ["terms[0].temperature", "positive", "0"]),
        ({"terms": [Term("kl", "s", "t", temperature=math.nan)]}, ["terms[0].temperature", "positive", "nan"]),
        ({"terms": [Term("ce", "s", temperature=2.0)]}, ["terms[0].temperature", "'ce' has none", "2"]),
        ({"trust": None}, ["trust", "alpha"]),
        ({"trust": "u"}, ["trust", "u is absent", "s, t"]),
        ({"logits": {}}, ["terms[0]", "s is absent"]),
        ({"logits": {"s": torch.zeros(4, 3), "t": torch.zeros(5, 3)}}, ["t", "(5, 3)", "(4, 3)"]),
        ({"logits": {"s": torch.zeros(5, 3), "t": torch.zeros(5, 4)}}, ["t", "(5, 4)", "(5, 3)"]),
        ({"logits": {"s": torch.zeros(5, 3), "t": torch.zeros(5, 3, 1)}}, ["t", "(5, 3, 1)"]),
        ({"logits": {"s": torch.zeros(5, 3), "t": torch.zeros(5, 3).long()}}, ["t", "int64", "floating"]),
        ({"logits": {"s": torch.zeros(5, 1), "t": torch.zeros(5, 1)}}, ["s", "1 class", "'margin'", "two"]),
        ({"factors": {"f": torch.ones(4)}}, ["factors", "f", "(4,)", "(5,)"]),
        ({"factors": {"f": torch.ones(5, 1)}}, ["factors", "f", "(5, 1)"]),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ["labels", "(5,)", "(4,)"]),
        ({"labels": torch.zeros(5, 1, dtype=torch.int64)}, ["labels", "(5, 1)"]),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, ["labels", "int32"]),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, ["labels", "0..3", "< 3"]),
        ({"labels": torch.tensor([0, 1, -1, 0, 0])}, ["labels", "-1..1"]),
        ({"labels": torch.tensor([0, 1, -100, 0, 0])}, ["labels", "-100..1"]),
        ({"sample_weights": torch.ones(4)}, ["sample_weights", "(4,)", "(5,)"]),
        ({"sample_weights": torch.ones(5, 1)}, ["sample_weights", "(5, 1)"]),
        ({"beta": -0.1}, ["beta", "0 or more", "-0.1"]),
        ({"beta": math.nan}, ["beta", "nan"]),
        ({"label_smoothing": -0.1}, ["label_smoothing", "[0, 1]", "-0.1"]),
        ({"label_smoothing": 1.5}, ["label_smoothing", "[0, 1]", "1.5"]),
    ],
)
@pytest.mark.usefixtures("implementation")
def test_a_wrong_argument_is_named_in_one_line(changes: dict[str, Any], names: list[str]) -> None:
    right: dict[str, Any] = {
        "logits": {"s": torch.zeros(5, 3), "t": torch.zeros(5, 3)},
        "labels": torch.zeros(5, dtype=torch.int64),
        "terms": [Term("margin", "s", factor="f"), Term("kl", "s", "t", (0.0, 1.0))],
        "factors": {"f": torch.ones(5)},
        "trust": "t",
    }
    distill_loss(**right)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        distill_loss(**right | changes)
    assert [name for name in names if name not in str(error.value)] == []

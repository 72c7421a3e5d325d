"""Factors of samples against closed forms, and losses that are functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import config, methods, models
from engine.kernels import DistillLoss
from engine.pipelines.base import Batch
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import factors, plan
from engine.training.factors import Factors
from engine.training.learner import Learner
from engine.training.step import StepOutput, by_function

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 2])


def make(method: str = "saad", **loss: Any) -> Factors:
    return Factors(config.load({"method": method, "loss": loss}), World(), CPU)


def of_probabilities(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


# ---------------------------------------------------------------- entropy


@pytest.mark.parametrize("order", [1.0, 0.5, 2.0])
def test_entropy_of_two_classes_in_closed_form(order: float) -> None:
    p = 0.2
    closed = -p * math.log(p) - (1 - p) * math.log(1 - p)
    if order != 1:
        closed = math.log(p**order + (1 - p) ** order) / (1 - order)
    found = factors.entropy(of_probabilities((p, 1 - p), (0.5, 0.5)), order)
    assert found.tolist() == pytest.approx([closed, math.log(2)], rel=1e-12)


def test_entropy_near_order_1_is_shannons() -> None:
    logits = torch.linspace(-3, 2, 35, dtype=torch.float64).reshape(5, 7).sin()
    torch.testing.assert_close(factors.entropy(logits, 1 + 1e-7), factors.entropy(logits, 1.0), rtol=1e-6, atol=0)


def test_the_surest_sample_of_a_batch_weighs_nothing() -> None:
    sure, middle, unsure = (0.98, 0.01, 0.01), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3)
    found = make()(["entropy", "certainty"], {"t_at_adv": of_probabilities(unsure, sure, middle)}, LABELS, 1.0)
    entropies = [-sum(p * math.log(p) for p in row) for row in (unsure, sure, middle)]
    weights = [5 * (entropy - entropies[1]) for entropy in entropies]
    assert found["entropy"].tolist() == pytest.approx(weights, rel=1e-12)
    certainty = [1 - weight / (weights[0] + 1e-8) for weight in weights]
    assert found["certainty"].tolist() == pytest.approx(certainty, rel=1e-12)


def test_a_process_without_images_has_factors_of_none() -> None:
    none = torch.empty(0, 3, dtype=torch.float64)
    found = make()(["entropy", "certainty"], {"t_at_adv": none}, LABELS[:0], 1.0)
    assert {name: factor.shape for name, factor in found.items()} == {"entropy": (0,), "certainty": (0,)}


# ---------------------------------------------------------------- balance of two teachers


def pair(divergence: float) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher whose divergence it is, in each sample: KL((1/2, 1/2) || (q, 1 - q))."""
    q = (1 + math.sqrt(1 - math.exp(-2 * divergence))) / 2
    rows = len(LABELS)
    return of_probabilities(*[(q, 1 - q)] * rows), of_probabilities(*[(0.5, 0.5)] * rows)


def logits_of(adv: float, nat: float) -> dict[str, Tensor]:
    (s_adv, t_adv), (s_nat, t_nat) = pair(adv), pair(nat)
    return {"s_adv": s_adv, "t_at_adv": t_adv, "s_nat": s_nat, "t_st_nat": t_nat}


def test_the_shares_follow_the_progress_of_both_terms() -> None:
    make_shares = make("mtard")
    shares = []
    for adv, nat in ((0.2, 0.1), (0.1, 0.1), (0.1, 0.05)):
        found = make_shares(["robust_share", "natural_share"], logits_of(adv, nat), LABELS % 2, 1.0)
        shares.append(found["natural_share"].tolist())
        assert (found["robust_share"] + found["natural_share"]).tolist() == pytest.approx([1] * 3, rel=1e-12)
    # w - g (w - r_nat / (r_adv + r_nat)), g = 0.025: first r = (1, 1), then (1/2, 1), then (1/2, 1/2).
    second = 0.5 - 0.025 * (0.5 - 1 / 1.5)
    third = second - 0.025 * (second - 0.5)
    for found_B, wanted in zip(shares, (0.5, second, third), strict=True):
        assert found_B == pytest.approx([wanted] * 3, rel=1e-9)


def test_the_rate_falls_with_the_learning_rate() -> None:
    one = make("mtard", balance_rate=0.5)
    one(["natural_share"], logits_of(0.2, 0.1), LABELS % 2, 1.0)
    share = one(["natural_share"], logits_of(0.1, 0.1), LABELS % 2, 0.1)["natural_share"][0]
    assert float(share) == pytest.approx(0.5 - 0.05 * (0.5 - 1 / 1.5), rel=1e-9)


def test_the_shares_go_on_from_a_checkpoint() -> None:
    one, other = make("mtard"), make("mtard")
    one(["natural_share"], logits_of(0.2, 0.1), LABELS % 2, 1.0)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    found = [
        each(["natural_share"], logits_of(0.1, 0.3), LABELS % 2, 1.0)["natural_share"] for each in (one, other)
    ]
    assert torch.equal(*found)
    assert float(found[0][0]) != 0.5


@pytest.mark.parametrize(("key", "value"), [("micro_batch", 4), ("awp", {"gamma": 0.01})])
def test_what_follows_whole_batches_gets_them(key: str, value: object) -> None:
    run = config.load({"method": "mtard", key: value})
    with pytest.raises(ValueError, match=rf"^{key}.*mtard balances its terms \(natural_share, robust_share\)"):
        plan.check_whole_batches(methods.get("mtard"), run)
    plan.check_whole_batches(methods.get("saad"), run)


# ---------------------------------------------------------------- a loss that is a function

Function = Callable[[dict[str, Any], Any], Any]


def by(function: Function, *reads: str) -> methods.Method:
    return replace(methods.get("at"), name="mine", weights={}, function=function, function_reads=reads)


def squared(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    return (logits["s_adv"] - logits["t_at_nat"]).square().mean(dim=1)


def test_a_function_gets_what_it_reads_and_its_mean_is_the_loss() -> None:
    torch.manual_seed(0)
    student, teacher = (models.build("resnet8", 4).double() for _ in range(2))
    run = config.load({"method": "at", "attack": {"num_steps": 2}, "dtype": "float64"})
    method = by(squared, "s_adv", "t_at_nat")
    assert plan.teachers(method, run.attack) == ("teacher",)
    learner = Learner(student, {"teacher": teacher.eval()}, method, run, Precision(CPU, torch.float64))
    batch = Batch(torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4, torch.arange(6))
    seen: list[StepOutput] = []
    learner.learn(batch, method, 0.1, on_output=lambda output, labels: seen.append(output))
    (output,) = seen
    assert set(output.logits) == {"s_adv", "t_at_nat"}
    assert output.terms == ("loss_function",)
    expected = (output.logits["s_adv"] - output.logits["t_at_nat"]).square().mean(dim=1)
    torch.testing.assert_close(output.loss.loss, expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.loss.per_sample, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.loss.terms, expected.detach().mean()[None], rtol=1e-12, atol=0)


def test_under_amp_a_function_is_the_row_that_it_writes_out() -> None:
    """Cross-entropy of S(x~) by a function and by a row: the same update, with passes in bfloat16."""
    given = {"method": "at", "attack": {"num_steps": 2}, "amp": True, "amp_dtype": "bfloat16", "compile": "off"}
    run = config.load(given)
    seen: list[torch.dtype] = []

    def cross_entropy(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
        seen.append(logits["s_adv"].dtype)
        return torch.nn.functional.cross_entropy(logits["s_adv"], labels, reduction="none")

    batch = Batch(torch.rand(6, 3, 8, 8), torch.arange(6) % 4, torch.arange(6))
    updated = []
    for method in (methods.get("at"), by(cross_entropy, "s_adv")):
        torch.manual_seed(0)
        student = models.build("resnet8", 4).to(memory_format=torch.channels_last)
        learner = Learner(student, {}, method, run, Precision(CPU, torch.float32, torch.bfloat16))
        learner.learn(batch, method, 0.1)
        updated.append(torch.cat([value.detach().flatten() for value in student.parameters()]))
    assert seen == [torch.float32]
    torch.testing.assert_close(*updated, rtol=0, atol=1e-5)


def loss_of(function: Function) -> DistillLoss:
    logits = {"s_adv": torch.randn(3, 4, requires_grad=True), "t_at_nat": torch.randn(3, 4)}
    return by_function(by(function, *logits), logits, None, LABELS)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda logits, labels: squared(logits, labels).mean(), r"must be a floating \(3,\), got \(\)"),
        (lambda logits, labels: labels, r"must be a floating \(3,\), got \(3,\)"),
        (lambda logits, labels: 1.0, r"must be a floating \(3,\), got float"),
        (lambda logits, labels: squared(logits, labels).detach(), "has no gradient to the student's logits"),
    ],
)
def test_a_function_that_gives_no_loss_is_refused(function: Function, said: str) -> None:
    with pytest.raises(ValueError, match=f"^method: the loss of mine {said}"):
        loss_of(function)


def test_a_function_has_no_terms_to_weigh() -> None:
    for name, keys in (("mine", {"weights": {"ce_adv": 1}}), ("mine+igdm", {})):
        with pytest.raises(ValueError, match="is a function, and has no terms"):
            methods._by_function(name, methods.METHODS["at"], config.LossConfig(**keys))  # type: ignore[arg-type]

"""A step on mixed images: the loss is its expectation over both labels, and the attack leads away from both."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine import methods
from engine.attacks import pgd
from engine.config import AttackSpec
from engine.pipelines.base import Batch, Mixture
from engine.training.learner import Learner
from tests.training.test_learner import SAMPLE_BY_SAMPLE, assert_near, batch, learn, learner, network, weights

ATTACK = {"bn": "eval", "num_steps": 2}
SHARE = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0], dtype=torch.float64)


def mixed(share: Tensor = SHARE) -> Batch:
    whole = batch(len(share))
    return Batch(
        whole.x_nat, whole.labels, whole.sample, Mixture((whole.labels + 1 + whole.sample % 3) % 4, share, 4)
    )


def with_labels(given: Batch, labels: Tensor) -> Batch:
    return Batch(given.x_nat, labels, given.sample)


def frozen_statistics(method: str, **keys: object) -> Learner:
    return learner(method, network(0).eval(), attack=ATTACK, **keys)


def soft_cross_entropy(logits_BC: Tensor, probabilities_BC: Tensor) -> Tensor:
    return (probabilities_BC * (logits_BC.logsumexp(dim=1, keepdim=True) - logits_BC)).sum(dim=1)


def probabilities(given: Batch) -> Tensor:
    assert given.mixture is not None
    rows = torch.zeros(len(given.labels), 4, dtype=torch.float64)
    for i, share in enumerate(given.mixture.share.tolist()):
        rows[i, given.labels[i]] += share
        rows[i, given.mixture.labels[i]] += 1 - share
    return rows


def test_the_attack_and_the_loss_of_at_are_the_cross_entropy_of_mixed_labels() -> None:
    one, given = frozen_statistics("at"), mixed()
    spec, expected = one.networks.adversary.spec, probabilities(given)  # type: ignore[union-attr]
    x_adv = pgd.started(given.x_nat, spec, seed=0, counter=5, sample=given.sample)
    for _ in range(2):
        images = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(soft_cross_entropy(one.student(images), expected).sum(), images)
        low, high = given.x_nat - spec.epsilon, given.x_nat + spec.epsilon
        x_adv = (
            torch.minimum(torch.maximum(images + spec.step_size * gradient.sign(), low), high).clamp(0, 1).detach()
        )
    one.numbers.set(0.1, epoch=5, step=0)
    teachers = one.step.attack_and_teach(given, one.method)
    assert (teachers.images["adv"] - x_adv).abs().max() < 1e-12
    output = one.step.loss(given, teachers, one.method, one.step.config.forwards, 5)
    per_sample = soft_cross_entropy(one.student(x_adv), expected)
    assert torch.allclose(output.loss.per_sample, per_sample, rtol=1e-10, atol=1e-10)
    assert torch.allclose(output.loss.loss, per_sample.mean(), rtol=1e-10)


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_the_loss_is_its_expectation_over_both_labels(method: str) -> None:
    one, given = frozen_statistics(method), mixed()
    if method == "saad":
        one = learner(method, network(0).eval(), attack=ATTACK | {"loss": "kl"})
    assert given.mixture is not None
    teachers = one.step.attack_and_teach(given, one.method)
    balance = one.factors.balance.clone()
    found: list[tuple[Tensor, Tensor]] = []
    for each in (given, with_labels(given, given.labels), with_labels(given, given.mixture.labels)):
        one.factors.balance.copy_(balance)
        loss = one.step.loss(each, teachers, one.method, one.step.config.forwards, 5).loss
        found.append((loss.per_sample, loss.alpha))
    (mixed_B, alpha_B), own, other = found
    share = given.mixture.share
    assert torch.allclose(mixed_B, share * own[0] + (1 - share) * other[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(alpha_B, share * own[1] + (1 - share) * other[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["at", "trades", "iad1", "iad2", "mart"])
def test_the_gradient_is_that_of_the_expectation(method: str) -> None:
    """With one share for all samples, it is the same mean of two gradients."""
    one = frozen_statistics(method)
    given = mixed(torch.full((8,), 0.3, dtype=torch.float64))
    assert given.mixture is not None
    teachers = one.step.attack_and_teach(given, one.method)
    parameters = list(one.student.parameters())

    def gradients(each: Batch) -> Sequence[Tensor]:
        loss = one.step.loss(each, teachers, one.method, one.step.config.forwards, 5).loss.loss
        return torch.autograd.grad(loss, parameters)

    own, other = (gradients(with_labels(given, labels)) for labels in (given.labels, given.mixture.labels))
    for got, left, right in zip(gradients(given), own, other, strict=True):
        assert torch.allclose(got, 0.3 * left + 0.7 * right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["at", "iad1", "mart"])
def test_a_share_of_one_is_the_step_without_mixing(method: str) -> None:
    plain, other = frozen_statistics(method), frozen_statistics(method)
    learn(plain, batch())
    learn(other, mixed(torch.ones(8, dtype=torch.float64)))
    assert_near(weights(plain), weights(other))


@pytest.mark.parametrize("method", [name for name in SAMPLE_BY_SAMPLE if name in ("at", "trades", "iad2", "mart")])
def test_micro_batches_give_the_update_of_the_whole(method: str) -> None:
    whole, parted = frozen_statistics(method), frozen_statistics(method, micro_batch=3)
    learn(whole, mixed())
    learn(parted, mixed())
    assert_near(weights(whole), weights(parted))


def test_accuracies_count_the_label_of_the_larger_share() -> None:
    one, given = frozen_statistics("at"), mixed()
    ((_, labels),) = learn(one, given)
    assert torch.equal(labels[SHARE > 0.5], given.labels[SHARE > 0.5])
    assert given.mixture is not None
    assert torch.equal(labels[SHARE < 0.5], given.mixture.labels[SHARE < 0.5])


def test_an_attack_of_one_label_refuses_mixed_ones() -> None:
    given = mixed()
    with pytest.raises(ValueError, match="^attack.loss: 'cw' is of one label an image, and these are mixed ones$"):
        pgd.pgd(network(0), given.x_nat, given.targets, AttackSpec(loss="cw", num_steps=1))

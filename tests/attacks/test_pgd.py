from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import config, models
from engine.attacks.pgd import batch_norm_mode, describe, frozen, pgd, preset, presets
from engine.config import AttackSpec, validated
from engine.objectives import ATTACK_LOSSES

MODES = ("train", "eval", "batch")
BALLS = {"Linf": (8 / 255, 3 / 255), "L2": (0.6, 0.25)}


class Network(nn.Module):
    """Convolution, BatchNorm with running statistics of its own, ReLU, linear; left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * 9, 5)
        self.double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for value in (*self.parameters(), self.get_buffer("norm.running_mean")):
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.5)
            var = torch.rand(6, generator=generator, dtype=torch.float64)
            self.get_buffer("norm.running_var").copy_(0.5 + var)

    def forward(self, images: Tensor) -> Tensor:
        features = F.avg_pool2d(F.relu(self.norm(self.conv(images))), 2)
        logits: Tensor = self.linear(features.flatten(1))
        return logits


def network(dtype: torch.dtype = torch.float64) -> Network:
    return Network().to(dtype)


def batch(size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x_nat = torch.rand(size, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x_nat, torch.randint(5, (size,), generator=generator)


def spec(threat_model: str = "Linf", **keys: object) -> AttackSpec:
    epsilon, step_size = BALLS[threat_model]
    given = {"threat_model": threat_model, "epsilon": epsilon, "step_size": step_size, "num_steps": 5}
    return AttackSpec.model_validate(given | keys)


def some_start(x_nat: Tensor, epsilon: float, threat_model: str) -> Tensor:
    noise = torch.randn(x_nat.shape, generator=torch.Generator().manual_seed(5), dtype=x_nat.dtype)
    norm = noise.abs().amax((1, 2, 3)) if threat_model == "Linf" else noise.flatten(1).norm(dim=1)
    return 0.9 * epsilon * noise / norm[:, None, None, None]


def distance(x_adv: Tensor, x_nat: Tensor, threat_model: str) -> float:
    delta = (x_adv - x_nat).flatten(1)
    return float((delta.abs().amax(1) if threat_model == "Linf" else delta.norm(dim=1)).max())


# ---------------------------------------------------------------- what the attack computes


def transcription(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, spec: AttackSpec, loss: Callable[..., Tensor]
) -> Tensor:
    """Eq. 2 as one would write it down, on a model that already runs as it should."""
    with torch.no_grad():
        target = model(x).softmax(1) if spec.loss == "kl" else None
    adv = x + start
    if spec.clamp_start:
        adv = adv.clip(0, 1)
    for _ in range(spec.num_steps):
        adv = adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(model(adv), y, target), adv)
        with torch.no_grad():
            if spec.threat_model == "Linf":
                delta = (adv + spec.step_size * g.sign() - x).clip(-spec.epsilon, spec.epsilon)
            else:
                delta = adv - x + spec.step_size * g / (g**2).sum((1, 2, 3), keepdim=True).sqrt()
                far = (delta**2).sum((1, 2, 3), keepdim=True).sqrt()
                delta = torch.where(far > spec.epsilon, delta * spec.epsilon / far, delta)
            adv = (x + delta).clip(0, 1)
    return adv.detach()


def cross_entropy(z: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
    return -(z[torch.arange(len(y)), y] - z.exp().sum(1).log()).mean()


def divergence(z: Tensor, _: Tensor, p: Tensor | None) -> Tensor:
    assert p is not None
    return (p * (p.log() - (z.exp() / z.exp().sum(1, keepdim=True)).log())).sum(1).mean()


def margin(z: Tensor, y: Tensor, _: Tensor | None, kappa: float = 50.0) -> Tensor:
    others = z - 1e6 * F.one_hot(y, 5)
    return -torch.clamp(z[torch.arange(len(y)), y] - others.max(1).values + kappa, min=0).mean()


def ratio(z: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
    """Croce and Hein (2020), Eq. 6."""
    ordered = z.sort(1, descending=True).values
    true = z[torch.arange(len(y)), y]
    other = torch.where(true == ordered[:, 0], ordered[:, 1], ordered[:, 0])
    return -((true - other) / (ordered[:, 0] - ordered[:, 2])).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {"ce": cross_entropy, "kl": divergence, "cw": margin, "dlr": ratio}


def soft_divergence(p: Tensor, z: Tensor) -> Tensor:
    return (p * (p.log() - z.log_softmax(1))).sum()


def fixed(student: nn.Module, teacher: nn.Module, x: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """RSLAD: K(T(x) || S(a))."""
    return soft_divergence(teacher(x).softmax(1).detach(), student(a))


def moving(student: nn.Module, teacher: nn.Module, x: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """AdaAD: K(T(a) || S(a)), nothing detached."""
    return soft_divergence(teacher(a).softmax(1), student(a))


def linear(student: nn.Module, teacher: nn.Module, x: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """SAAD: K(p || S(a)), p = T(x) but T_y(x) + 0.5 <grad T_y(x), a - x>; by the Jacobian of the probabilities."""
    jacobian = torch.autograd.functional.jacobian(lambda images: teacher(images).softmax(1).sum(0), x)
    slope = torch.stack([jacobian[label, sample] for sample, label in enumerate(y.tolist())])
    p = teacher(x).softmax(1).detach()
    onehot = F.one_hot(y, 5).to(p.dtype)
    return soft_divergence(p + onehot * 0.5 * (slope * (a - x)).sum((1, 2, 3))[:, None], student(a))


TEACHER_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl-teacher": fixed,
    "kl-teacher-moving": moving,
    "kl-teacher-linear": linear,
}


def test_every_loss_has_its_transcription() -> None:
    assert {*LOSSES, *TEACHER_LOSSES} == set(ATTACK_LOSSES)


def teacher_network() -> nn.Module:
    """Another network, in evaluation mode, whose probabilities are far from 0."""
    teacher = network().eval()
    with torch.no_grad():
        teacher.conv.weight.mul_(-0.4)
        teacher.linear.weight.mul_(0.2)
    return teacher


@pytest.mark.parametrize("loss", TEACHER_LOSSES)
def test_losses_with_a_teacher_equal_their_transcriptions(loss: str) -> None:
    model, teacher, (x_nat, labels) = network(), teacher_network(), batch()
    attack = spec(loss=loss, slope=0.5, bn="eval")
    start = some_start(x_nat, attack.epsilon, "Linf")
    plain = copy.deepcopy(model).eval()
    adv = (x_nat + start).clip(0, 1)
    for _ in range(attack.num_steps):
        adv = adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(TEACHER_LOSSES[loss](plain, teacher, x_nat, adv, labels), adv)
        adv = (x_nat + (adv + attack.step_size * g.sign() - x_nat).clip(-attack.epsilon, attack.epsilon)).clip(
            0, 1
        )
    x_adv = pgd(model, x_nat, labels, attack, start=start, teacher=teacher)
    torch.testing.assert_close(x_adv, adv.detach(), rtol=0, atol=1e-12)
    others = [
        pgd(model, x_nat, labels, spec(loss=other, bn="eval"), start=start, teacher=teacher)
        for other in {*LOSSES, *TEACHER_LOSSES} - {loss}
    ]
    assert all(not torch.allclose(x_adv, other, rtol=0, atol=1e-3) for other in others)
    assert all(value.requires_grad for value in teacher.parameters())


@pytest.mark.parametrize("loss", [*LOSSES, *TEACHER_LOSSES])
def test_the_teacher_runs_where_the_loss_reads_it_and_nowhere_else(loss: str) -> None:
    attack, teacher, calls = spec(loss=loss, bn="eval"), teacher_network(), list[None]()
    teacher.register_forward_hook(lambda *_: calls.append(None))
    pgd(network(), *batch(), attack, teacher=teacher)
    once = {"kl-teacher": 1, "kl-teacher-moving": attack.num_steps, "kl-teacher-linear": 1}
    assert len(calls) == once.get(loss, 0)


@pytest.mark.parametrize("loss", TEACHER_LOSSES)
def test_a_loss_with_a_teacher_asks_for_one(loss: str) -> None:
    with pytest.raises(ValueError, match=rf"^attack.loss: '{loss}' needs .*, and there is none$"):
        pgd(network(), *batch(), spec(loss=loss))


def test_a_linear_probability_below_0_has_a_finite_gradient() -> None:
    model, teacher, (x_nat, labels) = network(), teacher_network(), batch()
    counts = torch.zeros(2, dtype=torch.int64)
    pgd(model, x_nat, labels, spec(loss="kl-teacher-linear", slope=1e4, bn="eval"), counts=counts, teacher=teacher)
    assert counts[1] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threat_model", BALLS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("clamp_start", [True, False], ids=["clamped", "unclamped"])
def test_pgd_equals_its_transcription(mode: str, threat_model: str, loss: str, clamp_start: bool) -> None:
    model, (x_nat, labels) = network(), batch()
    attack = spec(threat_model, loss=loss, bn=mode, clamp_start=clamp_start)
    start = some_start(x_nat, attack.epsilon, threat_model)
    # In train mode a forward normalises by the batch, and the copy's statistics are its own.
    twin = copy.deepcopy(model).train(mode != "eval")
    if loss == "dlr":  # which is constant where the true class is the third: its gradient is rounding alone
        labels = copy.deepcopy(twin)(x_nat).argmax(dim=1)
    expected = transcription(twin, x_nat, labels, start, attack, LOSSES[loss])

    x_adv = pgd(model, x_nat, labels, attack, start=start)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert distance(x_adv, x_nat, threat_model) > 0.5 * attack.epsilon
    if mode == "train":
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=1e-12)


def test_the_three_modes_of_batch_norm_are_different_attacks_where_they_should_be() -> None:
    x_nat, labels = batch()
    x_adv = {mode: pgd(network(), x_nat, labels, spec("L2", bn=mode)) for mode in MODES}
    assert torch.equal(x_adv["train"], x_adv["batch"])
    assert (x_adv["eval"] - x_adv["batch"]).abs().max() > 1e-3


def test_a_margin_below_minus_kappa_is_left_alone() -> None:
    model, (x_nat, labels) = network().eval(), batch()
    with torch.no_grad():
        logits = model(x_nat)
    # Labels that the model already misses: half of them by more than kappa.
    labels = logits.argmin(dim=1)
    margins = logits.gather(1, labels[:, None])[:, 0] - logits.amax(dim=1)
    kappa = float(-margins.median()) - 1e-6
    still = margins + kappa < 0
    assert 0 < still.sum() < len(still)
    x_adv = pgd(model, x_nat, labels, spec(loss="cw", kappa=kappa, random_start="none", num_steps=1))
    assert torch.equal((x_adv == x_nat).flatten(1).all(dim=1), still)


# many parameters: hypothesis draws each key of the attack by itself.
@settings(max_examples=60, deadline=None)
@given(
    threat_model=st.sampled_from(["Linf", "L2"]),
    epsilon=st.floats(0, 1),
    step_size=st.floats(0, 1),
    num_steps=st.integers(0, 4),
    random_start=st.sampled_from(["none", "uniform", "gaussian"]),
    clamp_start=st.booleans(),
    loss=st.sampled_from(sorted(LOSSES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**63),
)
def test_x_adv_lies_in_the_ball_and_in_the_range_of_images(
    threat_model: str,
    epsilon: float,
    step_size: float,
    num_steps: int,
    random_start: str,
    clamp_start: bool,
    loss: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    seed: int,
) -> None:
    model, (x_nat, labels) = network(dtype=dtype), batch(dtype=dtype)
    x_nat = x_nat.to(memory_format=layout)
    if threat_model == "L2":
        epsilon, step_size = 2 * epsilon, 2 * step_size
    attack = AttackSpec.model_validate(
        {
            "threat_model": threat_model,
            "epsilon": epsilon,
            "step_size": step_size,
            "num_steps": num_steps,
            "random_start": random_start,
            "gaussian_std": min(0.001, epsilon / 20) or 1e-9,  # else a start without a step may leave the ball
            "clamp_start": clamp_start,
            "loss": loss,
        }
    )
    x_adv = pgd(model, x_nat, labels, attack, seed=seed)
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad
    assert distance(x_adv, x_nat, threat_model) <= epsilon + 1e-6
    if num_steps or clamp_start:  # a start that is not clamped is the user's wish
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1


def test_a_gradient_does_not_depend_on_the_batch_size() -> None:
    x_nat, labels = batch()
    attack = spec("L2", bn="eval")
    together = pgd(network(), x_nat, labels, attack)
    alone = [
        pgd(network(), x_nat[i : i + 1], labels[i : i + 1], attack, sample=torch.tensor([i])) for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)


class HalfPrecision(nn.Module):
    """A model whose backward runs in float16; slope: of the cross-entropy in every pixel."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, images: Tensor) -> Tensor:
        total = images.to(torch.float16).flatten(1).sum(dim=1).float()
        value = self.slope * (total - 2)  # both classes at 1/2 where the mean pixel is
        return torch.stack((value, -value), dim=1)


@pytest.mark.parametrize("size", [2, 128])
def test_the_loss_scale_saves_a_gradient_that_half_precision_loses(size: int) -> None:
    """The smallest number of float16 is 6e-8; a mean over the batch would need a larger scale the larger it is."""
    x_nat, labels = torch.full((size, 1, 2, 2), 0.5), torch.arange(size) % 2
    attack = spec(num_steps=1, random_start="none")
    model = HalfPrecision(slope=1e-9)
    assert torch.equal(pgd(model, x_nat, labels, attack), x_nat)
    moved = pgd(model, x_nat, labels, attack, loss_scale=1024.0) - x_nat
    expected = (torch.where(labels == 0, -3 / 255, 3 / 255))[:, None, None, None].expand_as(moved)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_autocast_reaches_every_forward() -> None:
    model, (x_nat, labels) = network(dtype=torch.float32), batch(dtype=torch.float32)
    seen: list[torch.dtype] = []
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    pgd(
        model,
        x_nat,
        labels,
        spec(loss="kl", num_steps=3),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert seen == [torch.bfloat16] * 4


def test_the_attack_works_where_gradients_are_off() -> None:
    x_nat, labels = batch()
    expected = pgd(network(), x_nat, labels, spec())
    with torch.no_grad():
        assert torch.equal(pgd(network(), x_nat, labels, spec()), expected)


# ---------------------------------------------------------------- the random start


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("threat_model", BALLS)
def test_the_start_is_that_of_the_sample(kind: str, threat_model: str) -> None:
    model, (x_nat, labels) = network(), batch()
    only_start = spec(threat_model, num_steps=0, random_start=kind)
    sample = torch.tensor([3, 14, 15, 92, 65, 35])
    in_order, order = torch.arange(6), torch.tensor([5, 2, 0, 1, 4, 3])

    def started(seed: int = 1, counter: int = 2, order: Tensor = in_order) -> Tensor:
        return pgd(
            model, x_nat[order], labels[order], only_start, seed=seed, counter=counter, sample=sample[order]
        )

    assert torch.equal(started(order=order), started()[order])
    assert not torch.equal(started(seed=2), started())
    assert not torch.equal(started(counter=3), started())
    assert 0 < distance(started(), x_nat, threat_model) <= only_start.epsilon + 1e-6


def test_the_start_is_clamped_only_where_asked() -> None:
    x_nat, labels = torch.zeros(4, 3, 6, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    free = pgd(network(), x_nat, labels, spec(num_steps=0, clamp_start=False))
    assert free.min() < -0.5 * spec().epsilon
    assert torch.equal(pgd(network(), x_nat, labels, spec(num_steps=0)), free.clamp(0, 1))


def test_without_sample_the_rows_of_the_batch_are_numbered() -> None:
    x_nat, labels = batch()
    assert torch.equal(
        pgd(network(), x_nat, labels, spec()), pgd(network(), x_nat, labels, spec(), sample=torch.arange(6))
    )


# ---------------------------------------------------------------- gradients that are zero or not a number


class Logits(nn.Module):
    """Logits that are a given function of the mean pixel; a function of nothing has gradient zero."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        value = self.function(images.flatten(1).mean(dim=1))
        return torch.stack((value, torch.zeros_like(value)), dim=1)


@pytest.mark.parametrize("threat_model", BALLS)
def test_a_sample_with_zero_gradient_stays(threat_model: str) -> None:
    x_nat, labels = batch()
    x_nat[:3] *= 0.1  # a mean below the threshold of 0.3 has no gradient
    model = Logits(lambda mean: F.relu(mean - 0.3))
    x_adv = pgd(model, x_nat, labels % 2, spec(threat_model, random_start="none"))
    assert torch.equal(x_adv[:3], x_nat[:3])
    assert (x_adv[3:] - x_nat[3:]).flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("threat_model", BALLS)
def test_the_gradients_of_all_steps_are_counted(threat_model: str) -> None:
    x_nat, labels = batch()
    model = network().eval()
    entries = 5 * x_nat.numel()

    def count(model: nn.Module, images: Tensor) -> list[int]:
        counts = torch.tensor([1000, 2000])
        pgd(model, images, labels, spec(threat_model, bn="eval"), counts=counts)
        return (counts - torch.tensor([1000, 2000])).tolist()

    assert count(model, x_nat) == [0, 0]
    # The first image of the six is not seen by a model that multiplies it with 0.
    seen = (torch.arange(6) > 0).double()[:, None, None, None]
    assert count(Scaled(model, seen), x_nat) == [entries // 6, 0]
    assert count(Scaled(model, seen * torch.inf), x_nat)[1] == entries


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images * self.factor)
        return logits


def test_nan_gradients_leave_linf_images_and_show_in_l2_images() -> None:
    x_nat, labels = batch()
    x_nat[0] = 0.0  # sqrt has an infinite slope at 0, and 0 * infinity is NaN
    model = Logits(lambda mean: (mean * 0).sqrt() + mean)
    linf = pgd(model, x_nat, labels % 2, spec(random_start="none"))
    assert torch.equal(linf, x_nat)
    l2 = pgd(model, x_nat, labels % 2, spec("L2", random_start="none"))
    assert l2.isnan().all()


# ---------------------------------------------------------------- what the attack leaves behind


@pytest.mark.parametrize("loss", LOSSES)
def test_train_mode_moves_the_running_statistics_once_per_forward(loss: str) -> None:
    model, (x_nat, labels) = network(), batch()
    mean, var = (model.get_buffer(f"norm.running_{name}").clone() for name in ("mean", "var"))
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    pgd(model, x_nat, labels, spec(bn="train", loss=loss, num_steps=4))

    assert len(seen) == 4 + (loss == "kl")
    for features in seen:
        mean = 0.9 * mean + 0.1 * features.mean((0, 2, 3))
        var = 0.9 * var + 0.1 * features.transpose(0, 1).flatten(1).var(dim=1, correction=1)
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, var, rtol=0, atol=1e-12)
    assert model.norm.num_batches_tracked == len(seen)
    if loss == "kl":  # the first forward is that of the clean images
        torch.testing.assert_close(seen[0], F.conv2d(x_nat, model.conv.weight, padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("loss", LOSSES)
def test_eval_and_batch_mode_leave_every_buffer(mode: str, loss: str) -> None:
    model, (x_nat, labels) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    pgd(model, x_nat, labels, spec(bn=mode, loss=loss))
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }


def flags(model: nn.Module) -> list[Any]:
    return [
        *((name, module.training) for name, module in model.named_modules()),
        *((name, getattr(module, "track_running_stats", None)) for name, module in model.named_modules()),
        *((name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()),
    ]


class Broken(Exception):
    pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails_at", [None, 0, 2], ids=["runs", "fails at once", "fails later"])
def test_modes_and_flags_come_back(mode: str, fails_at: int | None) -> None:
    model, (x_nat, labels) = network(), batch()
    model.unused = nn.BatchNorm1d(5, track_running_stats=False)
    model.norm.eval()  # modes and frozen parameters of a kind that no single flag could restore
    model.conv.requires_grad_(False)
    before, calls = flags(model), 0

    def forward_hook(module: nn.Module, inputs: object) -> None:
        nonlocal calls
        norms = (model.norm, model.unused)
        assert all(part.training == (mode != "eval" and part in norms) for part in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        if calls == fails_at:
            raise Broken
        calls += 1

    model.register_forward_pre_hook(forward_hook)
    if fails_at is None:
        pgd(model, x_nat, labels, spec(bn=mode))
        assert calls == 5
    else:
        with pytest.raises(Broken):
            pgd(model, x_nat, labels, spec(bn=mode))
    assert flags(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        False,
        True,
        True,
        True,
        True,
        True,
        True,
    ]


def test_the_context_managers_nest() -> None:
    model = network()
    before = flags(model)
    with frozen(model), batch_norm_mode(model, "eval"):
        inner = flags(model)
        with frozen(model), batch_norm_mode(model, "batch"):
            assert model.norm.training
        assert flags(model) == inner
    assert flags(model) == before


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_dropped_out_in_an_attack(mode: str) -> None:
    """As in the training, whose attack is on a twin."""
    model, (x_nat, labels) = nn.Sequential(nn.Dropout(0.5), network()), batch()
    assert torch.equal(pgd(model, x_nat, labels, spec(bn=mode)), pgd(network(), x_nat, labels, spec(bn=mode)))


class Convolutions(TorchDispatchMode):
    """Gradients that each convolution's backward was asked for: image, weight, bias."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_no_weight_gradient_is_computed(mode: str) -> None:
    model, (x_nat, labels) = network(), batch()
    with Convolutions() as convolutions:
        pgd(model, x_nat, labels, spec(bn=mode, num_steps=3))
    assert convolutions.asked == [[True, False, False]] * 3
    with Convolutions() as convolutions:  # what the attack would cost with parameters that are not frozen
        torch.autograd.grad(model(x_nat.requires_grad_()).sum(), [x_nat, *model.parameters()])
    assert convolutions.asked == [[True, True, False]]


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "num_steps", "step", "start", "loss"),
    [
        ("fgsm", 1, 8, "none", "ce"),
        ("fgsm-rs", 1, 8, "uniform", "ce"),
        ("pgd10", 10, 2, "uniform", "ce"),
        ("pgd20", 20, 2, "uniform", "ce"),
        ("cw", 30, 2, "uniform", "cw"),
    ],
)
def test_presets_have_the_numbers_of_the_paper(
    name: str, num_steps: int, step: int, start: str, loss: str
) -> None:
    attack = preset(name, 8 / 255)
    assert attack == presets()[name]
    assert attack.epsilon == 8 / 255
    assert attack.step_size == pytest.approx(step / 255, rel=1e-15)
    assert (attack.num_steps, attack.random_start, attack.loss) == (num_steps, start, loss)
    assert (attack.threat_model, attack.bn, attack.clamp_start, attack.kappa) == ("Linf", "eval", True, 50.0)


def test_presets_scale_with_epsilon_and_take_the_threat_model() -> None:
    assert set(presets()) == {"fgsm", "fgsm-rs", "pgd10", "pgd20", "cw", "pgd20-dlr"}
    attack = preset("pgd20", 0.5, "L2")
    assert (attack.threat_model, attack.epsilon, attack.step_size) == ("L2", 0.5, 0.125)
    assert preset("fgsm", 0.5, "L2").step_size == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("pdg20", 8 / 255), "attack: 'pdg20' is not known; did you mean 'pgd20'"),
        (lambda: presets(-1.0), "epsilon: "),
        (lambda: presets(math.nan), "epsilon: "),
        (lambda: presets(8 / 255, "L1"), "threat_model: "),
    ],
)
def test_a_wrong_preset_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (
            presets()["pgd20"],
            "L-inf, epsilon 8/255, 20 steps of 2/255, random start, cross-entropy, BN eval",
        ),
        (presets()["fgsm"], "L-inf, epsilon 8/255, 1 step of 8/255, from x, cross-entropy, BN eval"),
        (presets()["cw"], "L-inf, epsilon 8/255, 30 steps of 2/255, random start, CW margin, kappa 50, BN eval"),
        (
            spec("L2", loss="kl", random_start="gaussian", bn="train"),
            "L2, epsilon 0.6, 5 steps of 0.25, start 0.001 N(0,1), KL to S(x), BN train",
        ),
        (
            spec(clamp_start=False, bn="batch"),
            "L-inf, epsilon 8/255, 5 steps of 3/255, random start not clamped, cross-entropy, BN batch",
        ),
    ],
)
def test_a_description_tells_every_number(attack: AttackSpec, expected: str) -> None:
    assert describe(attack) == expected


# ---------------------------------------------------------------- another library


@pytest.mark.parametrize(
    ("name", "keys", "attack"),
    [
        ("FGSM", {"eps": 8 / 255}, presets()["fgsm"]),
        (
            "PGD",
            {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "random_start": False},
            presets()["pgd10"].model_copy(update={"random_start": "none"}),
        ),
        (
            "PGDL2",
            {"eps": 0.6, "alpha": 0.25, "steps": 10, "random_start": False},
            spec("L2", num_steps=10, random_start="none"),
        ),
    ],
)
def test_torchattacks_finds_the_same_images(name: str, keys: dict[str, Any], attack: AttackSpec) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    x_nat, labels = batch()
    expected = getattr(torchattacks, name)(network().eval(), **keys)(x_nat, labels)
    assert expected.dtype == torch.float64
    # PGDL2 adds 1e-10 to a gradient's norm.
    torch.testing.assert_close(pgd(network(), x_nat, labels, attack), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("project", "start_epsilon", "reach"), [(True, None, 0.1), (True, 0.2, 0.1), (False, 0.2, 0.3)]
)
def test_the_starts_and_ends_of_one_step_training(
    project: bool, start_epsilon: float | None, reach: float
) -> None:
    """N-FGSM: |x~ - x| reaches 2 epsilon + epsilon; FGSM-RS: never beyond epsilon."""
    net = models.build("resnet8", 3).eval()
    x_nat, labels = torch.full((8, 3, 8, 8), 0.5), torch.arange(8) % 3
    one = validated(
        AttackSpec,
        {"epsilon": 0.1, "step_size": 0.1, "num_steps": 1, "project": project, "start_epsilon": start_epsilon},
    )
    begin = pgd(net, x_nat, labels, one.model_copy(update={"num_steps": 0}), seed=1) - x_nat
    radius = start_epsilon or 0.1
    assert 0.95 * radius < begin.abs().max() <= radius + 1e-6
    assert begin.double().std() == pytest.approx(radius / 3**0.5, rel=0.05)
    end = pgd(net, x_nat, labels, one, seed=1) - x_nat
    assert 0.95 * reach < end.abs().max() <= reach + 1e-6
    moved = (end - begin).abs()
    if not project:
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1))
    words = describe(one)
    assert ("not projected" in words, "random start in 51/255" in words) == (not project, start_epsilon == 0.2)


def test_a_radius_is_of_a_uniform_start() -> None:
    with pytest.raises(ValueError, match=r"attack\.start_epsilon: it is of a uniform start.*'gaussian'"):
        config.load({"method": "at", "attack": {"start_epsilon": 0.1, "random_start": "gaussian"}})

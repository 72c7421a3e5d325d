"""One update: parts of a batch, weights' own attack, averages, clipping; against references in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import config, methods, models
from engine.common.numbers import ceil_div
from engine.common.stopping import RunFailed
from engine.pipelines.base import Batch
from engine.runs import lifecycle
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training.learner import Learner
from engine.training.weights import awp

F64 = Precision(torch.device("cpu"), torch.float64)
SIZE = 8


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return F64.place(models.build("resnet8", 4))


def batch(count: int = SIZE, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (count,), generator=generator)
    return Batch(images.to(memory_format=torch.channels_last), labels, torch.arange(count))


def learner(method: str = "iad1", student: nn.Module | None = None, **keys: Any) -> Learner:
    base = {"method": method, "model": "resnet8", "dtype": "float64", "device": "cpu", "attack": {"num_steps": 2}}
    complete = config.load(base, keys)
    row = methods.get(method, semantics=complete.semantics, loss=complete.loss)
    teachers = {"teacher": network(1).eval(), "teacher_st": network(2).eval()}
    counts = torch.zeros(2, dtype=torch.int64)
    return Learner(student or network(0).train(), teachers, row, complete, F64, counts=counts)


def learn(one: Learner, given: Batch, epoch: int = 5, lr: float = 0.1) -> list[Any]:
    seen: list[Any] = []
    whole = len(given.labels)
    one.learn(
        given, one.method, lr, epoch=epoch, global_batch_size=whole, on_output=lambda *output: seen.append(output)
    )
    return seen


def weights(one: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in one.student.state_dict().items()}


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], within: float = 1e-12) -> None:
    for name, value in left.items():
        assert torch.allclose(right[name].double(), value.double(), rtol=within, atol=within), name


# ---------------------------------------------------------------- micro-batches


SAMPLE_BY_SAMPLE = [name for name, method in ((name, methods.get(name)) for name in methods.METHODS)
                    if all(weight.factor is None for weight in method.weights.values())]  # fmt: skip
"""Methods in whose loss no sample's weight depends on the others of its batch."""


@pytest.mark.parametrize("method", SAMPLE_BY_SAMPLE)
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batches_give_the_update_of_the_whole(method: str, micro_batch: int) -> None:
    """With BatchNorm in evaluation mode, where a sample's passes do not depend on its neighbours."""
    whole = learner(method, network(0).eval(), attack={"bn": "eval"})
    parted = learner(method, network(0).eval(), attack={"bn": "eval"}, micro_batch=micro_batch)
    assert len(learn(whole, batch())) == 1
    assert len(learn(parted, batch())) == ceil_div(SIZE, micro_batch)
    assert_near(weights(whole), weights(parted))


def test_with_statistics_of_the_batch_each_part_is_normalised_by_itself() -> None:
    """The gradient is the mean of the parts' by images, and running statistics move once for each part."""
    given, one = batch(6), learner("at", micro_batch=4)  # two parts of 3
    start = weights(one)
    learn(one, given)
    alone = []
    statistics = {name: value for name, value in start.items() if "running" in name}
    for first in (0, 3):
        part = given.split(2)[first // 3]
        other = learner("at")
        other.student.load_state_dict(start | statistics)
        learn(other, part)
        alone.append(weights(other))
        statistics = {name: value for name, value in alone[-1].items() if "running" in name}
    # The second part is attacked with the statistics that the first one left, and so stands for what follows it.
    expected = {
        name: alone[1][name] if "running" in name else (alone[0][name] + alone[1][name]) / 2
        for name in start
        if "num_batches" not in name
    }
    assert_near(expected, weights(one))


class Small(nn.Module):
    """Runs out of memory above so many images, as a small GPU does."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[0] > self.most:
            raise torch.OutOfMemoryError
        out: Tensor = self.inner(images)
        return out


@pytest.mark.parametrize(("most", "found"), [(100, 8), (7, 4), (3, 2), (1, 1)])
def test_auto_finds_the_micro_batch_that_fits_and_leaves_no_trace(most: int, found: int) -> None:
    one = learner("iad1", Small(network(0).train(), most), micro_batch="auto")
    before, given = weights(one), batch()
    assert one.seeks_micro_batch
    assert one.find_micro_batch(given, one.method, epoch=5, global_batch_size=SIZE) == found
    assert not one.seeks_micro_batch
    assert one.networks.adversary is not None
    assert all(torch.equal(value, before[name]) for name, value in weights(one).items())
    assert all(weight.grad is None for weight in one.student.parameters())
    assert one.networks.adversary.counts is not None
    assert one.networks.adversary.counts.sum() == 0
    asked = learner("iad1", Small(network(0).train(), most), micro_batch=found)
    for each in (one, asked):
        learn(each, given)
    assert all(torch.equal(value, weights(asked)[name]) for name, value in weights(one).items())


def test_no_memory_for_one_image_is_said() -> None:
    one = learner("at", Small(network(0).train(), 0), micro_batch="auto")
    with pytest.raises(RunFailed, match="memory"):
        one.find_micro_batch(batch(), one.method, epoch=0, global_batch_size=SIZE)


def test_what_auto_found_holds_for_the_whole_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = models.build

    def small(name: str, *arguments: Any, **keys: Any) -> nn.Module:
        def limit(module: nn.Module, images: tuple[Tensor]) -> None:
            if module.training and images[0].shape[0] > 5:
                raise torch.OutOfMemoryError

        inner = whole(name, *arguments, **keys)
        inner.register_forward_pre_hook(limit)
        return inner

    monkeypatch.setattr(models, "build", small)
    out = tmp_path / "run"
    lifecycle.train(tiny.config(method="st", out=str(out), micro_batch="auto"))
    assert torch.load(out / "last.pt", weights_only=True)["micro_batch"] == 4


# ---------------------------------------------------------------- the weights' own attack


def test_weight_perturbation_equals_its_definition() -> None:
    """One update of AT with AWP, written out: gradient at w + gamma |w|/|g| g, applied to w."""
    gamma, lr, decay = 0.01, 0.1, 2e-4
    given = batch()
    one = learner("at", awp={"gamma": gamma}, attack={"num_steps": 0, "random_start": "none"})
    reference = copy.deepcopy(one.student)
    learn(one, given, lr=lr)

    moved = copy.deepcopy(reference)
    loss = F.cross_entropy(moved(given.x_nat), given.labels)
    gradients = torch.autograd.grad(loss, list(moved.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(moved.parameters(), gradients, strict=True):
            if weight.dim() > 1:
                weight.add_(gamma * weight.norm() / gradient.norm() * gradient)
    moved.load_state_dict(dict(reference.named_buffers()), strict=False)
    F.cross_entropy(moved(given.x_nat), given.labels).backward()
    for (name, weight), at in zip(reference.named_parameters(), moved.parameters(), strict=True):
        assert at.grad is not None
        expected = weight.detach() - lr * (at.grad + decay * weight.detach())
        assert torch.allclose(dict(one.student.named_parameters())[name], expected, rtol=1e-9, atol=1e-12), name
    for name, value in moved.named_buffers():  # statistics moved once, in the pass that is trained
        assert torch.allclose(dict(one.student.named_buffers())[name].double(), value.double(), rtol=1e-9), name


def test_weights_are_perturbed_from_their_start_on() -> None:
    plain, late = learner("at"), learner("at", awp={"gamma": 0.01, "start": 3}, epochs=10)
    for epoch, same in ((2, True), (3, False)):
        for one in (plain, late):
            learn(one, batch(seed=epoch), epoch=epoch)
        assert all(torch.equal(value, weights(late)[name]) for name, value in weights(plain).items()) == same


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_a_perturbation_of_size_zero_changes_nothing(method: str) -> None:
    """Every method's loss can be perturbed; what is left of it at size zero is the update itself."""
    plain, tiny_one = learner(method), learner(method, awp={"gamma": 1e-15})
    for one in (plain, tiny_one):
        learn(one, batch())
    assert_near(weights(plain), weights(tiny_one), 1e-9)


# ---------------------------------------------------------------- averages


def test_the_exponential_average_is_its_definition() -> None:
    """m_1 = w_1, m_t = decay m_(t-1) + (1 - decay) w_t; running statistics alike."""
    one = learner("at", averaging={"kind": "ema", "decay": 0.75})
    assert one.evaluated is one.student
    expected: dict[str, Tensor] = {}
    for step in range(4):
        learn(one, batch(seed=step))
        now = weights(one)
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now} if expected else now
    averaged = one.evaluated.state_dict()
    assert one.evaluated is not one.student
    assert_near({name: value for name, value in expected.items() if "num_batches" not in name}, averaged)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_has_the_students_indices(kind: str) -> None:
    """As of relative positions: a mean of equal integers may be rounded down."""
    student, index = network(0).train(), torch.arange(300)
    student.register_buffer("index", index.clone(), persistent=False)
    one = learner("st", student, averaging={"kind": kind, "start": 0, "decay": 0.9995})
    for epoch in range(3):
        learn(one, batch(), epoch=epoch)
        assert one.average is not None
        one.average.after_epoch(epoch, iter([batch()]), SIZE, World())
    assert one.evaluated is not student
    assert torch.equal(one.evaluated.get_buffer("index"), index)


def test_the_mean_of_weights_has_statistics_of_its_own() -> None:
    one = learner("at", averaging={"kind": "swa", "start": 1}, epochs=10)
    every, kept = [batch(seed=index) for index in range(3)], []
    for epoch in range(3):
        for given in every:
            learn(one, given, epoch=epoch)
        assert one.average is not None
        for _ in range(2):  # as where the evaluation of an epoch is interrupted, and done again
            one.average.after_epoch(epoch, iter(every), 3 * SIZE, World())
        assert one.average.has_begun == (epoch >= 1)
        kept.append(weights(one))
    averaged = one.evaluated
    for name, value in averaged.named_parameters():
        assert torch.allclose(value, (kept[1][name] + kept[2][name]) / 2, rtol=1e-12, atol=1e-15), name
    # The first BatchNorm's input is a convolution of the images, whose statistics are easily written out.
    inputs = [averaged.conv1(given.x_nat) for given in every]  # type: ignore[operator]
    mean_C = torch.stack([values.mean((0, 2, 3)) for values in inputs]).mean(0)
    var_C = torch.stack([values.var((0, 2, 3)) for values in inputs]).mean(0)
    assert torch.allclose(averaged.bn1.running_mean, mean_C, rtol=1e-9)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(averaged.bn1.running_var, var_C, rtol=1e-9)  # type: ignore[union-attr, arg-type]
    assert not averaged.training


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_average_is_what_is_measured_and_kept(kind: str, tiny: Any, tmp_path: Path) -> None:
    averaging = {"kind": kind, "decay": 0.5}
    result = lifecycle.train(tiny.config(method="at", out=str(tmp_path / "run"), averaging=averaging))
    best, last = (torch.load(result.path / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    averaged = {
        name.removeprefix("module."): value for name, value in last["averaged"].items() if name != "n_averaged"
    }
    if result.summary["best"]["epoch"] == 2:
        assert all(torch.equal(value, averaged[name]) for name, value in best["student"].items())
    assert any(not torch.equal(value, averaged[name]) for name, value in last["student"].items())


# ---------------------------------------------------------------- clipping


def test_gradients_are_clipped_to_their_norm() -> None:
    """The first update of SGD without decay is lr times the gradient: its length is the limit."""
    lr, limit = 0.1, 0.05
    one = learner("iad1", optim={"clip_norm": limit, "weight_decay": 0})
    free = learner("iad1", optim={"weight_decay": 0})
    start = [weight.detach().clone() for weight in one.student.parameters()]
    for each in (one, free):
        learn(each, batch(), lr=lr)

    def update(each: Learner) -> Tensor:
        pairs = zip(each.student.parameters(), start, strict=True)
        return torch.cat([(weight.detach() - was).flatten() for weight, was in pairs]) / lr

    clipped, whole = update(one), update(free)
    assert whole.norm() > 2 * limit
    assert float(clipped.norm()) == pytest.approx(limit, rel=1e-4)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), rtol=1e-4, atol=1e-9)


def test_the_attack_on_the_weights_lies_within_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []
    seen: list[list[str]] = []
    ascend = awp._ascend

    @contextmanager
    def note(name: str) -> Iterator[None]:
        ranges.append(name)
        yield
        ranges.remove(name)

    def noted(*given: Any) -> None:
        seen.append(list(ranges))
        ascend(*given)

    monkeypatch.setattr(awp, "record_function", note)
    monkeypatch.setattr(awp, "_ascend", noted)
    learn(learner("at", awp={"gamma": 0.01}), batch())
    assert seen == [["weight attack"]]

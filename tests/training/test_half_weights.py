"""Training on half-precision copies of the weights that the optimizer writes: the bits are autocast's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import config, methods, models
from engine.pipelines.base import Batch
from engine.system import precision
from engine.system.distributed import World
from engine.training import learner as learners
from engine.training.capture import captured_step
from engine.training.learner import Learner
from engine.training.weights import half_weights
from engine.training.weights.half_weights import HalfWeights
from tests.processes import together

BATCH, CLASSES, SIDE = 8, 4, 8


@pytest.fixture(autouse=True)
def fast_half(bf16: None) -> None:
    """bfloat16 is what --amp chooses."""


def learner(
    method: str,
    *,
    halves: bool,
    student: Callable[[], nn.Module] = lambda: network(),
    world: World | None = None,
    **keys: Any,
) -> Learner:
    """A learner of a small network; without half weights by autocast alone."""
    base = {
        "method": method, "model": "resnet8", "device": "cpu", "amp": True, "amp_dtype": "bfloat16",
        "batch_size": BATCH, "attack": {"num_steps": 2},
    }  # fmt: skip
    run = config.load(base, keys)
    place = precision.choose(run)
    torch.manual_seed(0)
    student, at, st = (place.place(net) for net in (student(), network(), network()))
    row = methods.get(method, semantics=run.semantics, loss=run.loss)
    build = half_weights.build if halves else mock.Mock(return_value=None)
    with mock.patch.object(half_weights, "build", build):
        teachers = {"teacher": at.eval(), "teacher_st": st.eval()}
        return Learner(student.train(), teachers, row, run, place, world)


def network() -> nn.Module:
    return models.build("resnet8", CLASSES)


def batches(count: int) -> Iterator[Batch]:
    for seed in range(count):
        images = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        yield Batch(
            images.to(memory_format=torch.channels_last), torch.arange(BATCH) % CLASSES, torch.arange(BATCH)
        )


def learn(one: Learner, count: int = 3) -> dict[str, Tensor]:
    for batch in batches(count):
        one.learn(batch, one.method, 0.05, epoch=5)
    momenta = {
        f"momentum {number}": state["momentum_buffer"].clone()
        for number, state in one.optimizer.state_dict()["state"].items()
    }
    return {name: value.clone() for name, value in one.student.state_dict().items()} | momenta


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


VARIANTS: dict[str, dict[str, Any]] = {
    "folded twin": {"attack": {"num_steps": 2, "bn": "eval"}},
    "nesterov": {"optim": {"nesterov": True}},
    "groups": {"optim": {"layer_decay": 0.5, "decay_norms_and_biases": False}},
    "without momentum": {"optim": {"momentum": 0.0}},
    "float16": {"amp_dtype": "float16"},
    "idle forwards": {"semantics": "official"},
}


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_bits_are_those_of_autocast(method: str) -> None:
    assert_same(learn(learner(method, halves=True)), learn(learner(method, halves=False)))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_bits_are_those_of_autocast_with(name: str) -> None:
    one = learner("iad2", halves=True, **VARIANTS[name])
    assert one.halves is not None
    assert_same(learn(one), learn(learner("iad2", halves=False, **VARIANTS[name])))


def layers(one: Learner) -> set[str]:
    """Names of the weights that have copies."""
    assert one.halves is not None
    return {name for name, weight in one.student.named_parameters() if weight in one.halves.of}


def test_convolutions_have_copies_but_for_the_first_which_is_in_full_precision() -> None:
    one = learner("iad1", halves=True)
    expected = {
        f"{name}.weight"
        for name, module in one.student.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels != 3
    }
    assert layers(one) == expected
    assert len(expected) == 8


class Conversions(TorchDispatchMode):
    """Shapes of tensors that are converted from one floating format to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if found.dtype != source.dtype:
                self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize("method", methods.METHODS)
def test_no_weight_and_no_gradient_of_one_is_converted(method: str) -> None:
    """Beside the update itself, which a kernel of ours makes on a GPU: attack, passes, and backward."""
    counts = []
    for halves in (True, False):
        one = learner(method, halves=halves)
        learn(one, 1)
        shapes = {tuple(weight.shape) for weight in one.student.parameters() if weight.dim() == 4}
        (batch,) = batches(1)
        with Conversions() as conversions:
            one.step.differentiate([batch], one.method, epoch=5, global_batch_size=BATCH, on_output=mock.Mock())
        counts.append(sum(shape in shapes for shape in conversions.shapes))
    folded = 8 if one.step.config.attack.bn == "eval" else 0  # of a twin that has taken in BatchNorm
    assert counts[0] == folded * one.method.needs_x_adv
    assert counts[1] - counts[0] >= 2 * 8


def test_the_optimizer_is_given_the_gradients_in_half_precision() -> None:
    one = learner("iad1", halves=True)
    (batch,) = batches(1)
    one.step.differentiate([batch], one.method, epoch=5, global_batch_size=BATCH, on_output=mock.Mock())
    assert one.halves is not None
    for weight in one.student.parameters():
        assert weight.grad is not None
        assert weight.grad.dtype == (torch.bfloat16 if weight in one.halves.of else torch.float32)
    assert all(half.grad is None for half in one.halves.of.values())
    assert all(weight.dtype == torch.float32 for weight in one.student.parameters())


def copies_are_the_weights(one: Learner) -> bool:
    assert one.halves is not None
    return all(torch.equal(half, weight.to(half.dtype)) for weight, half in one.halves.of.items())


def test_the_twin_under_attack_reads_the_copies() -> None:
    one = learner("iad1", halves=True)
    assert one.halves is not None
    assert one.networks.adversary is not None
    learn(one)
    assert copies_are_the_weights(one)
    twin = one.networks.adversary.twin
    shared = {half.data_ptr() for half in one.halves.of.values()}
    assert shared.issubset(weight.data_ptr() for weight in twin.module.parameters())
    assert not twin._converted


def scale_of_some(student: nn.Module) -> None:
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.5)


def loaded_state(student: nn.Module) -> None:
    student.load_state_dict({name: value * 0.5 for name, value in student.state_dict().items()})


def other_memory(student: nn.Module) -> None:
    for weight in student.parameters():
        weight.data = weight.data * 0.5


@pytest.mark.parametrize("change", [scale_of_some, loaded_state, other_memory])
def test_weights_that_somebody_else_writes_are_noticed(change: Callable[[nn.Module], None]) -> None:
    found = []
    for halves in (True, False):
        one = learner("iad1", halves=halves)
        learn(one, 1)
        change(one.student)
        found.append(learn(one))
    assert_same(*found)


def test_what_nobody_else_writes_is_not_copied_again() -> None:
    one = learner("iad1", halves=True)
    learn(one)
    with mock.patch.object(torch, "_foreach_copy_") as copied:
        assert one.halves is not None
        one.halves.follow()
    copied.assert_not_called()


def test_a_step_that_overflows_leaves_weights_and_copies() -> None:
    one = learner("at", halves=True, amp_dtype="float16")
    learn(one, 1)
    before = learn(one, 0)
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": 2.0**40})
    learn(one, 1)
    after = learn(one, 0)
    learned = [name for name, _ in one.student.named_parameters()] + [
        name for name in before if "momentum" in name
    ]
    assert_same({name: before[name] for name in learned}, {name: after[name] for name in learned})
    assert one.scaler.get_scale() == 2.0**39
    assert copies_are_the_weights(one)
    one.scaler.update(1024.0)
    learn(one, 1)
    assert not torch.equal(learn(one, 0)[learned[0]], before[learned[0]])
    assert copies_are_the_weights(one)


def test_a_state_is_gone_on_from() -> None:
    whole = learner("iad1", halves=True)
    learn(whole)
    resumed = learner("iad1", halves=True)
    resumed.student.load_state_dict(whole.student.state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert_same(learn(resumed), learn(whole))


@pytest.mark.parametrize(
    "keys",
    [
        {"amp": False},
        {"amp_dtype": "float32"},
        {"optim": {"implementation": "adamw"}},
        {"optim": {"clip_norm": 1.0}},
        {"micro_batch": 4},
        {"micro_batch": "auto"},
        {"awp": {"gamma": 0.01}},
        {"checkpoint_activations": True},
    ],
    ids=str,
)
def test_elsewhere_autocast_converts_the_weights(keys: dict[str, Any]) -> None:
    assert learner("iad1", halves=True, **keys).halves is None


def steps_of_two(world: World, out: str) -> None:
    """Three steps of a process: with messages of torch's, and with one message between the parts of a step."""
    for name in ("torch", "one message"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learners, "_is_captured", lambda *given, name=name: name == "one message")
            patch.setattr(captured_step, "CAPTURED_AT", 100)  # there is no GPU: op by op
            one = learner("iad1", halves=True, world=world)
            assert (one.halves is not None) == (name == "one message")
            for batch in batches(3):
                own = batch.split(world.size)[world.rank]
                one.learn(own, one.method, 0.05, epoch=5, global_batch_size=BATCH)
        torch.save(learn(one, 0), f"{out}-{world.rank}-{name}.pt")


def test_processes_that_send_one_message_have_copies(tmp_path: Path) -> None:
    """Copies' gradients are averaged in float32, as torch's messages average those that autocast has converted."""
    together(2, steps_of_two, str(tmp_path / "after"))
    first, *others = (
        torch.load(tmp_path / f"after-{rank}-{name}.pt", weights_only=True)
        for rank in range(2)
        for name in ("torch", "one message")
    )
    for other in others:
        assert_same(first, other)


# ---------------------------------------------------------------- networks of others


class Reading(nn.Module):
    """Reads weights beside their layers: one is normalised, one is tied, one is hooked, one does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.normalised, self.hooked, self.plain = (
            nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8)
        )
        self.tied, self.other, self.frozen = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.other.weight = self.tied.weight
        self.frozen.requires_grad_(False)
        self.hooked.register_forward_hook(lambda module, images, out: None)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = nn.functional.conv2d(x, self.normalised.weight / self.normalised.weight.norm(), padding=1)
        for layer in (self.hooked, self.plain, self.tied, self.other, self.frozen):
            x = layer(x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_weight_that_more_than_its_layer_reads_has_no_copy() -> None:
    one = learner("at", halves=True, student=Reading)
    full = ("normalised", "hooked", "tied.weight", "other.weight")
    assert layers(one) == {name for name, _ in one.student.named_parameters() if not name.startswith(full)}
    assert_same(learn(one), learn(learner("at", halves=False, student=Reading)))


def test_what_is_frozen_later_is_not_trained() -> None:
    found = []
    for halves in (True, False):
        one = learner("at", halves=halves, student=Reading)
        learn(one, 1)
        one.student.get_submodule("plain").requires_grad_(False)
        found.append(learn(one))
    assert_same(*found)


class Branching(nn.Module):
    """Chooses its way by values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_network_that_no_tracer_sees_has_no_copies() -> None:
    assert learner("at", halves=True, student=Branching).halves is None


class Keeping(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, CLASSES, 3)
        self.seen: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        logits: Tensor = self.second(self.first(x)).mean((2, 3))
        return logits


def test_a_network_is_not_run_to_find_its_weights() -> None:
    net = Keeping()
    assert len(HalfWeights(net, torch.bfloat16).of) == 4
    assert not net.seen


def test_what_cannot_be_copied_has_no_copies() -> None:
    net = Keeping()
    net.seen.append(_ for _ in ())
    assert not HalfWeights(net, torch.bfloat16).of


def test_after_an_error_the_network_has_its_weights() -> None:
    net = network()
    before = dict(net.named_parameters())
    halves = HalfWeights(net, torch.bfloat16)
    with halves.in_place():
        inside = dict(net.named_parameters())
    assert [name for name, weight in inside.items() if weight is not before[name]]
    with pytest.raises(ZeroDivisionError), halves.in_place():
        raise ZeroDivisionError
    after = dict(net.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())

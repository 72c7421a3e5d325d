"""Attacks on a network in two parts, of which the first is not differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks.pgd import Attacked, climb, pgd
from engine.attacks.twin import Twin
from engine.config import AttackSpec
from engine.models.layers import ImageConv2d, StemNetwork
from engine.models.normalize import Normalize
from engine.objectives import ATTACK_LOSSES
from engine.system.precision import Precision

CPU = torch.device("cpu")
F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
AMP = Precision(CPU, torch.float32, torch.bfloat16)
DIVISIBLE = ("resnet8", "preactresnet18", "wrn10-1", "mobilenetv2", "wrn10-1-silu")
CLASSES = 4


def network(name: str = "resnet8", precision: Precision = F64, *, normalize: bool = True) -> StemNetwork:
    torch.manual_seed(0)
    built = precision.place(models.build(name, CLASSES, normalize=normalize, dataset="cifar10"))
    assert isinstance(built, StemNetwork)
    return built


def batch(precision: Precision = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(5, 3, 16, 16, generator=generator, dtype=torch.float64).to(precision.dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(5) % CLASSES


def attacked(spec: AttackSpec, student: Attacked, precision: Precision) -> tuple[Tensor, Tensor]:
    """x_adv, and the counts of zero and non-finite entries of the gradients."""
    x_nat, labels = batch(precision)
    x_adv, counts = x_nat.clone(), torch.zeros(2, dtype=torch.int64)
    climb(student, x_adv, x_nat, labels, spec, counts=counts)
    return x_adv, counts


@pytest.mark.parametrize("precision", [F64, F32, AMP], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("loss", sorted(name for name, loss in ATTACK_LOSSES.items() if not loss.reads_images))
def test_both_parts_are_the_whole(loss: str, bn: str, precision: Precision) -> None:
    """To the bit, BatchNorm's running statistics too."""
    spec = AttackSpec.model_validate({"loss": loss, "bn": bn, "num_steps": 3, "random_start": "none"})
    t_nat = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(2), dtype=precision.dtype)
    found = []
    for divided in (False, True):
        net = network(precision=precision)
        twin = Twin(net, bn, precision)
        assert twin.division is not None
        student = Attacked(twin, twin, t_nat, twin.division if divided else None)
        found.append((*attacked(spec, student, precision), *net.buffers()))
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)
    assert not torch.equal(found[0][0], batch(precision)[0])


@pytest.mark.parametrize("name", models.TABLE)
def test_the_networks_that_begin_with_a_convolution_3x3_are_divisible(name: str) -> None:
    if not hasattr(network_class(name), "rest"):
        pytest.skip("it does not begin with one convolution of the images")
    net = network(name)
    (stem,) = (module for module in net.modules() if isinstance(module, ImageConv2d))
    assert net.is_divisible == (stem.kernel_size == (3, 3))
    x = batch()[0]
    with torch.no_grad():
        h = net.eval().stem(x)
        before = h.clone()
        assert torch.equal(net.rest(h), net(x))
        assert torch.equal(h, before)
        assert torch.equal(h, stem(net.normalize(x)))


def network_class(name: str) -> type[nn.Module]:
    with torch.device("meta"):
        return type(models.build(name, CLASSES))


class Counted:
    """Calls of a network's parts."""

    def __init__(self, net: StemNetwork, patch: pytest.MonkeyPatch) -> None:
        self.stem = self.update = 0
        stem, update = net.stem, net.stem_update

        def counted_stem(images: Tensor) -> Tensor:
            self.stem += 1
            return stem(images)

        def counted_update(*given: Tensor, **numbers: object) -> None:
            self.update += 1
            update(*given, **numbers)  # type: ignore[arg-type]

        patch.setattr(net, "stem", counted_stem)
        patch.setattr(net, "stem_update", counted_update)


@pytest.mark.parametrize(
    ("keys", "divides"),
    [
        ({}, True),
        ({"loss": "kl"}, True),
        ({"project": False}, True),
        ({"loss": "kl-teacher"}, True),
        ({"threat_model": "L2"}, False),
        ({"loss": "kl-teacher-moving"}, False),
        ({"loss": "kl-teacher-linear"}, False),
    ],
)
def test_it_is_used_where_the_loss_is_of_the_logits_alone(
    keys: dict[str, object], divides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, teacher = network(), network("preactresnet18")
    calls = Counted(net, monkeypatch)
    spec = AttackSpec.model_validate({"num_steps": 2, **keys})
    x, labels = batch()
    pgd(net, x, labels, spec, teacher=teacher)
    assert calls.update == 2 * divides
    assert calls.stem == 2 + (keys.get("loss") == "kl")


Change = Callable[[StemNetwork], object]


def _other_forward(net: StemNetwork) -> None:
    class Other(type(net)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.rest(self.stem(x))
            return 2 * logits

    net.__class__ = Other


def _standardised(net: StemNetwork) -> None:
    net.get_submodule("conv1").__class__ = type("Standardised", (ImageConv2d,), {})


CHANGES: dict[str, Change] = {
    "a hook": lambda net: net.register_forward_hook(lambda *_: None),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "a hook of the gradient": lambda net: net.get_submodule("conv1").register_full_backward_hook(lambda *_: None),
    "a hook of the normalisation": lambda net: net.normalize.register_forward_hook(lambda *_: None),
    "another forward": _other_forward,
    "another convolution": _standardised,
    "another normalisation": lambda net: setattr(net, "normalize", nn.Hardtanh()),
    "a stride": lambda net: setattr(net.get_submodule("conv1"), "stride", (2, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_does_more_is_not_divided(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    assert net.is_divisible
    CHANGES[change](net)
    assert not net.is_divisible
    calls = Counted(net, monkeypatch)
    x, labels = batch()
    pgd(net, x, labels, AttackSpec(num_steps=2))
    assert not calls.update
    assert Twin(network_with(change), "train", F64).division is None


def network_with(change: str) -> StemNetwork:
    net = network()
    CHANGES[change](net)
    return net


def test_a_hook_of_the_normalisation_and_one_of_another_kind_are_run() -> None:
    net, x = network(), batch()[0]
    expected = net.stem(x)
    seen: list[Tensor] = []
    handle = net.normalize.register_forward_hook(lambda module, given, out: seen.append(out))
    torch.testing.assert_close(net.stem(x), expected)
    handle.remove()
    assert torch.equal(seen[0], net.normalize(x))

    class Halved(Normalize):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return super().forward(x_BCHW) / 2

    net.normalize.__class__ = Halved
    torch.testing.assert_close(net.stem(x), expected / 2)


@pytest.mark.parametrize("name", DIVISIBLE)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_public_attack_on_either_form_of_a_network_is_the_same(name: str, normalize: bool) -> None:
    """`pgd` divides a network of this package, and none behind a module of the user's."""
    spec = AttackSpec(num_steps=3)
    x, labels = batch()
    net = network(name, normalize=normalize)
    found = pgd(net, x, labels, spec, seed=3)
    assert torch.equal(found, pgd(nn.Sequential(net), x, labels, spec, seed=3))


@pytest.mark.parametrize("autocasts", [False, True])
def test_the_stem_is_in_full_precision_and_its_output_in_that_of_the_passes(autocasts: bool) -> None:
    net = network(precision=F32)
    x = batch(F32)[0]
    with torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext(), torch.no_grad():
        h = net.stem(x)
    mean, std = net.get_buffer("normalize.mean"), net.get_buffer("normalize.std")
    weight = net.get_parameter("conv1.weight").double()
    exact = torch.nn.functional.conv2d((x.double() - mean) / std, weight, padding=1)
    assert h.dtype == (torch.bfloat16 if autocasts else torch.float32)
    expected = exact.to(h.dtype)
    assert (h != expected).float().mean() < (0.01 if autocasts else 1)
    torch.testing.assert_close(h, expected)

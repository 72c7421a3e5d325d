"""The form in which networks are evaluated: the network itself up to rounding, in full and in half precision."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks import evaluated, kinds
from engine.attacks.evaluated import prepared
from engine.attacks.twin import Twin
from engine.evaluation.measure import evaluate
from engine.models.layers import Conv3x3
from engine.system.precision import Precision
from tests.attacks.networks import normalising

CPU = torch.device("cpu")
F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
BF16, F16 = (Precision(CPU, torch.float32, dtype) for dtype in (torch.bfloat16, torch.float16))
NETWORKS = ("resnet8", "preactresnet18", "mobilenetv2")


def network(name: str = "resnet8", precision: Precision = F32) -> nn.Module:
    """In training mode, all classes as likely."""
    net = normalising(name, precision, lambda: pixels(16))
    *_, last = (module for module in net.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias.sub_(net.eval()(pixels(32).to(precision.dtype)).mean(0))
    return net.train()


def pixels(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def labelled(net: nn.Module, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images, and the labels that the network gives them but for every sixth."""
    images = pixels(count)
    with torch.no_grad():
        labels = net.eval()(images.to(next(net.parameters()).dtype)).argmax(1)
    net.train()
    labels[::6] = (labels[::6] + 1) % 4
    return images, labels


def gradient(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(net(images), labels), images)
    return found


def unfolded(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **keys: Any) -> dict[str, Any]:
    """`evaluate` of the network as it is."""
    with monkeypatch.context() as patch:
        patch.setattr("engine.evaluation.measure.prepared", lambda net, precision: net)
        return evaluate(*arguments, **keys)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_are_those_of_the_network(name: str) -> None:
    net = network(name, F64)
    images, labels = labelled(net)
    images = images.double()
    form = prepared(net, F64)
    assert form is not net
    net.eval()
    torch.testing.assert_close(form(images), net(images), rtol=1e-10, atol=1e-11)
    expected = gradient(net, images, labels)
    torch.testing.assert_close(gradient(form, images, labels), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_verdicts_are_those_of_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where rounding decides nothing: every image of every attack."""
    net = network(name, F64)
    data = labelled(net, 12)
    attacks = ["natural", "fgsm", "pgd3", "pgd3-dlr"]
    found = evaluate(net, data, attacks, epsilon=2 / 255)
    expected = unfolded(monkeypatch, net, data, attacks, epsilon=2 / 255)
    assert 0 < expected["pgd3"].correct < expected["natural"].correct == 10
    for attack in attacks:
        assert torch.equal(found[attack].verdicts, expected[attack].verdicts), attack


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "fab-t"])
def test_verdicts_of_the_package_are_those_of_the_network(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack")
    net = network(precision=F64)
    data = labelled(net, 8)
    found = evaluate(net, data, [attack], epsilon=1 / 255)[attack]
    expected = unfolded(monkeypatch, net, data, [attack], epsilon=1 / 255)[attack]
    assert torch.equal(found.verdicts, expected.verdicts)


def test_the_network_is_left_as_it_was() -> None:
    net = network().train()
    net.requires_grad_(requires_grad=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    strides = {name: value.stride() for name, value in net.state_dict().items()}
    for precision in (None, F32, BF16):
        evaluate(net, labelled(net), ["fgsm"], precision=precision)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.stride() == strides[name]


def test_a_network_in_another_layout_is_evaluated_channels_last() -> None:
    net = network().to(memory_format=torch.contiguous_format)
    form = prepared(net, F32)
    for module in form.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous()


def test_no_batch_norm_is_left_where_it_can_be_folded() -> None:
    net = network()
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for precision in (F32, BF16):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared(net, precision).modules())


@pytest.mark.parametrize("winograd", [False, True])
def test_convolutions_are_computed_as_the_evaluation_s_precision_says(winograd: bool) -> None:
    """Final numbers are without Winograd's algorithm, whatever the training was."""
    net = network(precision=Precision(CPU, torch.float32, winograd=True))
    folded = prepared(net, Precision(CPU, torch.float32, winograd=winograd))
    for one, expected in ((net, True), (folded, winograd)):
        found = {module.winograd for module in one.modules() if isinstance(module, Conv3x3)}
        assert found == {expected}


class Plain(nn.Module):
    """A convolution, BatchNorm and a last layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(3, 4, 3)
        self.norm, self.linear = norm, nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits


class Decides(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


class HoldsALock(Plain):
    """A network that cannot be copied."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4))
        self.lock = threading.Lock()


@pytest.mark.parametrize("net", [Plain(nn.Identity()), Decides(nn.BatchNorm2d(4)), HoldsALock()])
def test_what_cannot_be_folded_is_evaluated_as_it_is(net: nn.Module) -> None:
    assert prepared(net, F32) is net
    assert evaluate(net, labelled(net), ["natural"])["natural"].correct == 20


@pytest.mark.parametrize("hooked", ["conv", "norm"])
def test_what_a_hook_does_still_happens(hooked: str) -> None:
    net = Plain(nn.BatchNorm2d(4)).double()
    net.get_submodule(hooked).register_forward_hook(lambda module, inputs, out: out + 1)
    net.get_buffer("norm.running_mean").fill_(0.5)
    images = pixels(3).double()
    form = prepared(net, F64)
    torch.testing.assert_close(form(images), net.eval()(images))


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_reparametrised_convolution_keeps_its_batch_norm(wrap: Any) -> None:
    net = Plain(nn.BatchNorm2d(4)).double()
    net.conv = wrap(net.conv)
    images, labels = pixels(6).double(), torch.arange(6) % 4
    for _ in range(3):
        net(images)
    expected = gradient(net.eval(), images, labels)
    torch.testing.assert_close(gradient(prepared(net, F64), images, labels), expected)


def test_a_function_gets_the_network_itself() -> None:
    net, seen = network(), []

    def mine(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(model)
        return x

    evaluate(net, labelled(net), {"mine": mine})
    assert seen == [net]


def test_a_network_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, made = network(), []

    def counted(*arguments: Any, **keys: Any) -> Twin:
        made.append(arguments)
        return Twin(*arguments, **keys)

    monkeypatch.setattr(evaluated, "Twin", counted)
    evaluate(net, labelled(net), ["natural", "fgsm", "pgd10"], batch_size=5)
    assert len(made) == 1


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("precision", [BF16, F16], ids=["bfloat16", "float16"])
def test_passes_run_in_half_precision(precision: Precision, bf16: None) -> None:
    net = network()
    images, labels = labelled(net)
    form = prepared(net, precision)
    seen = set()
    for module in form.modules():
        if type(module) is nn.Conv2d:
            module.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    logits = form(images)
    assert seen == {precision.amp_dtype}
    assert logits.dtype == torch.float32
    error = 0.2 if precision is BF16 else 0.05
    torch.testing.assert_close(logits, net.eval()(images), rtol=error, atol=error)
    expected, found = gradient(net, images, labels), gradient(form, images, labels)
    assert float((found - expected).norm() / expected.norm()) < error


def test_small_gradients_do_not_vanish_in_float16() -> None:
    """Those of a mean over many images are below float16's smallest number, 6e-8."""
    net = network()
    images, labels = labelled(net)
    scale = 2.0**-16

    def small(model: nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(scale * F.cross_entropy(model(x), labels, reduction="sum"), x)
        return found

    found, expected = small(prepared(net, F16)), small(net.eval())
    assert float((found - expected).norm() / expected.norm()) < 0.05
    unscaled = small(evaluated._InHalf(Twin(net, "eval", F16), 1.0))
    assert float((unscaled == 0).double().mean()) > 0.2  # so it would be without


@pytest.mark.parametrize("precision", [BF16, F16], ids=["bfloat16", "float16"])
def test_an_evaluation_in_half_precision_is_near(precision: Precision, bf16: None) -> None:
    net = network()
    data = labelled(net, 60)
    attacks = ["natural", "pgd10"]
    found = evaluate(net, data, attacks, epsilon=2 / 255, precision=precision)
    expected = evaluate(net, data, attacks, epsilon=2 / 255)
    for attack in attacks:
        assert abs(found[attack].correct - expected[attack].correct) <= 6
    assert found["pgd10"].masked == 0


def test_attacks_of_the_package_get_images_of_the_evaluation(bf16: None) -> None:
    pytest.importorskip("pyautoattack")
    net, seen = network(), set()
    form = prepared(net, BF16)
    form.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    images, labels = labelled(net, 4)
    task = kinds.Task(form, 4, (1 / 255, "Linf"))
    kinds.Packaged("apgd-ce", "", "").make(task)(images, labels, torch.arange(4))
    assert seen == {torch.float32}

"""Twins: what a frozen copy computes, what it shares with its original, and what it costs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib.steps.variants import Flops
from engine import models
from engine.attacks.pgd import Attacked, batch_norm_mode, climb
from engine.attacks.twin import Forward, Twin, conv_bn_pairs, traced
from engine.config import AttackSpec
from engine.system.precision import Precision
from engine.training.performance.speed import forward_flops
from tests.attacks.networks import normalising
from tests.compilers import convolution_gradients

CPU = torch.device("cpu")
F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
AMP = Precision(CPU, torch.float32, torch.bfloat16)
SMALL = ("resnet8", "mobilenetv2")


def network(name: str = "resnet8", precision: Precision = F64) -> nn.Module:
    return normalising(name, precision, lambda: images(16, precision))


def images(count: int = 6, precision: Precision = F64) -> Tensor:
    x = torch.rand(count, 3, 16, 16, dtype=torch.float64).to(precision.dtype)
    return x.to(memory_format=torch.channels_last)


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "preactresnet18", "mobilenetv2"])
def test_in_evaluation_mode_it_is_the_network_with_batch_norm_folded(name: str) -> None:
    net = network(name)
    twin = Twin(net, "eval", F64)
    x = images()
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(twin(x), expected, rtol=1e-11, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in twin.module.parameters())


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        ("resnet8", 9, 0),  # a stem, two in each of three blocks, two projections
        ("resnet18", 20, 0),  # 1 + 8 * 2 + 3
        ("preactresnet18", 8, 9),  # the second BatchNorm of a block follows a convolution, the first one a sum
        ("wrn34-10", 16, 15),  # the same in 15 blocks; the first one's first BatchNorm alone reads the stem
        ("resnet50", 53, 0),
        ("mobilenetv2", 57, 0),
    ],
)
def test_which_batch_norms_are_folded(name: str, folded: int, left: int) -> None:
    with torch.device("meta"):
        net = models.build(name, 10)
    nodes = traced(net)
    assert nodes is not None
    assert len(conv_bn_pairs(net, nodes)) == folded
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert norms - folded == left


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bn", ["train", "batch"])
def test_by_statistics_of_the_batch_it_is_the_network_to_the_bit(name: str, bn: str) -> None:
    net, other = network(name), network(name)
    twin, x = Twin(net, bn, F64), images()
    with batch_norm_mode(other, bn):
        for _ in range(3):
            assert torch.equal(twin(x), other(x))
    for key, value in other.named_buffers():
        assert torch.equal(net.get_buffer(key), value), key


def test_the_original_keeps_its_mode_and_its_flags() -> None:
    net = network().train()
    before = buffers(net)
    for bn in ("train", "eval", "batch"):
        Twin(net, bn, F64)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(norm.track_running_stats for norm in net.modules() if isinstance(norm, nn.BatchNorm2d))
    assert all(torch.equal(before[key], value) for key, value in net.named_buffers())


class Tangled(nn.Module):
    """Whose way depends on its input, and whose convolution has two readers."""

    def __init__(self, *, decides: bool) -> None:
        super().__init__()
        self.decides = decides
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.sum() < 0:
            x = -x
        y = self.conv(x)
        logits: Tensor = self.linear((self.norm(y) + y).mean((2, 3)))
        return logits


@pytest.mark.parametrize("decides", [False, True])
def test_what_cannot_be_folded_is_run_as_it_is(decides: bool) -> None:
    net = Tangled(decides=decides).double()
    net(images())
    twin, x = Twin(net, "eval", F64), images()
    assert twin.is_opaque == decides
    assert twin.module.get_submodule("norm") is not net.norm
    assert isinstance(twin.module.get_submodule("norm"), nn.BatchNorm2d)
    assert torch.equal(twin(x), net.eval()(x))


@pytest.mark.parametrize("decides", [False, True])
def test_tracing_keeps_no_network(decides: bool) -> None:
    """Its memory is free when the network is gone, and not only after the next garbage collection."""
    net = Tangled(decides=decides)
    weight = weakref.ref(net.conv.weight)
    gc.collect()
    gc.disable()
    try:
        nodes = traced(net)
        assert (nodes is None) == decides
        del net
        assert weight() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- how it follows its original


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("precision", [F64, AMP], ids=["float64", "amp"])
def test_it_follows_the_weights_at_a_refresh(bn: str, precision: Precision, bf16: None) -> None:
    net = network("resnet8", precision)
    twin, x = Twin(net, bn, precision), images(6, precision)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
        next(net.parameters()).add_(torch.tensor(0.01))
    for name, value in net.named_buffers():
        if bn == "eval" and name.endswith("running_mean"):
            value.add_(0.3)
    twin.refresh()
    expected = Twin(net, bn, precision)
    assert torch.equal(twin(x), expected(x))


def test_what_is_not_converted_is_shared() -> None:
    net = network("resnet8", F32)
    twin = Twin(net, "train", AMP)
    own = dict(twin.module.named_parameters())
    for name, value in net.named_parameters():
        shared = own[name].data_ptr() == value.data_ptr()
        in_half = "layer" in name and ("conv" in name or name.endswith("shortcut.0.weight"))
        assert shared != in_half, name
        assert own[name].dtype == (torch.bfloat16 if in_half else torch.float32)
    for name, buffer in net.named_buffers():
        assert twin.module.get_buffer(name) is buffer


# ---------------------------------------------------------------- what it costs


class Ops(TorchDispatchMode):
    """Notes conversions of weights, by size, and which gradients convolutions are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.converted: list[int] = []
        self.asked: list[list[bool]] = []
        self.batch_norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.converted.append(args[0].numel())
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(args[-1])
        self.batch_norms += "batch_norm" in str(func)
        return func(*args, **(kwargs or {}))


def attack(model: Any, precision: Precision, num_steps: int = 2) -> None:
    x_nat, labels = images(6, precision), torch.arange(6) % 4
    climb(Attacked(model), x_nat.clone(), x_nat, labels, AttackSpec(num_steps=num_steps))


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
def test_an_attack_converts_no_weight_and_computes_no_weight_gradient(
    bn: str, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KERNELS", "auto,batch_norm=reference")  # torch's own, which is seen and counted
    twin = Twin(network("resnet8", F32), bn, AMP)
    with Ops() as ops:
        attack(twin, AMP)
    assert ops.converted == []
    assert ops.asked
    assert all(mask == [True, False, False] for mask in ops.asked)
    assert (ops.batch_norms == 0) == (bn == "eval")


def test_autocast_alone_would_convert_every_weight_in_every_pass(bf16: None) -> None:
    """The same count without a twin: the test above can fail."""
    net = network("resnet8", F32).requires_grad_(False)
    with Ops() as ops, AMP.autocast():
        net(images(6, F32))
        net(images(6, F32))
    assert len(ops.converted) == 2 * 8


@pytest.mark.parametrize("name", SMALL)
def test_an_attack_s_step_costs_two_forwards(name: str) -> None:
    twin = Twin(network(name), "train", F64)
    forward, _ = forward_flops(twin.module, (3, 16, 16))
    with Flops() as counted:
        attack(twin, F64, num_steps=3)
    assert counted.total == pytest.approx(6 * 3 * 2 * forward, rel=1e-12)


def test_a_compiled_attack_computes_no_weight_gradient() -> None:
    """torch.compile computes those of parameters that are not frozen, whoever needs them."""
    masks, backend = convolution_gradients()

    def compiled(forward: Forward) -> Any:
        return torch.compile(forward, backend=backend, fullgraph=True)

    attack(Twin(network(), "train", F64, compiled), F64, num_steps=1)
    assert len(masks) == 9
    assert all(mask == [True, False, False] for mask in masks)
    masks.clear()
    attack(compiled(network()), F64, num_steps=1)  # what it would be with parameters that are not frozen
    assert any(mask[1] for mask in masks)


def test_it_keeps_less_for_its_backward_than_a_pass_that_is_trained() -> None:
    net = network("resnet8", F32)
    twin, x = Twin(net, "train", F32), images(6, F32).requires_grad_()

    def kept(run: Any) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(x)
        assert out.requires_grad
        weights = {value.untyped_storage().data_ptr() for value in (*net.parameters(), *net.buffers())}
        return sum(size for place, size in storages.items() if place not in weights)

    assert kept(twin) < kept(net)

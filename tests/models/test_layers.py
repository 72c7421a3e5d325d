"""First and last layers under autocast, and stages that compute their activations again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.kernels import native
from engine.models.layers import Classifier, Conv3x3, ImageConv2d, conv, recompute, use_winograd


def test_the_first_convolution_sees_the_image_as_it_is(bf16: None) -> None:
    """Autocast rounds a pixel by up to half a grey level, a quarter of the attack's step."""
    torch.manual_seed(0)
    conv, x = ImageConv2d(3, 8, 3, padding=1, bias=False), torch.rand(2, 3, 8, 8)
    plain = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    plain.load_state_dict(conv.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        ours, rounded = conv(x), plain(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain(x).bfloat16())
    assert not torch.equal(ours, rounded)
    assert float((x - x.bfloat16().float()).abs().max()) > 0.4 / 255


def test_its_gradient_is_that_of_full_precision(bf16: None) -> None:
    conv, x = ImageConv2d(3, 8, 3, bias=False), torch.rand(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    expected = nn.functional.conv_transpose2d(upstream.float(), conv.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_not_rounded(bf16: None) -> None:
    torch.manual_seed(0)
    linear, features = Classifier(16, 5), torch.randn(4, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = linear(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, nn.functional.linear(features.float(), linear.weight, linear.bias))


@pytest.mark.parametrize("layer", [ImageConv2d(3, 8, 3), Classifier(3, 8)])
def test_without_autocast_they_are_plain_layers(layer: nn.Module) -> None:
    x = torch.rand(2, 3, 8, 8).double() if isinstance(layer, nn.Conv2d) else torch.rand(2, 3).double()
    layer = layer.double()
    plain = copy.deepcopy(layer)
    plain.__class__ = type(layer).__base__  # type: ignore[assignment]
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("name", list(models.TABLE))
def test_each_architecture_has_one_of_each(name: str) -> None:
    with torch.device("meta"):
        modules = list(models.build(name, 10).modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert isinstance(convolutions[0], ImageConv2d)
    assert not any(isinstance(module, ImageConv2d) for module in convolutions[1:])
    assert [type(module) for module in modules if isinstance(module, nn.Linear)] == [Classifier]


# ---------------------------------------------------------------- recomputation


def trained(net: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Gradients and buffers after two forwards and a backward, and the bytes that were kept for it."""
    torch.manual_seed(1)
    x_adv, x_nat = (torch.rand(4, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (net(x_adv).softmax(1) * net(x_nat)).sum()
    held = sum(kept.values())
    loss.backward()
    values = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
    return values | {name: value.clone() for name, value in net.named_buffers()}, held


@pytest.mark.parametrize("name", ["resnet8", "preactresnet18"])
def test_recomputation_changes_nothing_but_memory(name: str) -> None:
    torch.manual_seed(0)
    net = models.build(name, 4).double()
    other = copy.deepcopy(net)
    recompute(other)
    (expected, held), (ours, held_less) = trained(net), trained(other)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
    assert held_less < 0.6 * held


def test_recomputation_moves_running_statistics_once_and_puts_momentum_back() -> None:
    net = models.build("resnet8", 4).double()
    recompute(net)
    trained(net)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.momentum == 0.1
            assert norm.num_batches_tracked == 0


def test_without_a_gradient_nothing_is_recomputed() -> None:
    net = models.build("resnet8", 4)
    recompute(net)
    calls: list[int] = []
    net.get_submodule("layer2.0").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        net(torch.rand(2, 3, 16, 16))
    assert calls == [1]


# ---------------------------------------------------------------- Winograd's algorithm


def is_by_winograd(layer: nn.Module, x: Tensor) -> bool:
    grad_fn = layer(x).grad_fn
    return grad_fn is not None and type(grad_fn).__name__ != "ConvolutionBackward0"


@pytest.fixture
def native_library() -> None:
    if reason := native.missing("cpu"):
        pytest.skip(reason)


def test_the_algorithm_is_torch_s_unless_it_is_asked_for(native_library: None) -> None:
    layer = conv(16, 16, 3)
    x = torch.rand(64, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert isinstance(layer, Conv3x3)
    assert not is_by_winograd(layer, x)
    expected = layer(x)
    use_winograd(layer)
    assert is_by_winograd(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert is_by_winograd(copy.deepcopy(layer), x)


def test_what_it_does_not_compute_is_torch_s(native_library: None, bf16: None) -> None:
    layer = conv(16, 16, 3)
    use_winograd(layer)
    x = torch.rand(64, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert not is_by_winograd(layer, x.contiguous())
    assert not is_by_winograd(layer, x[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_by_winograd(layer, x)
    assert torch.equal(layer.double()(x.double()), nn.functional.conv2d(x.double(), layer.weight, padding=1))


@pytest.mark.parametrize("given", [(16, 16, 1), (16, 16, 5), (16, 16, 3, 2), (16, 16, 3, 1, 16)])
def test_other_convolutions_are_plain_ones(given: tuple[int, ...]) -> None:
    assert type(conv(*given)) is nn.Conv2d

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from engine import models
from engine.models import normalize
from engine.models.architecture import Architecture
from engine.models.networks.imagenet_resnet import ImageNetResNet
from engine.models.networks.preactresnet import PreActBottleneck, PreActResNet
from engine.models.networks.resnet import BasicBlock, Bottleneck, ResNet
from engine.models.networks.wideresnet import WideResNet
from engine.models.normalize import CONSTANTS, Normalize, constants
from engine.models.weights import architecture_of

State = dict[str, Tensor]

# What the numeric tests run: the table's architectures, but smaller ones of their kind in place of the big ones.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: models.build("resnet8", 10),
    "resnet20": lambda: ResNet((16, 32, 64), (3, 3, 3), 10),
    "resnet18": lambda: models.build("resnet18", 10),
    "preactresnet18": lambda: models.build("preactresnet18", 10),
    "preactresnet18-nobn": lambda: models.build("preactresnet18-nobn", 10),
    "wrn16-2": lambda: WideResNet(16, 2, 10),
    "wrn16-2-silu": lambda: models.build("wrn16-2-silu", 10),
    "resnet11-cifar": lambda: ResNet((16, 32, 64), (1, 1, 1), 10, Bottleneck),
    "preactresnet14": lambda: PreActResNet((8, 16, 24, 32), (1, 1, 1, 1), 10, PreActBottleneck),
    "mobilenetv2": lambda: models.build("mobilenetv2", 10),
    "resnet17": lambda: ImageNetResNet((2, 1, 1, 1), 10, Bottleneck),
    "resnet12-imagenet": lambda: ImageNetResNet((2, 1, 1, 1), 10, BasicBlock),
}


def network(name: str) -> nn.Module:
    """A float64 network whose BatchNorms are no identity in either mode."""
    torch.manual_seed(0)
    return shaken(NETWORKS[name]().double())


def shaken(model: nn.Module) -> nn.Module:
    """The network with random BatchNorms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(size: int, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=generator)


# Transcriptions of the papers' networks as functions of a state dict.


def conv(s: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2, groups=groups)


def norm(s: State, name: str, x: Tensor, train: bool) -> Tensor:
    if train:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    scale = s[f"{name}.weight"] / (var + 1e-5).sqrt()
    return x * scale[:, None, None] + (s[f"{name}.bias"] - mean * scale)[:, None, None]


def head(s: State, name: str, x: Tensor) -> Tensor:
    pooled = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    return pooled @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def resnet(s: State, x: Tensor, train: bool, stages: int, blocks: int) -> Tensor:
    x = norm(s, "bn1", conv(s, "conv1", x), train).relu()
    for stage in range(1, stages + 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            halves = stage > 1 and block == 0
            out = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x, 2 if halves else 1), train).relu()
            out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", out), train)
            if halves:
                x = norm(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x, 2), train)
            x = (out + x).relu()
    return head(s, "linear", x)


def bottlenecks(s: State, x: Tensor, train: bool) -> Tensor:
    """ResNet of one bottleneck a stage, each with a projection."""
    x = norm(s, "bn1", conv(s, "conv1", x), train).relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        at = f"layer{stage}.0"
        out = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x), train).relu()
        out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", out, stride), train).relu()
        out = norm(s, f"{at}.bn3", conv(s, f"{at}.conv3", out), train)
        x = (out + norm(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x, stride), train)).relu()
    return head(s, "linear", x)


def preact_bottlenecks(s: State, x: Tensor, train: bool) -> Tensor:
    """Pre-activation ResNet of one bottleneck a stage, each with a projection."""
    x = conv(s, "conv1", x)
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        at = f"layer{stage}.0"
        h = norm(s, f"{at}.bn1", x, train).relu()
        out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv1", h), train).relu()
        out = norm(s, f"{at}.bn3", conv(s, f"{at}.conv2", out, stride), train).relu()
        x = conv(s, f"{at}.conv3", out) + conv(s, f"{at}.shortcut.0", h, stride)
    return head(s, "linear", norm(s, "bn", x, train).relu())


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def wrn16_silu(s: State, x: Tensor, train: bool) -> Tensor:
    """As TensorFlow pads: at stride 2 one row below and one column to the right."""
    x = F.conv2d(x, s["init_conv.weight"], padding=1)
    for group, block in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)):
        at, stride = f"layer.{group}.block.{block}", 2 if group > 0 and block == 0 else 1
        h = silu(norm(s, f"{at}.batchnorm_0", x, train))
        padded = F.pad(h, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        out = F.conv2d(padded, s[f"{at}.conv_0.weight"], stride=stride)
        out = F.conv2d(silu(norm(s, f"{at}.batchnorm_1", out, train)), s[f"{at}.conv_1.weight"], padding=1)
        x = out + (F.conv2d(h, s[f"{at}.shortcut.weight"], stride=stride) if block == 0 else x)
    return head(s, "logits", silu(norm(s, "batchnorm", x, train)))


def preact_block(s: State, at: str, x: Tensor, train: bool, stride: int, projection: str | None) -> Tensor:
    h = norm(s, f"{at}.bn1", x, train).relu()
    out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv1", h, stride), train).relu()
    skip = conv(s, f"{at}.{projection}", h, stride) if projection else x
    return conv(s, f"{at}.conv2", out) + skip


def preactresnet18(s: State, x: Tensor, train: bool) -> Tensor:
    x = conv(s, "conv1", x)
    for stage in (1, 2, 3, 4):
        first = stage > 1
        x = preact_block(s, f"layer{stage}.0", x, train, 2 if first else 1, "shortcut.0" if first else None)
        x = preact_block(s, f"layer{stage}.1", x, train, 1, None)
    return head(s, "linear", norm(s, "bn", x, train).relu() if "bn.weight" in s else x)


def wrn16(s: State, x: Tensor, train: bool) -> Tensor:
    x = conv(s, "conv1", x)
    for group in (1, 2, 3):
        x = preact_block(s, f"block{group}.layer.0", x, train, 1 if group == 1 else 2, "convShortcut")
        x = preact_block(s, f"block{group}.layer.1", x, train, 1, None)
    return head(s, "fc", norm(s, "bn1", x, train).relu())


def mobilenetv2(s: State, x: Tensor, train: bool) -> Tensor:
    x = norm(s, "bn1", conv(s, "conv1", x), train).relu()
    halving = {3, 6, 13}  # of the 17 blocks
    projecting = {0, 1, 10, 16}  # stride 1 with more channels out than in, or fewer
    for block in range(17):
        at = f"layers.{block}"
        out = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x), train).relu()
        out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", out, 2 if block in halving else 1), train).relu()
        out = norm(s, f"{at}.bn3", conv(s, f"{at}.conv3", out), train)
        if block in halving:
            x = out
        elif block in projecting:
            x = out + norm(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x), train)
        else:
            x = out + x
    return head(s, "linear", norm(s, "bn2", conv(s, "conv2", x), train).relu())


def resnet17(s: State, x: Tensor, train: bool) -> Tensor:
    x = norm(s, "bn1", conv(s, "conv1", x, 2), train).relu()
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)  # zeros are as good as nothing after a ReLU
    for at in ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"):
        stride = 1 if at < "layer2" else 2
        out = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x), train).relu()
        out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", out, stride), train).relu()
        out = norm(s, f"{at}.bn3", conv(s, f"{at}.conv3", out), train)
        if at != "layer1.1":
            x = norm(s, f"{at}.downsample.1", conv(s, f"{at}.downsample.0", x, stride), train)
        x = (out + x).relu()
    return head(s, "fc", x)


def resnet12(s: State, x: Tensor, train: bool) -> Tensor:
    x = norm(s, "bn1", conv(s, "conv1", x, 2), train).relu()
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for at in ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"):
        stride = 1 if at < "layer2" else 2
        out = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x, stride), train).relu()
        out = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", out), train)
        if stride == 2:
            x = norm(s, f"{at}.downsample.1", conv(s, f"{at}.downsample.0", x, stride), train)
        x = (out + x).relu()
    return head(s, "fc", x)


REFERENCES: dict[str, Callable[[State, Tensor, bool], Tensor]] = {
    "resnet8": lambda s, x, train: resnet(s, x, train, stages=3, blocks=1),
    "resnet20": lambda s, x, train: resnet(s, x, train, stages=3, blocks=3),
    "resnet18": lambda s, x, train: resnet(s, x, train, stages=4, blocks=2),
    "preactresnet18": preactresnet18,
    "preactresnet18-nobn": preactresnet18,
    "wrn16-2": wrn16,
    "mobilenetv2": mobilenetv2,
    "resnet17": resnet17,
    "resnet11-cifar": bottlenecks,
    "resnet12-imagenet": resnet12,
    "preactresnet14": preact_bottlenecks,
    "wrn16-2-silu": wrn16_silu,
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_equals_a_functional_transcription(name: str, train: bool) -> None:
    model = network(name).train(train)
    x = images(16)
    state = {
        key: value.clone() for key, value in model.state_dict().items()
    }  # before train mode moves the statistics
    expected = REFERENCES[name](state, x, train)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet8", 10, 78_042),
        ("resnet8", 100, 83_892),
        ("resnet18", 10, 11_173_962),
        ("resnet18", 100, 11_220_132),
        ("preactresnet18", 10, 11_172_170),
        ("preactresnet18-nobn", 10, 11_171_146),  # 2 * 512 less
        ("preactresnet18", 100, 11_218_340),
        ("preactresnet18", 200, 11_269_640),
        ("wrn34-10", 10, 46_160_474),
        ("wrn34-10", 100, 46_218_164),
        ("mobilenetv2", 10, 2_296_922),
        ("mobilenetv2", 100, 2_412_212),
        ("resnet50", 1000, 25_557_032),
        ("resnet50", 10, 23_528_522),
        ("resnet18-imagenet", 1000, 11_689_512),
        ("resnet34-imagenet", 1000, 21_797_672),
        ("resnet101-imagenet", 1000, 44_549_160),
        ("resnet34-cifar", 10, 21_282_122),
        ("resnet50-cifar", 10, 23_520_842),
        ("resnet101-cifar", 10, 42_512_970),
        ("preactresnet34", 10, 21_280_330),
        ("preactresnet50", 10, 23_513_162),
        ("wrn28-10", 10, 36_479_194),
        ("wrn28-10", 100, 36_536_884),
        ("wrn16-2", 10, 691_674),
        ("wrn34-20", 10, 184_531_674),
        ("wrn70-16", 10, 266_796_506),
        ("wrn28-10-silu", 10, 36_479_194),
        ("wrn70-16-silu", 10, 266_796_506),
        ("wrn94-16-silu", 10, 365_915_610),
        ("timm:vit_tiny_patch16_224", 1000, 5_717_416),
        ("torchvision:vit_b_16", 1000, 86_567_656),
    ],
)
def test_published_numbers_of_parameters(name: str, num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = models.build(name, num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def bn_keys(*names: str) -> set[str]:
    return {f"{name}.{part}" for name in names for part in BN}


def test_names_in_resnet18_are_the_published_ones() -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    shortcuts = [f"layer{stage}.0.shortcut" for stage in (2, 3, 4)]
    keys = {"conv1.weight", "linear.weight", "linear.bias"} | bn_keys("bn1")
    keys |= {f"{at}.{conv}.weight" for at in blocks for conv in ("conv1", "conv2")}
    keys |= bn_keys(*(f"{at}.{bn}" for at in blocks for bn in ("bn1", "bn2")))
    keys |= {f"{at}.0.weight" for at in shortcuts} | bn_keys(*(f"{at}.1" for at in shortcuts))
    with torch.device("meta"):
        assert set(models.build("resnet18", 10).state_dict()) == keys


def test_names_in_wrn34_10_are_the_published_ones() -> None:
    blocks = [f"block{group}.layer.{index}" for group in (1, 2, 3) for index in range(5)]
    keys = {"conv1.weight", "fc.weight", "fc.bias"} | bn_keys("bn1")
    keys |= {f"{at}.{conv}.weight" for at in blocks for conv in ("conv1", "conv2")}
    keys |= bn_keys(*(f"{at}.{bn}" for at in blocks for bn in ("bn1", "bn2")))
    keys |= {f"block{group}.layer.0.convShortcut.weight" for group in (1, 2, 3)}
    with torch.device("meta"):
        assert set(models.build("wrn34-10", 10).state_dict()) == keys


def test_preactresnet18_without_its_last_norm_has_the_102_tensors_of_the_usual_checkpoint() -> None:
    with torch.device("meta"):
        state = models.build("preactresnet18-nobn", 10).state_dict()
        whole = models.build("preactresnet18", 10).state_dict()
    assert len(state) == 102
    assert set(whole) - set(state) == bn_keys("bn")
    assert architecture_of(state) == "preactresnet18-nobn"
    assert architecture_of(whole) == "preactresnet18"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18-imagenet", "resnet18"),
        ("resnet34-imagenet", "resnet34"),
        ("resnet50", "resnet50"),
        ("resnet101-imagenet", "resnet101"),
    ],
)
def test_resnets_for_imagenet_are_torchvision_s(name: str, published: str) -> None:
    torch.manual_seed(0)
    theirs = shaken(torchvision.models.get_model(published, num_classes=10)).double().eval()
    ours = models.build(name, 10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(64, batch=2)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_has_equal_values_and_keeps_its_layout(name: str) -> None:
    model, other = network(name), network(name).to(memory_format=torch.channels_last)
    model.normalize = Normalize(*constants("cifar10")).double()
    other.normalize = Normalize(*constants("cifar10")).double()
    x = images(16).requires_grad_()
    x_last = images(16).to(memory_format=torch.channels_last).requires_grad_()
    elsewhere: list[str] = []

    def watch(at: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            if out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
                elsewhere.append(at)

        return hook

    for at, module in other.named_modules():
        module.register_forward_hook(watch(at))
    expected, got = model(x), other(x_last)
    assert elsewhere == []
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    (g,) = torch.autograd.grad(expected.square().sum(), x)
    (g_last,) = torch.autograd.grad(got.square().sum(), x_last)
    torch.testing.assert_close(g_last, g, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = network(name)
    loss = F.cross_entropy(model(images(16)), torch.tensor([0, 1, 2, 3]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert [name for name, g in zip(names, gradients, strict=True) if g is None or not g.abs().max() > 0] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_input_gradient_equals_a_finite_difference(name: str) -> None:
    model = network(name).eval()
    x = images(8, batch=1).requires_grad_()
    direction = images(8, batch=2)[1:] - 0.5
    (gradient,) = torch.autograd.grad(model(x)[0, 3], x)
    step = 1e-7
    with torch.no_grad():
        difference = (model(x + step * direction)[0, 3] - model(x - step * direction)[0, 3]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", models.TABLE)
def test_every_input_size_of_the_table_works(name: str) -> None:
    with torch.device("meta"):  # shapes alone: values at other sizes are those of the test against a transcription
        model = models.build(name, 200)
        for size in models.TABLE[name].input_sizes:
            assert model(torch.rand(2, 3, size, size)).shape == (2, 200)


def test_preactresnet18_equals_its_transcription_at_64x64() -> None:
    model = network("preactresnet18").eval()
    x = images(64, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), preactresnet18(model.state_dict(), x, False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dataset", [*CONSTANTS, "digits", "folder", None])
def test_normalisation_inside_equals_normalisation_outside(dataset: str | None) -> None:
    torch.manual_seed(0)
    inside = models.build("resnet8", 10, normalize=True, dataset=dataset).double().eval()
    torch.manual_seed(0)
    outside = models.build("resnet8", 10).double().eval()
    mean, std = constants(dataset)
    x = images(32)
    channels = [(x[:, c] - mean[c]) / std[c] for c in range(3)]
    torch.testing.assert_close(inside(x), outside(torch.stack(channels, dim=1)), rtol=0, atol=1e-6)
    assert not torch.allclose(inside(x), outside(x), atol=1e-3)
    assert set(inside.state_dict()) - set(outside.state_dict()) == {"normalize.mean", "normalize.std"}


def test_constants_are_one_half_where_none_are_published() -> None:
    assert constants("digits") == constants("folder") == constants(None) == ((0.5,) * 3, (0.5,) * 3)
    assert constants("cifar10")[0] == (0.4914, 0.4822, 0.4465)


def test_initialisation_is_that_of_the_docstrings() -> None:
    torch.manual_seed(0)
    wide = models.build("wrn34-10", 10)
    for key, weight in wide.named_parameters():
        if weight.ndim == 4 and weight.numel() > 10_000:
            fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
            assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), key
    assert not wide.get_parameter("fc.bias").any()
    weight = ImageNetResNet((1, 1, 1, 1), 10, Bottleneck).get_parameter("layer2.0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.03)
    for name in ("resnet18", "preactresnet18", "mobilenetv2"):
        weight = models.build(name, 10).get_parameter("conv1.weight")
        assert 0.9 * 27**-0.5 < weight.abs().max() <= 27**-0.5, name


def test_the_seed_of_the_caller_decides_the_weights() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return models.build("resnet8", 10).get_parameter("conv1.weight")

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_build_refuses_what_it_cannot_build() -> None:
    with pytest.raises(
        ValueError, match=r"^model: 'resnet-18' is not known; did you mean 'resnet18'\? known: mob"
    ):
        models.build("resnet-18", 10)
    with pytest.raises(ValueError, match=r"^num_classes: a classifier has at least 2 classes, got 1$"):
        models.build("resnet8", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn30-10", "model: 'wrn30-10': a Wide ResNet has 6 n + 4 layers, such as 28 or 34, got 30"),
        ("wrn5-2-silu", "model: 'wrn5-2-silu': a Wide ResNet has 6 n + 4 layers, such as 10, got 5"),
        ("wrnD-W", "model: 'wrnD-W' is a form, and no name"),
    ],
)
def test_names_of_a_form_that_name_nothing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        models.check(name)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["wrn28_10", "wrn28-0", "wrn028-10", "wrn28-10-relu", "WRN28-10", "wrn2800-10"])
def test_what_is_near_a_form_is_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model: [^\n]* is not known; [^\n]*wrnD-W, wrnD-W-silu"):
        models.check(name)
    assert models.is_registered(name)
    assert not models.is_registered("wrn28-10")


@pytest.mark.parametrize("prefix", ["", "module.model."])
@pytest.mark.parametrize("name", ["wrn10-3", "wrn22-4-silu", "wrn34-10"])
def test_tensors_tell_the_wide_resnet_that_they_are_of(name: str, prefix: str) -> None:
    with torch.device("meta"):
        state = models.build(name, 3).state_dict()
    found = models.candidates({prefix + key: value.shape for key, value in state.items()})
    assert [known for known in found if known.startswith("wrn")] == sorted({"wrn34-10", name}, key=found.index)
    assert set(models.TABLE) <= set(found)


class Plain(nn.Module):
    """A network as people add one: without normalisation, or with one that comes too late or not at all."""

    def __init__(self, num_classes: int, place: str) -> None:
        super().__init__()
        self.place, self.linear = place, nn.Linear(3, num_classes)
        if place != "nowhere":
            self.normalize = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "first":
            x = self.normalize(x)
        elif self.place == "later":
            x = self.normalize(2 * x)
        out: Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


@pytest.mark.parametrize("place", ["nowhere", "unused", "later", "first"])
def test_a_network_that_is_added_normalises_or_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.TABLE, "plain", Architecture("", lambda classes: Plain(classes, place)))
    assert models.build("plain", 4)(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    if place != "first":
        with pytest.raises(ValueError, match=r"^normalize: plain does not normalise, as its forward [^\n]*$"):
            models.build("plain", 4, normalize=True, dataset="cifar10")
        return
    network, x = models.build("plain", 4, normalize=True, dataset="cifar10"), torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values) for values in CONSTANTS["cifar10"])
    expected = network.get_submodule("linear")((x.mean(dim=(2, 3)) - mean) / std)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("name", models.TABLE)
def test_every_network_normalises_on_any_device(name: str) -> None:
    with torch.device("meta"):
        network = models.build(name, 3, normalize=True)
    assert network.training
    assert {"normalize.mean", "normalize.std"} <= set(network.state_dict())


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((None, None, None), None),
        (("cifar10", None, None), "cifar10"),
        ((None, "0.1, 0.2,1/4", "51/255,1,0.5"), ((0.1, 0.2, 0.25), (0.2, 1.0, 0.5))),
    ],
)
def test_normalisation_as_it_is_written(texts: Any, found: Any) -> None:
    assert normalize.from_text(*texts) == found


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("cifar10", "0.1,0.1,0.1", "0.1,0.1,0.1"), "belong together, and without --normalize"),
        ((None, "0.1,0.1,0.1", None), "belong together"),
        ((None, None, "0.1,0.1,0.1"), "belong together"),
        ((None, "0.1,0.1", "0.1,0.1,0.1"), "three numbers each are expected"),
        ((None, "a,b,c", "0.1,0.1,0.1"), "--normalize-mean: three numbers are expected"),
        ((None, "0.1,0.1,0.1", "1/0,1,1"), "--normalize-std: three numbers are expected"),
        ((None, "0.1,0.1,0.1", "1e400,1,1"), "--normalize-std: three numbers are expected"),
        ((None, "125,123,114", "0.1,0.1,0.1"), "of [0, 255]?"),
    ],
)
def test_normalisation_that_is_none(texts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        normalize.from_text(*texts)
    assert words in str(error.value)


def test_a_strided_stem_alone_tells_the_small_network_from_resnet8() -> None:
    torch.manual_seed(0)
    strided, usual = models.build("resnet8-strided-16", 10).eval(), models.build("resnet8", 10).eval()
    usual.load_state_dict(strided.state_dict())
    stem = usual.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    stem.stride = (2, 2)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(strided(images), usual(images))
    assert strided.get_submodule("layer1")(strided.get_submodule("conv1")(images)).shape == (3, 16, 16, 16)
    assert models.build("resnet8-strided-32", 10).get_submodule("linear").in_features == 128


@pytest.mark.parametrize(
    "name", ["resnet8-strided-0", "resnet8-strided-1000", "resnet8-strided", "resnet8-strided-032"]
)
def test_a_strided_network_has_a_width(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model: [^\n]* is not known; [^\n]*resnet8-strided-W"):
        models.check(name)

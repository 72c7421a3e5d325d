"""Classifiers of timm and torchvision as networks of this engine."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from engine import config, models
from engine.attacks.pgd import batch_norm_mode
from engine.attacks.twin import Twin
from engine.common.tensor_files import write_tensors
from engine.models.layers import Classifier, ImageConv2d, Resize, recompute
from engine.models.libraries import LibraryNetwork
from engine.models.sync_batch_norm import synchronise
from engine.models.weights import load_model
from engine.pipelines.base import Batch
from engine.runs import assemble, teachers
from engine.runs.checkpoints import student_part
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training.learner import Learner
from engine.training.step_networks import seed_dropout
from tests.models.test_models import images, shaken
from tests.training import test_exactness as exactness

timm = pytest.importorskip("timm")

CPU = torch.device("cpu")
F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
AMP = Precision(CPU, torch.float32, torch.bfloat16)
VIT, CONVNEXT = "timm:test_vit", "timm:test_convnext"
EFFICIENT, RESNET, MOBILE = "timm:test_efficientnet", "timm:test_resnet", "torchvision:mobilenet_v3_small"
SMALL = (VIT, CONVNEXT, EFFICIENT, RESNET, MOBILE)


def network(name: str, precision: Precision = F64) -> nn.Module:
    """With statistics of images, and BatchNorms that are no identity."""
    torch.manual_seed(0)
    net = shaken(models.build(name, 4)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    with torch.no_grad():
        for _ in range(20):
            net(images(32))
    return precision.place(net)


def theirs(name: str, state: dict[str, Tensor]) -> nn.Module:
    """The library's own network with those weights, in float64."""
    library, _, own = name.partition(":")
    built: nn.Module = {
        "timm": lambda: timm.create_model(own, num_classes=4),
        "torchvision": lambda: torchvision.models.get_model(own, num_classes=4),
    }[library]()
    built.double().load_state_dict(state)
    return built


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_image_gradients_are_the_library_s(name: str) -> None:
    ours = network(name).eval()
    other = theirs(name, ours.get_submodule("network").state_dict()).eval()
    mean, std = (torch.tensor(part)[:, None, None].double() for part in facts(name))
    found = []
    runs: tuple[Callable[[Tensor], Tensor], ...] = (ours, lambda x: other((x - mean) / std))
    for run in runs:
        x = images(32 if fixed(name) is None else 160, batch=2).requires_grad_()
        logits = run(x)
        found.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    assert found[1][0].std(0).max() > 1e-3
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def facts(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, written down a second time."""
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {VIT: half, CONVNEXT: half, RESNET: half, EFFICIENT: imagenet, MOBILE: imagenet}[name]


def fixed(name: str) -> tuple[int, int] | None:
    return (160, 160) if name == VIT else None


@pytest.mark.parametrize(("old", "new"), [((32, 32), (160, 160)), ((40, 24), (16, 9)), ((8, 8), (8, 5))])
def test_resizing_is_torch_s(old: tuple[int, int], new: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.rand(2, 3, *new, generator=generator, dtype=torch.float64)
    x = torch.rand(2, 3, *old, generator=generator, dtype=torch.float64).requires_grad_()
    expected = F.interpolate(x, new, mode="bilinear", antialias=True)
    ours = Resize(new)(x.to(memory_format=torch.channels_last))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out * upstream).sum(), x)[0] for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert Resize(old)(x) is x


@pytest.mark.parametrize(
    ("name", "head"), [(VIT, "network.head"), (CONVNEXT, "network.head.fc"), (MOBILE, "network.classifier.3")]
)
def test_amp_rounds_neither_images_nor_logits(name: str, head: str, bf16: None) -> None:
    net = network(name, F32).eval()
    (first,) = (module for module in net.modules() if isinstance(module, ImageConv2d))
    layer = net.get_submodule(head)
    assert models.head_of(net) == head
    assert isinstance(layer, Classifier)
    seen: list[Tensor] = []
    for module in (first, layer):
        module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        with AMP.autocast():
            logits = net(images(32).float())
        net(images(32).float())
    pixels, features, expected, _ = seen
    assert torch.equal(pixels, expected)
    assert torch.equal(logits, F.linear(features.float(), layer.weight, layer.bias))


# ---------------------------------------------------------------- twins


@pytest.mark.parametrize(
    ("name", "left"),
    [(VIT, 0), (CONVNEXT, 0), (RESNET, 0), (EFFICIENT, 0), (MOBILE, 0)],
)
def test_a_twin_is_the_network_with_what_can_be_folded(name: str, left: int) -> None:
    net = network(name)
    twin, x = Twin(net, "eval", F64), images(32)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), net.eval()(x), rtol=1e-10, atol=1e-12)
    assert not twin.is_opaque
    assert sum(isinstance(module, nn.BatchNorm2d) for module in twin.module.modules()) == left


@pytest.mark.parametrize("bn", ["train", "batch"])
@pytest.mark.parametrize("name", [RESNET, EFFICIENT, VIT])
def test_by_statistics_of_the_batch_it_is_the_network_to_the_bit(name: str, bn: str) -> None:
    net, other = network(name), network(name)
    twin, x = Twin(net, bn, F64), images(32)
    with batch_norm_mode(other, bn):
        for _ in range(2):
            assert torch.equal(twin(x), other(x))
    for key, value in other.named_buffers():
        assert torch.equal(net.get_buffer(key), value), key


def test_a_twin_drops_nothing_out() -> None:
    net = network(MOBILE).train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in net.modules())
    twin, x = Twin(net, "batch", F64), images(32)
    assert torch.equal(twin(x), twin(x))
    assert not torch.equal(net(x), net(x))


def test_what_a_network_keeps_in_evaluation_follows_its_weights() -> None:
    """Attention biases of several networks of timm: in the attack, and where an average is measured."""
    attention = importlib.import_module("timm.models.levit").Attention(3, 4, 2, resolution=4, use_conv=True)
    torch.manual_seed(0)
    net = shaken(nn.Sequential(attention, nn.Flatten(), nn.Linear(48, 4))).double()
    twin, x = Twin(net, "eval", F64), images(4)

    def measured() -> Tensor:
        with batch_norm_mode(net, "eval"), torch.no_grad():
            out: Tensor = net(x)
        return out

    before = twin(x), measured()
    with torch.no_grad():
        attention.attention_biases.normal_(std=3)
    twin.refresh()
    after = twin(x), measured()
    net.train()
    expected = net.eval()(x)
    for old, new in zip(before, after, strict=True):
        assert (old - expected).abs().max() > 1e-2
        torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12)


class Standardised(nn.Conv2d):
    """By standardised weights, as of several networks of timm."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


def test_a_twin_leaves_layers_that_are_more_than_they_inherit(bf16: None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    shaken(net)
    twin = Twin(net, "eval", F32)
    x = images(8).float()
    torch.testing.assert_close(twin(x), net.eval()(x))
    own = dict(Twin(net, "eval", AMP).module.named_parameters())
    assert own["0.weight"].dtype == torch.float32
    assert own["2.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Case(exactness.Case):
    """The engine's step beside the textbook's, of a network of a library."""

    name: str = ""

    def networks(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
        torch.manual_seed(0)
        student, at, st = (shaken(models.build(self.name, exactness.CLASSES)).to(dtype) for _ in range(3))
        return student.train(), at.eval().requires_grad_(False), st.eval().requires_grad_(False)

    def batch(self, step: int, dtype: torch.dtype) -> Batch:
        x = images(32 if self.name != VIT else 16).to(dtype)
        return Batch(x.to(memory_format=torch.channels_last), torch.arange(4) % 4, torch.arange(4) + 4 * step)


@pytest.mark.parametrize(
    ("name", "method", "bn"),
    [
        (VIT, "at", "train"),
        (VIT, "iad1", "eval"),
        (CONVNEXT, "iad1", "train"),
        (EFFICIENT, "at", "train"),
        (EFFICIENT, "iad1", "batch"),
        (RESNET, "iad1", "eval"),
    ],
)
def test_a_step_is_the_textbook_s_in_float64(name: str, method: str, bn: str) -> None:
    given = {"method": method, "attack": {"bn": bn, "num_steps": 2}, "seed": 5, "epochs": 100}
    exactness.check_equal(Case(config.load(given), bn=bn, num_steps=2, name=name), steps=2)


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("name", [VIT, RESNET])
def test_a_step_under_amp_is_near_that_in_full_precision(name: str, bn: str, bf16: None) -> None:
    """Channels-last, with teachers of another library."""
    moved = []
    for precision in (F32, AMP):
        student = network(name, precision)
        before = torch.cat([value.detach().flatten().clone() for value in student.parameters()])
        row = {"method": "iad1", "attack": {"bn": bn, "num_steps": 1}, "model": name}
        run = config.load(row)
        sections = {"teacher": network(CONVNEXT, F32).eval(), "teacher_st": network(EFFICIENT, F32).eval()}
        learner = Learner(student, sections, assemble.method_of(run), run, precision)
        x = images(64, batch=8).float().contiguous(memory_format=torch.channels_last)
        learner.learn(Batch(x, torch.arange(8) % 4, torch.arange(8)), learner.method, 0.1, epoch=99)
        moved.append(torch.cat([value.detach().flatten() for value in student.parameters()]) - before)
    full, half = moved
    assert F.cosine_similarity(full, half, dim=0) > 0.7  # of noise it is 0


@pytest.mark.parametrize("name", [VIT, CONVNEXT])
def test_micro_batches_give_the_update_of_the_whole(name: str) -> None:
    """In training mode, too: LayerNorm knows no batch."""
    found = []
    for micro_batch in (None, 2):
        student = network(name).train()
        run = config.load({"method": "at", "micro_batch": micro_batch, "attack": {"num_steps": 1}})
        learner = Learner(student, {}, assemble.method_of(run), run, F64)
        learner.learn(Batch(images(32, batch=3), torch.arange(3), torch.arange(3)), learner.method, 0.1)
        found.append(student.state_dict())
    before = network(name).state_dict()
    assert sum(not torch.equal(value, before[key]) for key, value in found[0].items()) > len(before) / 2
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-11)


def test_dropout_of_a_step_depends_on_seed_step_and_process_alone() -> None:
    def drawn(seed: int, step: int, rank: int) -> list[float]:
        world = World()
        world.rank, world.size = rank, 2
        seed_dropout(seed, step, world)
        return torch.rand(3).tolist()

    with torch.random.fork_rng():
        assert drawn(0, 1, 0) == drawn(0, 1, 0)
        found = [drawn(seed, step, rank) for seed in (0, 1) for step in (1, 2) for rank in (0, 1)]
    assert len({tuple(words) for words in found}) == 8


def test_what_would_not_be_the_same_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sync_bn: network\.bn1 of the network is a BatchNormAct2d, [^\n]*$"):
        synchronise(models.build(EFFICIENT, 4), CPU)
    with pytest.raises(ValueError, match=r"^sync_bn: 1 of the network is a BatchNorm1d, [^\n]*$"):
        synchronise(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)), CPU)
    with pytest.raises(ValueError, match=r"^checkpoint_activations: this network is not [^\n]*$"):
        recompute(models.build(VIT, 4))


# ---------------------------------------------------------------- names and files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:test_vitt", "timm has no classifier 'test_vitt'; did you mean 'test_vit"),
        ("timm:test_vit.nothing", "'timm:test_vit.nothing': Invalid pretrained tag"),
        ("timm:hf-hub:timm/test_vit.r160_in1k", "timm has no classifier 'hf-hub:"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'; did you mean 'resnet18'"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("timm:", "'timm:' is not known"),
    ],
)
def test_unknown_names_of_a_library(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^model: [^\n]*$") as error:
        models.check(name)
    assert words in str(error.value)
    assert not models.is_registered("timm:test_vit")


def test_without_timm_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^model: 'timm:x' needs timm: pip install 'iad-engine\[timm\]'$"):
        models.check("timm:x")


def test_nobody_imports_timm_who_does_not_name_it() -> None:
    code = "import sys, engine.models as m; m.find_family('timm:x'); print('timm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_library_s_network_normalises_by_itself() -> None:
    with pytest.raises(
        ValueError, match=r"^normalize: timm:test_vit normalises its images already; set it to false$"
    ):
        models.build(VIT, 4, normalize=True)
    assert models.get(VIT).normalization == facts(VIT)
    assert models.get(MOBILE).normalization == facts(MOBILE)
    assert models.get("torchvision:vit_b_16").input_sizes == (224,)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_further_logits_are_left_out(name: str) -> None:
    with torch.device("meta"):
        net = models.build(f"torchvision:{name}", 7)
        assert net(torch.rand(2, 3, 128, 128)).shape == (2, 7)
    assert not any("aux" in key.lower() for key in net.state_dict())


@pytest.mark.parametrize(
    ("name", "is_meta"), [(VIT, True), (MOBILE, True), ("timm:test_vit_relpos", False), (EFFICIENT, True)]
)
def test_a_checkpoint_loads_again(name: str, is_meta: bool, tmp_path: Path) -> None:
    """Tables that are no part of the state dict are there too."""
    assert next(models.build_to_fill(name, 4).parameters()).is_meta == is_meta
    net = network(name, F32).eval()
    part = student_part(net, config.load({"model": name}), ("a", "b", "c", "d"))
    write_tensors(tmp_path / "last.pt", part)
    loaded = load_model(tmp_path / "last.pt", class_names=("b", "a", "d", "c"))
    x = images(32).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x), net(x)[:, [1, 0, 3, 2]], rtol=1e-3, atol=1e-4)
    assert loaded.name == name


def test_build_to_fill_draws_nothing() -> None:
    before = torch.get_rng_state()
    for name in (VIT, "timm:test_vit_relpos"):
        models.build_to_fill(name, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_another_version_of_a_library_is_another_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        sha256 = train_sha256 = "0"

    def place() -> Any:
        return teachers.cache_path(config.load({"model": VIT, "method": "at"}), Data())  # type: ignore[arg-type]

    before = place()
    assert place() == before
    monkeypatch.setattr(timm, "__version__", "0.0")
    assert place() != before


def test_a_network_with_two_heads_has_no_head_to_replace() -> None:
    with torch.device("meta"):
        net = models.build("timm:deit_tiny_distilled_patch16_224", 4)
    assert isinstance(net, LibraryNetwork)
    assert sum(isinstance(module, Classifier) for module in net.modules()) == 2
    assert models.head_of(net) is None

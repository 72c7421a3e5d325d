from __future__ import annotations

import copy
import json
import logging
import random
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from importlib import metadata
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks import autoattack, kinds
from engine.attacks.pgd import describe, pgd, presets
from engine.common.stopping import RunFailed
from engine.evaluation.batches import size_of_batch
from engine.evaluation.measure import UNMASKED, check_names, evaluate, few_images, further, is_chance
from engine.system import precision

PGD_NAMES = ("fgsm", "fgsm-rs", "pgd10", "pgd20", "pgd20-dlr", "cw")


class Network(nn.Module):
    """A small convolutional network with BatchNorm, in training mode, whose accuracy under attack is middling."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 16, classes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.relu(self.norm(self.conv(images))).flatten(1))
        return logits


def network(classes: int = 10, dtype: torch.dtype = torch.float64) -> Network:
    return Network(classes).to(dtype)


def labelled(model: nn.Module, size: int = 24) -> tuple[Tensor, Tensor]:
    """uint8 NHWC images, and labels that the model gets right except for every sixth."""
    images = torch.randint(256, (size, 8, 8, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(images.permute(0, 3, 1, 2).to(dtype) / 255)
    labels = logits.argmax(dim=1)
    labels[::6] = (labels[::6] + 1) % logits.shape[1]
    return images, labels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- what is counted


def test_natural_accuracy_is_the_count_by_hand() -> None:
    model = network()
    images, labels = labelled(model)
    model.register_forward_hook(
        lambda module, inputs, output: pytest.fail("gradients are on") if torch.is_grad_enabled() else None
    )
    result = evaluate(model, (images, labels), ["natural"])["natural"]
    assert (result.attack, result.correct, result.n) == ("natural", 20, 24)
    assert result.accuracy == 20 / 24
    assert result.description == "no attack"


def crafted(monkeypatch: pytest.MonkeyPatch, name: str = "pgd10", **keys: Any) -> dict[int, Tensor]:
    """The adversarial image of every sample that `evaluate` attacks, by index."""
    images_of: dict[int, Tensor] = {}

    def spy(model: nn.Module, x_nat: Tensor, labels: Tensor, spec: Any, **given: Any) -> Tensor:
        x_adv = pgd(model, x_nat, labels, spec, **given)
        images_of.update(zip(given["sample"].tolist(), x_adv, strict=True))
        return x_adv

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "pgd", spy)
        model = network()
        evaluate(model, labelled(model), [name], **keys)
    return images_of


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
@pytest.mark.parametrize("name", PGD_NAMES)
def test_an_attack_is_pgd_with_its_preset(name: str, threat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seed = network(), 5
    images, labels = labelled(model)
    epsilon = {"Linf": 3 / 255, "L2": 0.2}[threat_model]
    spec = presets(epsilon, threat_model)[name]
    twin = copy.deepcopy(model).eval()
    x_nat = images.permute(0, 3, 1, 2).double() / 255
    x_adv = pgd(twin, x_nat, labels, spec, seed=seed, counter=zlib.crc32(name.encode()))
    with torch.no_grad():
        expected = int((twin(x_adv).argmax(1) == labels).sum())
    assert 0 < expected < 20

    ball: dict[str, Any] = {"epsilon": epsilon, "threat_model": threat_model}
    images_of = crafted(monkeypatch, name, seed=seed, **ball)
    torch.testing.assert_close(torch.stack([images_of[i] for i in range(24)]), x_adv, rtol=0, atol=1e-12)
    result = evaluate(model, (images, labels), [name], seed=seed, **ball)[name]
    assert result.correct == expected
    assert result.description == describe(spec)


@pytest.mark.parametrize("keys", [{"batch_size": 7}, {"batch_size": 1}, {"limit": 15, "batch_size": 4}], ids=str)
def test_an_adversarial_image_depends_on_neither_batch_size_nor_limit(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = crafted(monkeypatch), crafted(monkeypatch, **keys)
    assert len(whole) == 24
    assert len(part) == keys.get("limit", 24)
    for sample, x_adv in part.items():
        torch.testing.assert_close(x_adv, whole[sample], rtol=0, atol=1e-12)
    other = crafted(monkeypatch, seed=1)
    assert all((other[sample] != whole[sample]).any() for sample in whole)


def test_a_result_does_not_depend_on_the_other_attacks() -> None:
    model = network()
    data = labelled(model)
    together = evaluate(model, data, ["cw", "natural", "pgd10", "cw"], epsilon=3 / 255, batch_size=7)
    assert list(together) == ["cw", "natural", "pgd10"]
    for name in together:
        assert evaluate(model, data, [name], epsilon=3 / 255)[name].correct == together[name].correct


def test_uint8_and_float_images_are_the_same_images() -> None:
    model = network(dtype=torch.float32)
    images, labels = labelled(model)
    floats = images.permute(0, 3, 1, 2).float() / 255
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    evaluate(model, (images, labels), ["pgd10"])
    first, seen[:] = seen[:], []
    evaluate(model, (floats.contiguous(), labels.to(torch.int32)), ["pgd10"])
    assert len(seen) == len(first) == 12
    assert all(torch.equal(one, other) for one, other in zip(first, seen, strict=True))
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


def test_an_object_with_images_and_labels_is_accepted() -> None:
    model = network()
    images, labels = labelled(model)
    split = SimpleNamespace(images=images, labels=labels, class_names=())
    assert evaluate(model, split, ["natural"])["natural"].correct == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_forward_runs_in_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    data = labelled(model)
    seen = set()
    model.register_forward_hook(lambda module, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(model, data, ["pgd10"])
    assert seen == {dtype}


def test_limit_takes_every_class_equally_and_depends_on_the_labels_alone() -> None:
    labels = torch.arange(4).repeat_interleave(
        torch.tensor([30, 10, 20, 2])
    )  # sorted by class, as files often are
    images = torch.zeros(62, 8, 8, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(62)

    def taken(limit: int | None, seed: int = 0) -> list[int]:
        model, seen = network(4), []
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0, 0, 0].mul(255).round()))
        result = evaluate(model, (images, labels), ["natural"], limit=limit, seed=seed, batch_size=9)["natural"]
        chosen = torch.cat(seen[1:]).int().tolist()  # the first forward counts the classes
        assert result.n == len(chosen)
        return chosen

    assert labels[taken(14)].bincount().tolist() == [4, 4, 4, 2]
    assert labels[taken(8)].bincount().tolist() == [2, 2, 2, 2]
    assert taken(14, seed=3) == taken(14)
    assert taken(62) == taken(99) == taken(None) == list(range(62))


def test_a_result_is_frozen_and_goes_into_json() -> None:
    model = network()
    images, labels = labelled(model)
    result = evaluate(model, (images, labels), ["pgd20"], epsilon=3 / 255)["pgd20"]
    assert json.loads(json.dumps(result.as_dict())) == {
        "attack": "pgd20",
        "correct": result.correct,
        "n": 24,
        "accuracy": result.correct / 24,
        "description": "L-inf, epsilon 3/255, 20 steps of 0.75/255, random start, cross-entropy, BN eval",
        "seconds": result.seconds,
        "zero_gradients": 0.0,
        "non_finite_gradients": 0.0,
        "masked": 0.0,
        "parts": {},
        "flags": [],
        "warnings": [],
        "per_class": {
            str(label): {
                "accuracy": float(result.verdicts[labels == label].double().mean()),
                "n": int((labels == label).sum()),
            }
            for label in labels.unique().tolist()
        },
        "details": {},
    }
    assert result.seconds > 0
    with pytest.raises(FrozenInstanceError):
        result.correct = 24  # type: ignore[misc]


# ---------------------------------------------------------------- what each image's verdict is


def test_verdicts_stand_in_the_order_of_the_data() -> None:
    model = network()
    images, labels = labelled(model)
    result = evaluate(model, (images, labels), ["natural"], batch_size=7)["natural"]
    right = torch.ones(24, dtype=torch.bool)
    right[::6] = False  # as `labelled` made them
    assert torch.equal(result.verdicts, right)
    assert torch.equal(result.samples, torch.arange(24))


@pytest.mark.parametrize("name", ["pgd20", "cw"])
def test_verdicts_of_an_attack_are_those_of_its_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    images, labels = labelled(model)
    keys: dict[str, Any] = {"epsilon": 3 / 255, "limit": 15, "batch_size": 4}
    x_adv = crafted(monkeypatch, name, **keys)
    result = evaluate(model, (images, labels), [name], **keys)[name]
    assert result.samples.tolist() == sorted(x_adv)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(torch.stack([x_adv[sample] for sample in sorted(x_adv)]))
    assert torch.equal(result.verdicts, logits.argmax(1) == labels[result.samples])
    assert result.correct == int(result.verdicts.sum()) < 15


# ---------------------------------------------------------------- what is not finite


class Broken(nn.Module):
    """Logits of some images are not finite."""

    def __init__(self, value: float, image: int) -> None:
        super().__init__()
        self.inner, self.value, self.image = network(), value, image

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images).clone()
        is_it = (images[:, 0, 0, 0] * 255).round() == self.image
        return torch.where(is_it[:, None] & (torch.arange(10) == 3), self.value, logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_no_result(value: float) -> None:
    images, labels = labelled(network())
    images[:, 0, 0, 0] = torch.arange(24)
    with pytest.raises(FloatingPointError, match="natural: the logits of 1 of 12 images are NaN or infinite"):
        evaluate(Broken(value, 11), (images, labels), ["natural"], batch_size=4)


@pytest.mark.parametrize("name", ["natural", "fgsm", "pgd20", "cw"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda model: model.norm.weight.fill_(1e308),
        lambda model: model.norm.running_var.fill_(-1),
        lambda model: model.norm.weight.fill_(torch.inf),
        lambda model: model.linear.weight.fill_(1e308),
        lambda model: model.linear.bias.fill_(torch.nan),
    ],
)
def test_a_network_of_nan_is_not_right_about_class_0(name: str, damage: Any) -> None:
    model = network()
    images, _ = labelled(model)
    with torch.no_grad():
        damage(model)
    with pytest.raises(FloatingPointError, match=f"{name}: the logits of .* images are NaN or infinite"):
        evaluate(model, (images, torch.zeros(24, dtype=torch.int64)), [name])


# ---------------------------------------------------------------- what is masked


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> Network:
    """The same network, and the same classes, with logits that much larger."""
    model = network(dtype=dtype)
    with torch.no_grad():
        model.linear.weight.mul_(factor)
        model.linear.bias.mul_(factor)
    return model


@pytest.mark.parametrize("name", ["fgsm", "fgsm-rs", "pgd10", "pgd20"])
@pytest.mark.parametrize("factor", [1e4, 1e8])
def test_a_larger_head_does_not_look_more_robust(name: str, factor: float) -> None:
    data = labelled(network(dtype=torch.float32))
    plain = evaluate(scaled(1), data, [name], epsilon=4 / 255)
    assert further(plain) == []
    assert plain[name].masked == 0
    assert plain[name].warnings == ()

    found = evaluate(scaled(factor), data, [name], epsilon=4 / 255)
    masked = found[name].masked
    assert masked is not None
    assert masked > 0.2
    assert found[name].correct > plain[name].correct
    # So much too high may it be, and no more.
    assert found[name].accuracy - masked <= plain[name].accuracy
    assert f"{name}: {masked:.2%} of the images kept their class" in found[name].warnings[0]
    assert further(found) == [UNMASKED]
    found |= evaluate(scaled(factor), data, further(found), epsilon=4 / 255)
    worst = min(result.correct for result in found.values())
    strongest = evaluate(scaled(1), data, ["pgd20"], epsilon=4 / 255)["pgd20"].correct
    assert abs(worst - strongest) <= 1
    assert further(found) == []


def test_a_factor_on_the_logits_changes_nothing_of_dlr() -> None:
    data = labelled(network(dtype=torch.float32))
    found = [evaluate(scaled(f), data, [UNMASKED], epsilon=4 / 255)[UNMASKED] for f in (1e-3, 1, 1e4, 1e8)]
    assert 0 < found[0].correct < 20
    assert [result.correct for result in found] == [found[0].correct] * 4
    assert all(result.masked == 0 for result in found)


def test_images_that_are_beaten_are_not_masked() -> None:
    """CW's gradient is zero once the margin is below -kappa: there is nothing left to do."""
    data = labelled(network(dtype=torch.float32))
    result = evaluate(scaled(1e4), data, ["cw"], epsilon=4 / 255)["cw"]
    assert result.zero_gradients is not None
    assert result.zero_gradients > 0.1
    assert (result.masked, result.warnings) == (0, ())


class Rounding(nn.Module):
    """A network that rounds its images has no gradient at all, whatever the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner((images * 255).round() / 255)
        return logits


def test_what_no_loss_mends_is_said() -> None:
    model = Rounding()
    found = evaluate(model, labelled(model), ["natural", "pgd10", UNMASKED])
    assert found["natural"].masked is found["natural"].zero_gradients is None
    for name in ("pgd10", UNMASKED):
        assert found[name].zero_gradients == 1
        assert found[name].masked == found[name].accuracy
        assert found[name].warnings
    assert further(found) == []


class Half(nn.Module):
    """Has a gradient for images whose first pixel is dark, and none or NaN for the others."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = network(), factor

    def forward(self, images: Tensor) -> Tensor:
        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(context: Any, *gradients: Tensor) -> Tensor:
                return gradients[0] * factors

        factors = torch.where(images.detach()[:, 0, 0, 0] < 0.5, 1.0, self.factor)[:, None, None, None]
        logits: Tensor = self.inner(Scale.apply(images))
        return logits


@pytest.mark.parametrize(("factor", "key"), [(0.0, "zero_gradients"), (torch.nan, "non_finite_gradients")])
def test_the_share_of_images_is_counted(factor: float, key: str) -> None:
    model = Half(factor)
    images, labels = labelled(model)
    images[:12, 0, 0], images[12:, 0, 0] = 10, 240
    labels = model.inner.eval()(images.permute(0, 3, 1, 2).double() / 255).argmax(1)
    result = evaluate(model, (images, labels), ["pgd20"], epsilon=4 / 255, batch_size=5)["pgd20"]
    share = getattr(result, key)
    assert share == pytest.approx(0.5, abs=1e-9)
    assert result.masked == pytest.approx(int(result.verdicts[12:].sum()) / 24)
    assert result.verdicts[12:].all()  # where there is no gradient nothing moves but the start
    assert not result.verdicts[:12].all()
    assert result.warnings


def test_guessing_and_few_images_are_known_as_such() -> None:
    assert is_chance(0.10, 256, 10)
    assert is_chance(0.13, 256, 10)
    assert not is_chance(0.14, 256, 10)  # 0.1 + 2 sqrt(0.09 / 256) = 0.1375
    assert is_chance(0.5, 1000, 2)
    assert not is_chance(0.5, 1000, 3)
    assert few_images(100) == ""
    assert few_images(25) == "25 of them: the standard error of an accuracy is up to 10 percentage points"


# ---------------------------------------------------------------- what an evaluation leaves behind


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("side", "chosen", "done"), [(8, None, [64, 128, 130]), (1200, None, [1, 2]), (1200, 2, [2])]
)
def test_batches_of_large_images_are_smaller_unless_chosen(side: int, chosen: int | None, done: list[int]) -> None:
    count, calls = done[-1], []
    data = (torch.rand(1, 3, side, side).expand(count, -1, -1, -1), torch.arange(count) % 2)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert size_of_batch(chosen, torch.device("cuda"), side, side) == (chosen or {8: 250, 1200: 1}[side])
    evaluate(model, data, ["natural"], batch_size=chosen, on_batch=lambda *call: calls.append(call[1]))
    assert calls == done


def test_on_batch_tells_the_progress_and_may_interrupt() -> None:
    model = network()
    data = labelled(model)
    calls: list[tuple[str, int, int]] = []
    evaluate(model, data, ["natural", "fgsm"], batch_size=10, on_batch=lambda *call: calls.append(call))
    assert calls == [(name, done, 24) for name in ("natural", "fgsm") for done in (10, 20, 24)]

    def interrupt(attack: str, done: int, total: int) -> None:
        if (attack, done) == ("fgsm", 20):
            raise Interrupted

    model.norm.eval()
    model.conv.requires_grad_(False)
    before = footprint(model)
    with pytest.raises(Interrupted):
        evaluate(model, data, ["natural", "fgsm"], batch_size=10, on_batch=interrupt)
    assert footprint(model) == before


def test_progress_is_told_within_a_batch() -> None:
    """After each gradient where their number is known; else in all batches but the first."""
    model = network()
    data = labelled(model)
    calls: list[tuple[str, int, int, str]] = []

    def two_steps(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            with torch.enable_grad():
                images = x.clone().requires_grad_()
                torch.autograd.grad(model(images).sum(), images)
        return x

    attacks: list[Any] = ["natural", "pgd4", two_steps]
    evaluate(model, data, attacks, batch_size=12, on_pass=lambda *call: calls.append(call))
    assert {(total, doing) for _, _, total, doing in calls} == {(24, "")}
    done = {
        name: [done for attack, done, *_ in calls if attack == name] for name in ("natural", "pgd4", "two_steps")
    }
    assert done["natural"] == [12, 24]
    assert done["pgd4"] == [3, 6, 9, 12, 12, 15, 18, 21, 24, 24]
    assert done["two_steps"] == [0, 0, 12, 18, 24, 24]


def test_autoattack_tells_what_it_is_at() -> None:
    model = network()
    calls: list[tuple[str, int, int, str]] = []
    evaluate(model, labelled(model), ["apgd-ce"], limit=8, on_pass=lambda *call: calls.append(call))
    assert [(name, total) for name, _, total, _ in calls] == [("apgd-ce", 8)] * len(calls)
    done = [done for _, done, _, _ in calls]
    assert done == sorted(done)
    assert any(re.fullmatch(r"apgd-ce, \d+ checks", doing) for *_, doing in calls)


def footprint(model: nn.Module) -> list[Any]:
    """Everything outside that an evaluation might change."""
    return [
        [(name, module.training) for name, module in model.named_modules()],
        [(name, value.requires_grad, value.grad) for name, value in model.named_parameters()],
        {name: value.tolist() for name, value in model.state_dict().items()},
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        precisions(),
        torch.is_grad_enabled(),
        sys.gettrace(),
        sys.stdout,
    ]


def precisions() -> list[object]:
    """By the new names of the flags and by the old ones, which torch reads only where they agree."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    names: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)  # type: ignore[attr-defined]
    old = (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    return [*(backend.fp32_precision for backend in names), *old]


FULL = [*["ieee"] * 5, False, False, "highest"]


@pytest.mark.parametrize("name", ["natural", "pgd10"])
def test_an_evaluation_leaves_no_trace(name: str) -> None:
    model = network()
    model.norm.eval()
    model.conv.requires_grad_(False)
    data = labelled(model)
    before = footprint(model)
    result = evaluate(model, data, [name])[name]
    assert footprint(model) == before
    assert evaluate(model, data, [name])[name].correct == result.correct


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_full_inside_and_as_before_outside(allowed: bool, matmul: str) -> None:
    """The flags exist without a GPU."""
    cudnn = torch.backends.cudnn
    default = cudnn.allow_tf32
    model = network()
    data = labelled(model)
    seen: list[list[object]] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(precisions()))
    try:
        cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision(matmul)
        before = precisions()
        evaluate(model, data, ["natural", "fgsm"])
        assert seen
        assert all(inside == FULL for inside in seen)
        assert precisions() == before
    finally:
        cudnn.allow_tf32 = default
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("amp", [False, True])
def test_with_amp_a_training_runs_its_first_and_last_layer_in_full_float32(amp: bool) -> None:
    outside = precisions()
    with precision.deterministic(amp=amp):
        assert precisions() == (FULL if amp else outside)
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert precisions() == outside


def test_a_model_in_eval_mode_with_random_layers_is_not_random() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(192, 10)).double()
    data = labelled(model)
    assert evaluate(model, data, ["natural"])["natural"].correct == 20
    assert model.training


def test_an_image_outside_the_ball_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    data = labelled(model)
    for wrong in (lambda x: (x + 9 / 255).clamp(0, 1), lambda x: x - 4 / 255):
        monkeypatch.setattr(kinds, "pgd", lambda model, x_nat, *args, wrong=wrong, **keys: wrong(x_nat))
        with pytest.raises(RunFailed, match=r"fgsm: an image lies .* outside the ball"):
            evaluate(model, data, ["fgsm"], batch_size=7)
    monkeypatch.setattr(kinds, "pgd", lambda model, x_nat, *args, **keys: (x_nat + 8 / 255).clamp(0, 1))
    assert evaluate(model, data, ["fgsm"])["fgsm"].n == 24


# ---------------------------------------------------------------- what is refused

GOOD = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((4, 3, 8, 8), 1.01), GOOD[1], r"images: floats must lie in \[0, 1\], got 1.01..1.01"),
        (torch.full((4, 3, 8, 8), -0.01), GOOD[1], r"images: floats must lie in \[0, 1\]"),
        (torch.full((4, 3, 8, 8), torch.nan), GOOD[1], r"images: floats must lie in \[0, 1\]"),
        (GOOD[0], GOOD[1][:3], "data: 4 images and 3 labels"),
        (GOOD[0][:0], GOOD[1][:0], "data: there is nothing to evaluate"),
        (GOOD[0][0], GOOD[1], r"images: expected uint8 \(N, H, W, C\)"),
        (GOOD[0].int(), GOOD[1], "images: expected uint8 .* got torch.int32"),
        (GOOD[0], GOOD[1].double(), r"labels: expected integers of shape \(N,\), got torch.float64"),
        (GOOD[0], F.one_hot(GOOD[1]), r"labels: expected integers of shape \(N,\)"),
        (GOOD[0], GOOD[1] - 1, "labels: expected 0 <= label, got -1"),
        (GOOD[0], GOOD[1] + 7, "labels: up to 10, and the model has 10 classes"),
    ],
)
def test_bad_data_is_refused_in_one_line(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(network(), (images, labels), ["natural"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attacks": ["natural", "pgd-20"]}, "attack: 'pgd-20' is not known; did you mean 'pgd20'"),
        ({"attacks": "pgd20"}, "attacks: expected a list of names such as 'pgd20', got 'pgd20'"),
        (
            {"attacks": presets()["pgd20"]},
            "attacks: expected names such as 'pgd20', functions, or pairs of both, got",
        ),
        (
            {"attacks": [presets()["pgd20"]]},
            "attacks: expected names such as 'pgd20', functions, or pairs of both, got AttackSpec",
        ),
        ({"attacks": 20}, "attacks: expected a list of names such as 'pgd20', got 20"),
        ({"batch_size": 0}, "batch_size: a whole number from 1 on is needed, got 0"),
        ({"batch_size": 2.5}, "batch_size: a whole number from 1 on is needed, got 2.5"),
        ({"seed": -1}, "seed: a whole number from 0 on is needed, got -1"),
        ({"seed": 2**64}, "seed: "),
        ({"device": "gpu"}, "device: 'gpu' is not known"),
        ({"limit": 0}, "limit must be 1 or more, got 0"),
        ({"epsilon": -0.1}, "epsilon: "),
        ({"threat_model": "L1"}, "threat_model: "),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(network(), GOOD, **{"attacks": ["natural"]} | keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD[0], "data: expected .* got Tensor"),
        ((*GOOD, GOOD[1]), "data: expected .* got tuple"),
        (None, "data: expected .* got NoneType"),
        ((GOOD[0].numpy(), GOOD[1]), "images: expected a tensor, or tensors by index, got ndarray"),
        ((GOOD[0], GOOD[1].numpy()), r"labels: expected integers of shape \(N,\) in a tensor, got ndarray"),
        ((GOOD[0], GOOD[1].tolist()), r"labels: expected .* got list"),
        (([*GOOD[0]], GOOD[1]), "images: expected a tensor, or tensors by index, got list"),
        ((GOOD[0], GOOD[1] > 1), r"labels: expected integers of shape \(N,\), got torch.bool"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(network(), data, ["natural"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda images: images, "model: expected a torch.nn.Module, got function"),
        (nn.Identity(), r"model: expected logits of shape \(B, C\), got \(1, 3, 8, 8\)"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, GOOD, ["natural"])


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model: evaluation runs in float32 or float64, .* torch.bfloat16"):
        evaluate(network(dtype=torch.bfloat16), GOOD, ["natural"])


# ---------------------------------------------------------------- AutoAttack


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError


def test_autoattack_equals_the_package_called_directly(capsys: pytest.CaptureFixture[str]) -> None:
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    model = network(dtype=torch.float32).to(memory_format=torch.channels_last)
    images, labels = labelled(model, 8)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    x_nat = (images.permute(0, 3, 1, 2).float() / 255).contiguous()
    direct = pyautoattack.AutoAttack(twin, norm="Linf", eps=3 / 255, version="standard", seed=4, device="cpu")
    with torch.random.fork_rng():
        expected = int((direct.run_standard_evaluation(x_nat, labels, batch_size=8)[1] == labels).sum())
    assert 0 < expected < 6

    before = footprint(model)
    capsys.readouterr()
    result = evaluate(model, (images, labels), ["aa:package"], epsilon=3 / 255, seed=4)["aa:package"]
    assert result.correct == expected
    assert result.description == (
        "AutoAttack standard (APGD-CE, APGD-T and FAB-T with 9 target classes, Square), L-inf, epsilon 3/255, "
        f"pyautoattack {metadata.version('pyautoattack')}, 8 images, batch 64, seed 4"
    )
    assert capsys.readouterr().out == ""
    assert footprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autoattack_with_few_classes_l2_and_batches_of_one(dtype: torch.dtype) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    model = network(4, dtype)
    images, labels = labelled(model, 4)
    calls: list[int] = []
    result = evaluate(
        model,
        (images[:3], labels[:3]),
        ["aa:package"],
        epsilon=2.0,  # no image survives, and so Square has nothing to do
        threat_model="L2",
        batch_size=2,
        on_batch=lambda attack, done, total: calls.append(done),
    )["aa:package"]
    assert result.correct == 0
    assert "with 3 target classes" in result.description
    assert "L2, epsilon 2, " in result.description
    assert calls == [2, 3]


def test_autoattack_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pyautoattack", "autoattack")
    with pytest.raises(ValueError, match="aa:package: AutoAttack is not installed; pip install pyautoattack"):
        check_names(["natural", "aa:package"])
    assert check_names(["natural", "fgsm", "natural"]) == ["natural", "fgsm"]


def test_the_original_package_serves_where_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in with the constructor and the method of the original."""

    def perturbed(x_orig: Tensor, eps: float) -> Tensor:
        return (x_orig + eps * (x_orig.roll(1, dims=3) - 0.5).sign()).clamp(0, 1)

    class AutoAttack:
        def __init__(
            self, model: Any, norm: str, eps: float, seed: int, verbose: bool, version: str, device: torch.device
        ) -> None:
            assert (norm, version, seed, verbose, device.type) == ("Linf", "standard", 9, False, "cpu")
            self.model, self.eps = model, eps
            self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()

        def run_standard_evaluation(self, x_orig: Tensor, y_orig: Tensor, bs: int) -> Tensor:
            print("something else")  # noqa: T201
            sys.settrace(None)  # as the check for dynamic models does
            assert bs == len(x_orig) == len(y_orig)
            assert x_orig.is_contiguous()
            assert self.apgd_targeted.n_target_classes == self.fab.n_target_classes == 9
            assert self.model(x_orig).dtype == x_orig.dtype == torch.float32
            return perturbed(x_orig, self.eps)

    module = ModuleType("autoattack")
    module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    without(monkeypatch, "pyautoattack")
    monkeypatch.setitem(sys.modules, "autoattack", module)
    monkeypatch.setattr(metadata, "version", {"autoattack": "0.1"}.__getitem__)
    model = network()
    images, labels = labelled(model)

    def trace(frame: FrameType, event: str, argument: object) -> None:
        """Trace function, as a debugger or a coverage tool sets."""

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        result = evaluate(model, (images, labels), ["aa:package"], epsilon=0.2, batch_size=5, seed=9)["aa:package"]
        kept = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert kept is trace
    with torch.no_grad():
        x_adv = perturbed(images.permute(0, 3, 1, 2).float() / 255, 0.2).double()
        expected = int((copy.deepcopy(model).eval()(x_adv).argmax(1) == labels).sum())
    assert 0 < result.correct == expected < 20
    assert "autoattack 0.1" in result.description
    output = capsys.readouterr()
    assert output.out == ""
    assert "something else" in output.err


class FewSurvive:
    """Stands in for the package: of the images that are left, each attack breaks those whose turn it is."""

    def __init__(self, model: Any, **keys: Any) -> None:
        self.model, self.attacks_to_run = model, ["all"]
        self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()

    def run_standard_evaluation(self, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        (part,) = self.attacks_to_run
        with torch.no_grad():
            assert (self.model(images).argmax(1) == labels).all()  # only what the others left
        turn = (images[:, 0, 0, 0] * 255).round() == autoattack.AA_PARTS.index(part)
        broken = images.clone()
        broken[turn, 1, 0, 0] = 1 - broken[turn, 1, 0, 0]
        if part == "apgd-ce" and turn.any():
            logging.getLogger("auto-attack").warning("there are 3 points with zero gradient! See flags_doc.md")
        return broken, labels


class Switch(nn.Module):
    """Class 0, and class 1 where the second channel's first pixel is bright."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images[:, 1, 0, 0]
        return torch.stack((1 - bright, bright, 0 * bright, 0 * bright), dim=1) - 0.25


@pytest.mark.parametrize(("by_square", "warns"), [(0, False), (1, False), (3, True)])
def test_square_s_check_is_of_all_images(by_square: int, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 250 is 0.4 %, and one of 1,000 is 0.1 %: the limit is 0.2 %."""
    module = ModuleType("pyautoattack")
    module.AutoAttack = FewSurvive  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyautoattack", module)
    images = torch.zeros(1000, 3, 4, 4)
    turns = torch.zeros(1000, dtype=torch.int64)
    turns[1:1000:10], turns[2:1000:20], turns[3:1000:40] = 1, 2, 3
    turns[[5, 305, 705][:by_square]] = 4
    images[:, 0, 0, 0] = turns / 255
    labels = torch.zeros(1000, dtype=torch.int64)
    labels[::10] = 1  # never right
    result = evaluate(Switch(), (images, labels), ["aa:package"], epsilon=1.0)["aa:package"]
    assert result.parts == {
        "natural": 0.9, "apgd-ce": 0.8, "apgd-t": 0.75, "fab-t": 0.725, "square": (725 - by_square) / 1000
    }  # fmt: skip
    assert result.correct == 725 - by_square
    expected = ((turns == 0) & (labels == 0)).tolist()
    assert result.verdicts.tolist() == expected
    assert any("gradient of the DLR loss or of the margin is zero" in text for text in result.warnings)
    assert any("Square" in text for text in result.warnings) == warns


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Softmax(1)), "probabilities, and logits are needed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), None),
    ],
)
def test_the_package_s_warnings_are_kept(
    model: nn.Module, words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    images, labels = labelled(model, 6)
    result = evaluate(model, (images, labels), ["aa:package"], epsilon=0.3, batch_size=3)["aa:package"]
    assert [text for text in result.warnings if "probabilities" in text] == (
        [f"aa:package: the network gives {words}; the accuracy may be too high"] if words else []
    )
    assert list(result.parts) == list(autoattack.AA_PARTS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""

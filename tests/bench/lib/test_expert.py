"""The expert's step where it is compiled: the same numbers, and no gradient of a weight in the attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.lib.steps import expert, textbook, variants
from tests.compilers import convolution_gradients

BATCH, SIZE, NUM_STEPS = 4, 16, 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(method: str, compiler: Mapping[str, Any] | None, num_steps: int) -> tuple[nn.Module, expert.ExpertStep]:
    """A student and its step."""
    student, at, st = (textbook.plain(network) for network in variants.random_networks("resnet8", 10))
    runs, t_at, t_st = (expert.AutocastNetwork(network, nullcontext, compiler) for network in (student, at, st))
    setting = textbook.StepSetting(method, num_steps=num_steps)
    return student, expert.ExpertStep(setting, runs, t_at, t_st, expert.sgd(student, 0.1))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and where an attack begins."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (BATCH,), generator=generator), (images + 0.01).clamp(0, 1)


@pytest.mark.parametrize("method", ["ard", "iad1", "akd2", "iad2"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_with_given_images_is_the_eager_one(method: str, backend: str) -> None:
    """x~ is where the attack would have begun, since signs of gradients drift apart."""
    plain, eager = made(method, None, 0)
    student, compiled = made(method, {"backend": backend}, 0)
    torch.testing.assert_close(compiled(*batch()), eager(*batch()), rtol=1e-5, atol=1e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_attack_computes_no_weight_gradient_and_the_training_does() -> None:
    masks, backend = convolution_gradients()
    student, step = made("at", {"backend": backend}, NUM_STEPS)
    images, labels, start = batch()
    step.attack(images, labels, start)
    assert masks == [[True, False, False]] * 9
    assert all(weight.requires_grad for weight in student.parameters())
    masks.clear()
    step.loss(images, start, labels).backward()
    assert [mask[1] for mask in masks] == [True] * 9
    masks.clear()
    textbook.TextbookStep.attack(step, images, labels, start)  # as it would be with weights that are not frozen
    assert all(mask[1] for mask in masks)


def test_the_loss_stays_on_the_device() -> None:
    _, step = made("at", None, 1)
    loss = step(*batch())
    assert isinstance(loss, Tensor)
    assert not loss.requires_grad


def test_baselines_are_of_torch_s_own_layers() -> None:
    network = textbook.plain(variants.random_networks("resnet8", 10)[0])
    layers = {type(module) for module in network.modules() if [*module.parameters(recurse=False)]}
    assert layers == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


def test_determinism_is_the_engine_s_alone() -> None:
    seen = {}
    cudnn = torch.backends.cudnn
    for name in ("textbook", "expert", "expert-fp32", "fp32", "amp", "all"):
        with variants.VARIANTS[name].conditions():
            seen[name] = (cudnn.deterministic, cudnn.benchmark)
    assert seen == {
        "textbook": (False, False),
        "expert": (False, True),
        "expert-fp32": (False, True),
        "fp32": (True, False),
        "amp": (True, False),
        "all": (True, False),
    }
    assert (cudnn.deterministic, cudnn.benchmark) == (False, False)

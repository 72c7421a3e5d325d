"""The form in which AutoAttack attacks a network: its bits depend on no other image of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.attacks.auto.pool import FEWEST_SLOTS
from engine.attacks.evaluated import prepared
from engine.models import build, layers
from engine.models.layers import fewest_images
from engine.system.precision import Precision


def attacked(name: str, *, winograd: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = build(name, 10).eval().requires_grad_(False)
    return prepared(network, Precision(torch.device("cpu"), torch.float32, winograd=winograd))


def passes(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the sum of their squares."""
    x = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = network(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


@pytest.mark.parametrize(
    ("name", "kept", "fewest"), [("resnet8", True, 4), ("resnet18", True, 16), ("resnet18", False, 64)]
)
def test_an_images_bits_depend_on_no_other_from_the_fewest_slots_on(
    name: str, kept: bool, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:  # as of a network that is too large
        monkeypatch.setattr(layers, "_MOST_KEPT", 0)
    network, image = attacked(name), torch.rand(1, 3, 32, 32)
    # The last map, of 8 x 8, is 4 tiles, or of 4 x 4 one; 16 tiles, or 64, are computed by Winograd's algorithm.
    assert fewest_images(network, image) == fewest
    fewest = max(fewest, FEWEST_SLOTS)
    images = torch.rand(fewest + 7, 3, 32, 32)
    logits, gradient = passes(network, images)
    for chosen in (torch.arange(fewest), torch.randperm(fewest + 7)):
        own = passes(network, images[chosen])
        assert torch.equal(own[0], logits[chosen])
        assert torch.equal(own[1], gradient[chosen])


def test_without_winograds_algorithm_any_number_of_images_is_computed_alike() -> None:
    network = attacked("resnet18", winograd=False)
    assert fewest_images(network, torch.rand(1, 3, 32, 32)) == 1
    assert not any(module._forward_pre_hooks for module in network.modules())

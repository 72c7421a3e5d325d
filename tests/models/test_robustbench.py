"""Names of RobustBench's entries: the network and the normalisation, for a file that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.models import robustbench
from engine.models.robustbench import ENTRIES, EPSILON, find
from engine.models.weights import load_model

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_entry_has_an_architecture_or_says_what_is_missing() -> None:
    assert len({each.full_name for each in ENTRIES}) == len(ENTRIES)
    assert {each.leaderboard for each in ENTRIES} == EPSILON.keys()
    for each in ENTRIES:
        if each.missing:
            with pytest.raises(
                ValueError, match=r"^model: robustbench:[^\n]+, an architecture that is not here$"
            ) as error:
                models.get(each.full_name)
            assert each.missing in str(error.value)
        elif ":" not in each.architecture:  # those of libraries are built by their own tests
            assert models.get(each.architecture).summary
            assert models.get(each.full_name).normalization == each.normalization


@pytest.mark.parametrize(
    ("name", "architecture", "mean"),
    [
        ("Wang2023Better_WRN-28-10", "wrn28-10-silu", (0.4914, 0.4822, 0.4465)),
        ("cifar100:Wang2023Better_WRN-28-10", "wrn28-10-silu", (0.5071, 0.4865, 0.4409)),
        ("Carmon2019Unlabeled", "wrn28-10", None),
        ("Rebuffi2021Fixing_106_16_cutmix_ddpm", "wrn106-16-silu", (0.4914, 0.4822, 0.4465)),
        ("cifar10:L2:Rice2020Overfitting", "preactresnet18", (0.4914, 0.4822, 0.4465)),
        ("cifar10:Linf:Rice2020Overfitting", "wrn34-20", (0.4914, 0.4822, 0.4465)),
        ("cifar10:Engstrom2019Robustness", "resnet50-cifar", (0.4914, 0.4822, 0.4465)),
        ("imagenet:Engstrom2019Robustness", "resnet50", (0.485, 0.456, 0.406)),
        ("Mo2022When_ViT-B", "timm:vit_base_patch16_224", (0.485, 0.456, 0.406)),
    ],
)
def test_a_name_gives_the_published_network(name: str, architecture: str, mean: Any) -> None:
    entry = find(name)
    assert entry.architecture == architecture
    assert (entry.normalization and entry.normalization[0]) == mean


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Wang2023Beter_WRN-28-10", "did you mean 'Wang2023Better_WRN-28-10'"),
        ("Rice2020Overfitting", "several networks; say which: robustbench:cifar10:Linf:Rice2020Overfitting, "),
        ("cifar100:Carmon2019Unlabeled", "on no such leaderboard; known: robustbench:cifar10:Linf:Carmon2019"),
        ("Sehwag2021Proxy_ResNest152", "is ResNeSt-152, an architecture that is not here"),
    ],
)
def test_a_name_that_is_none_is_told_in_a_line(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"^model: [^\n]+$") as error:
        models.get(f"robustbench:{name}")
    assert told in str(error.value)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of a small network in place of those of 146 MB."""
    constants = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5))
    entries = (
        robustbench.Published("cifar10:Linf", "With", "wrn10-1", constants),
        robustbench.Published("cifar10:Linf", "Without", "wrn10-1"),
        robustbench.Published("cifar100:Linf", "With", "wrn10-1", (constants[1], constants[0])),
    )
    monkeypatch.setattr(robustbench, "ENTRIES", entries)


def written(path: Path, num_classes: int = 10, prefix: str = "module.") -> nn.Module:
    """A network of random weights, and its file as the leaderboard's are: without a normalisation."""
    torch.manual_seed(0)
    network = models.build("wrn10-1", num_classes).eval()
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in network.state_dict().items()}}, path)
    return network


@torch.no_grad()
def logits(network: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = network(x)
    return out


@pytest.mark.usefixtures("small")
def test_a_file_gets_the_published_normalisation(tmp_path: Path) -> None:
    network = written(tmp_path / "net.pt")
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5)))
    loaded = load_model(tmp_path / "net.pt", model="robustbench:With")
    torch.testing.assert_close(logits(loaded.module, IMAGES), logits(network, (IMAGES - mean) / std))
    assert loaded.normalize == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5))
    assert any("normalises its images by mean [0.4, 0.5, 0.6]" in note for note in loaded.notes)
    plain = load_model(tmp_path / "net.pt", model="robustbench:Without")
    torch.testing.assert_close(logits(plain.module, IMAGES), logits(network, IMAGES))
    assert plain.normalize is None


@pytest.mark.usefixtures("small")
def test_weights_of_another_data_set_s_entry_are_refused(tmp_path: Path) -> None:
    """Its normalisation would be nearly right."""
    written(tmp_path / "net.pt", 100)
    with pytest.raises(
        ValueError, match="robustbench:cifar10:Linf:With has the 10 classes of cifar10, the weights "
    ):
        load_model(tmp_path / "net.pt", model="robustbench:With")
    assert load_model(tmp_path / "net.pt", model="robustbench:cifar100:With").num_classes == 100

"""A student that starts from pretrained weights of timm or torchvision, whose downloads are made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from engine import config, models
from engine.common.stopping import Interrupted
from engine.models import pretrained
from engine.models.normalize import CONSTANTS
from engine.runs import assemble, lifecycle
from engine.runs.assemble import InitialWeights
from engine.system.distributed import World
from tests.runs.helpers import Listener
from tests.runs.test_initial_weights import EVERY, snapshot
from tests.runs.test_resume import StopAt, assert_same_run

torchvision = pytest.importorskip("torchvision")
IMAGENET = [f"n{index:08}" for index in range(1000)]


class Data:
    """The classes of a data set, which is all that is asked of it."""

    def __init__(self, *class_names: str) -> None:
        self.class_names = class_names


def filled(network: nn.Module) -> dict[str, Tensor]:
    """Values that no initialisation draws."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }


@pytest.fixture
def resnet18(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors that torchvision would download for resnet18."""
    state = filled(torchvision.models.resnet18())
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **keys: dict(state))
    return state


@pytest.fixture
def tiny_of_timm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors that timm would download for test_resnet, a network for tests."""
    timm = pytest.importorskip("timm")
    state = filled(timm.create_model("test_resnet"))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **keys: dict(state))
    return state


def initial(*class_names: str, **keys: Any) -> InitialWeights:
    complete = config.load({"method": "at", "device": "cpu"}, keys)
    return assemble.initial_weights(complete, Data(*class_names), torch.float32, World())  # type: ignore[arg-type]


def without(head: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(head) and "num_batches" not in key}


def assert_holds(found: InitialWeights, expected: dict[str, Tensor], prefix: str = "") -> None:
    for key, value in expected.items():
        assert torch.equal(found.state[prefix + key], value), key


def test_an_own_resnet_for_imagenet_has_torchvisions(resnet18: dict[str, Tensor]) -> None:
    """And its constants: those of the data set would be wrong for the weights."""
    keys = {"model": "resnet18-imagenet", "init": "torchvision", "normalize": True, "dataset": "cifar10"}
    found = initial("cat", "dog", **keys)
    assert_holds(found, without("fc.", resnet18))
    for number, name in enumerate(("mean", "std")):
        expected = torch.tensor(CONSTANTS["imagenet"][number]).reshape(3, 1, 1)
        assert torch.equal(found.state[f"normalize.{name}"], expected)
    assert found.state["fc.weight"].shape == (2, 512)
    torch.manual_seed(0)
    drawn = models.build("resnet18-imagenet", 2, normalize=True).state_dict()
    assert torch.equal(found.state["fc.weight"], drawn["fc.weight"])
    assert found.name == "ResNet18_Weights.IMAGENET1K_V1"
    assert any("the head is a new one" in note for note in found.notes)


def test_logits_are_torchvisions(resnet18: dict[str, Tensor]) -> None:
    """For images in [0, 1], on classes by their WordNet ids, in whose order the library has them."""
    found = initial(*IMAGENET, model="resnet18-imagenet", init="torchvision", normalize=True)
    network = models.build("resnet18-imagenet", 1000, normalize=True).eval()
    network.load_state_dict(found.state)
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(resnet18)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in CONSTANTS["imagenet"])
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs((images - mean) / std), rtol=1e-4, atol=1e-4)
    assert not any("new one" in note for note in found.notes)
    swapped = [IMAGENET[1], IMAGENET[0], *IMAGENET[2:]]
    rows = initial(*swapped, model="resnet18-imagenet", init="torchvision", normalize=True).state["fc.weight"]
    assert torch.equal(rows[:3], resnet18["fc.weight"][[1, 0, 2]])


def test_a_thousand_other_classes_have_a_head_of_their_own(resnet18: dict[str, Tensor]) -> None:
    names = [str(index) for index in range(1000)]
    found = initial(*names, model="resnet18-imagenet", init="torchvision", normalize=True)
    assert not torch.equal(found.state["fc.weight"], resnet18["fc.weight"])


def test_a_network_of_torchvision_has_its_weights(resnet18: dict[str, Tensor]) -> None:
    found = initial("cat", "dog", model="torchvision:resnet18", init="torchvision")
    assert_holds(found, without("fc.", resnet18), "network.")
    assert found.state["network.fc.bias"].shape == (2,)


def test_further_logits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    state = filled(torchvision.models.googlenet(init_weights=False))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **keys: dict(state))
    found = initial("cat", "dog", model="torchvision:googlenet", init="torchvision")
    assert torch.equal(found.state["network.conv1.conv.weight"], state["conv1.conv.weight"])


def test_a_network_of_timm_has_its_weights(tiny_of_timm: dict[str, Tensor]) -> None:
    found = initial("cat", "dog", model="timm:test_resnet", init="timm")
    assert_holds(found, without("fc.", tiny_of_timm), "network.")
    assert found.state["network.fc.weight"].shape[0] == 2
    assert found.name == "test_resnet.r160_in1k"
    again = initial("cat", "dog", model="timm:test_resnet", init="timm")
    assert again.sha256 == found.sha256
    tiny_of_timm["conv1.0.weight"][0, 0, 0, 0] += 1
    assert initial("cat", "dog", model="timm:test_resnet", init="timm").sha256 != found.sha256


def test_a_run_tells_which_weights_it_took_and_resumes_without_them(
    resnet18: dict[str, Tensor], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**EVERY, "method": "st", "model": "torchvision:resnet18", "init": "torchvision", "epochs": 1}
    keys |= {"eval": {"final": [], "probe_size": 3, "attack": "fgsm"}}
    listener = Listener()
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")), listener).path
    assert any("ResNet18_Weights.IMAGENET1K_V1 of torchvision" in line for line in listener.lines)
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(2))
    monkeypatch.setattr(pretrained, "load", lambda *args: pytest.fail("downloaded again"))
    parts = lifecycle.resume(tmp_path / "parts").path
    assert_same_run(whole, parts)
    first = snapshot(whole, 0)["student"]
    assert torch.equal(first["network.conv1.weight"], resnet18["conv1.weight"])
    digest = torch.load(parts / "last.pt", weights_only=True)["init_sha256"]
    provenance = json.loads((parts / "provenance.json").read_text())
    expected = {"source": "torchvision", "sha256": digest, "weights": "ResNet18_Weights.IMAGENET1K_V1"}
    assert provenance["init"] == provenance["earlier_sessions"][-1]["init"] == expected


# ---------------------------------------------------------------- what cannot be


def no_network(*args: Any, **keys: Any) -> None:
    raise URLError("[Errno -2] Name or service not known")


def hub_is_down(*args: Any, **keys: Any) -> None:
    raise RuntimeError("An error happened.\nPlease check your connection\n" + 50 * "and again ")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": "resnet18", "init": "torchvision"}, "the ResNets for ImageNet, and model is 'resnet18'"),
        ({"model": "resnet8", "init": "torchvision"}, "and model is 'resnet8'"),
        ({"model": "timm:test_resnet", "init": "torchvision"}, "and model is 'timm:test_resnet'"),
        ({"model": "resnet50", "init": "timm"}, "timm has weights of timm:NAME, and model is 'resnet50'"),
        ({"model": "timm:botnet50ts_256", "init": "timm"}, "timm has no pretrained weights of botnet50ts_256"),
        (
            {"model": "timm:test_resnet", "init": "timm"},
            "timm cannot fetch its weights test_resnet.r160_in1k: An ",
        ),
        (
            {"model": "torchvision:resnet18", "init": "torchvision"},
            "ResNet18_Weights.IMAGENET1K_V1: .*service not",
        ),
    ],
)
def test_what_a_library_cannot_give_is_told_in_a_line(
    keys: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, cli: Any, tiny: Any, tmp_path: Path
) -> None:
    """And nothing is left behind."""
    pytest.importorskip("timm")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub_is_down)
    out = tmp_path / "run"
    outcome = cli(*tiny.flags(**keys, method="st", out=str(out)))
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert len(line) < 300
    with pytest.raises(ValueError, match=words):
        initial("cat", "dog", **keys)
    assert not out.exists()


def test_weights_of_a_network_that_normalises_want_one(resnet18: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match="^init: torchvision: the network normalises its images, and normalize is f"
    ):
        initial("cat", "dog", model="resnet18-imagenet", init="torchvision")


def test_a_library_that_is_absent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="^init: timm cannot be imported: .*pip install 'iad-engine") as refusal:
        pretrained.load("timm", "timm:test_resnet", ("cat", "dog"))
    assert "\n" not in str(refusal.value)

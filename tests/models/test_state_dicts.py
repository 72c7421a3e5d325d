"""Layouts of checkpoint files that people have: which tensors are taken of them, and what is said."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from engine import models
from engine.common.tensor_files import read_tensors
from engine.models.architecture import Architecture
from engine.models.weights import fill, load_model, read_weights

State = dict[str, Tensor]
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])
MODEL = "resnet8"


@cache
def trained(seed: int = 0, model: str = MODEL, num_classes: int = 10) -> State:
    torch.manual_seed(seed)
    network = models.build(model, num_classes)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network.state_dict()


def named(prefix: str, state: State | None = None) -> State:
    return {prefix + key: tensor for key, tensor in (trained() if state is None else state).items()}


def normaliser(prefix: str, mean: str = "mean", std: str = "std") -> State:
    return {f"{prefix}{mean}": MEAN[None, :, None, None], f"{prefix}{std}": STD[None, :, None, None]}


def madry() -> dict[str, Any]:
    """MadryLab's robustness: the network a second time, within the attacker that trained it."""
    new = ("new_mean", "new_std")
    own = named("module.model.") | normaliser("module.normalizer.", *new)
    attacker = named("module.attacker.model.") | normaliser("module.attacker.normalize.", *new)
    return {
        "model": attacker | own,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 2)}}},
        "epoch": 90,
    }


CRITERION = {"criterion.weight": torch.ones(10)}
LIGHTNING = "not read, as no logits come of them: 'criterion.weight'"
OTHERS = "the weights under {!r} are taken, and the file also has {} (--weights-key)"
LAYOUTS: dict[str, tuple[Callable[[], Any], str, str, tuple[str, ...]]] = {
    "bare": (trained, "", "", ()),
    "bare with other values": (lambda: {**trained(), "epoch": 3, "arch": "resnet"}, "", "", ()),
    "DataParallel": (lambda: {"state_dict": named("module."), "best_acc1": 0.9}, "state_dict", "module.", ()),
    "compiled": (lambda: {"net": named("_orig_mod.module.")}, "net", "_orig_mod.module.", ()),
    "Sequential in DataParallel": (lambda: {"net": named("module.0.")}, "net", "module.0.", ()),
    "AveragedModel": (
        lambda: named("module.") | {"n_averaged": torch.tensor(3)}, "", "module.",
        ("not read, as no logits come of them: 'n_averaged'",),
    ),
    "Lightning": (lambda: {"state_dict": named("model.") | CRITERION}, "state_dict", "model.", (LIGHTNING,)),
    "Lightning's student": (lambda: {"state_dict": named("student.")}, "state_dict", "student.", ()),
    "net": (lambda: named("net."), "", "net.", ()),
    "backbone": (lambda: {"state_dict": named("module.backbone.")}, "state_dict", "module.backbone.", ()),
    "network": (lambda: named("network."), "", "network.", ()),
    "a name that is in no list": (lambda: {"abc": named("d.e.f.")}, "abc", "d.e.f.", ()),
    "state.model": (lambda: {"state": {"model": trained(), "epoch": 1}}, "state.model", "", ()),
    "model.state_dict": (lambda: {"model": {"state_dict": trained()}}, "model.state_dict", "", ()),
    "in a list": (lambda: [named("module."), {"lr": 0.1}], "0", "module.", ()),
    "ema": (lambda: {"ema": trained(), "updates": 5}, "ema", "", ()),
    "weights": (lambda: {"weights": trained()}, "weights", "", ()),
    "params": (lambda: {"params": trained()}, "params", "", ()),
    "a foreign key student": (lambda: {"student": trained(), "epoch": 1}, "student", "", ()),
    "options and NumPy's numbers beside": (
        lambda: {"model": trained(), "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5), "n": np.int64(3)},
        "model", "", (),
    ),
    "without counters": (
        lambda: {key: tensor for key, tensor in trained().items() if "num_batches" not in key}, "", "", ()
    ),
    "an unused second name (Andriushchenko2020)": (
        lambda: trained() | {"model_preact_hl1.1.weight": torch.ones(64, 3, 3, 3)}, "", "",
        ("dropped 1 unused model_preact_hl1 tensors (0.0 M parameters no forward uses)",),
    ),
    "weights and their average": (
        lambda: {"state_dict": trained(), "state_dict_ema": named("module.", trained(1))}, "state_dict", "",
        (OTHERS.format("state_dict", "'state_dict_ema'"),),
    ),
    "weights and their average in one state dict": (
        lambda: {"state_dict": named("model.") | named("ema_model.module.", trained(1))}, "state_dict", "model.",
        (OTHERS.format("state_dict.model", "'state_dict.ema_model.module'"),),
    ),
    "the average under the usual name (DM-Improves-AT)": (
        lambda: {"unaveraged_model_state_dict": named("module.0.", trained(1))}
        | {"model_state_dict": named("module.0.")},
        "model_state_dict", "module.0.", (OTHERS.format("model_state_dict", "'unaveraged_model_state_dict'"),),
    ),
    "the same weights twice": (
        lambda: {"net": trained(), "model": {"state_dict": named("module.")}}, "net", "",
        ("the same weights are under 'model.state_dict.module', too",),
    ),
    "the same weights under another normalised copy": (
        lambda: {"state_dict": named("model.") | named("attacker.model.")}, "state_dict", "model.",
        ("the same weights are under 'state_dict.attacker.model', too",),
    ),
}  # fmt: skip
"""Name -> content, place and prefix of the weights in it, notes."""

NORMALISED: dict[str, tuple[Callable[[], Any], str, str, tuple[str, ...]]] = {
    "MadryLab": (
        madry, "model", "module.model.", ("the same weights are under 'model.module.attacker.model', too",)
    ),
    "RobustBench, buffers of the network": (
        lambda: {"state_dict": named("module.") | normaliser("module.", "mu", "sigma")},
        "state_dict", "module.", (),
    ),
    "RobustBench, a layer before": (lambda: normaliser("normalize.") | named("model."), "", "model.", ()),
    "Sequential": (lambda: normaliser("0.") | named("1."), "", "1.", ()),
    "Sequential in DataParallel": (
        lambda: {"state_dict": normaliser("module.0.") | named("module.1.")}, "state_dict", "module.1.", ()
    ),
    "Lightning": (
        lambda: {"state_dict": normaliser("normalizer.") | named("model.") | CRITERION}, "state_dict", "model.",
        (LIGHTNING,),
    ),
}  # fmt: skip


def save(folder: Path, payload: object) -> Path:
    torch.save(payload, folder / "theirs.pth")
    return folder / "theirs.pth"


def assert_loaded(state: State, source: State) -> None:
    floats = {key: tensor for key, tensor in source.items() if tensor.is_floating_point()}
    assert len(floats) == 47
    for key, tensor in floats.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("named_model", [None, MODEL])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_told(tmp_path: Path, layout: str, named_model: str | None) -> None:
    make, taken, prefix, notes = LAYOUTS[layout]
    path = save(tmp_path, make())
    found = read_weights(path, model=named_model)
    assert (found.taken, found.prefix, found.model, found.num_classes) == (taken, prefix, MODEL, 10)
    assert found.notes == notes
    loaded = load_model(path, model=named_model)
    assert_loaded(loaded.module.state_dict(), trained())
    assert (loaded.taken, loaded.normalize) == (taken, None)


@pytest.mark.parametrize("layout", NORMALISED)
def test_every_layout_with_normalisation_is_read_and_told(tmp_path: Path, layout: str) -> None:
    make, taken, prefix, notes = NORMALISED[layout]
    path = save(tmp_path, make())
    found = read_weights(path)
    assert (found.taken, found.prefix, found.model, found.notes) == (taken, prefix, MODEL, notes)
    loaded = load_model(path)
    state = loaded.module.state_dict()
    assert_loaded(state, trained())
    assert torch.equal(state["normalize.mean"].flatten(), MEAN)
    assert torch.equal(state["normalize.std"].flatten(), STD)
    assert loaded.normalize is not None


def test_what_is_dropped_is_named(tmp_path: Path) -> None:
    copy = {f"module.attacker.{key}" for key in named("model.")}
    copy |= {"module.attacker.normalize.new_mean", "module.attacker.normalize.new_std"}
    assert set(read_weights(save(tmp_path, madry())).dropped) == copy
    path = save(tmp_path, {"state_dict": named("model.") | CRITERION})
    assert read_weights(path).dropped == ("criterion.weight",)


# Which of several


AMBIGUOUS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "student and teacher": (lambda: {"student": trained(1), "teacher": trained()}, ("student", "teacher")),
    "the same in one state dict": (
        lambda: {"state_dict": named("student.", trained(1)) | named("teacher.")},
        ("state_dict.student", "state_dict.teacher"),
    ),
    "last and best": (lambda: {"last": named("module.", trained(1)), "best": named("module.")}, ("last", "best")),
    "two averages": (lambda: {"ema": trained(1), "swa": trained()}, ("ema", "swa")),
    "an ensemble": (lambda: named("models.0.", trained(1)) | named("models.1."), ("models.0", "models.1")),
    "a copy in another format": (
        lambda: {"half": {key: tensor.half() for key, tensor in trained().items()}, "full": trained()},
        ("half", "full"),
    ),
    "a copy with other normalisation": (
        lambda: {"model": trained() | normaliser("", "mu", "sigma"), "net": trained()}, ("model", "net"),
    ),
    "two architectures": (lambda: {"small": trained(0, "mobilenetv2"), "other": trained()}, ("small", "other")),
}  # fmt: skip


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_several_networks_ask_for_one(tmp_path: Path, layout: str) -> None:
    make, keys = AMBIGUOUS[layout]
    path = save(tmp_path, make())
    with pytest.raises(
        ValueError, match=r"^[^\n]*theirs.pth: holds several networks: [^\n]*--weights-key[^\n]*$"
    ) as error:
        load_model(path)
    assert all(f"'{key}" in str(error.value) for key in keys)
    loaded = load_model(path, weights=keys[1])
    assert_loaded(loaded.module.state_dict(), trained())
    assert loaded.notes == ()


def test_the_named_model_decides_between_two_architectures(tmp_path: Path) -> None:
    path = save(tmp_path, {"small": trained(0, "mobilenetv2"), "other": trained()})
    assert_loaded(load_model(path, model=MODEL).module.state_dict(), trained())


def test_one_network_that_fits_two_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = models.TABLE[MODEL]
    monkeypatch.setitem(models.TABLE, "twin", Architecture("the same tensors", row.builder, version="1"))
    path = save(tmp_path, {"net": named("module.")})
    with pytest.raises(
        ValueError, match=r"theirs.pth: model: its tensors fit several architectures: resnet8, twin; name"
    ):
        load_model(path)
    assert load_model(path, model=MODEL).name == MODEL


# What a forward may read is never dropped


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (lambda: trained() | {"extra.weight": torch.ones(3, 3)}, "fit no known architecture"),
        (
            lambda: named("backbone.") | {"head.weight": torch.ones(5, 10)},
            "beside the network under 'backbone' there are 1 tensors that its forward may read, the first "
            "'head.weight'; --weights-key backbone takes the network without them",
        ),
        (
            lambda: {"state_dict": named("0.") | {"1.temperature": torch.ones(1)}},
            "beside the network under 'state_dict.0' there are 1 tensors that its forward may read, the first "
            "'1.temperature'",
        ),
        (lambda: named("module.1."), "normalize: the network is 'module.1.' of a sequence, and what stands"),
        (
            lambda: normaliser("normalize.") | named("model.") | normaliser("model.", "mu", "sigma"),
            "one mean and one std are expected for normalisation, got ['normalize.mean', 'model.mu', ",
        ),
    ],
)  # fmt: skip
def test_what_a_forward_may_read_is_not_dropped(tmp_path: Path, payload: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(save(tmp_path, payload()))
    assert words in str(error.value)


def test_a_named_prefix_takes_the_network_without_what_is_beside_it(tmp_path: Path) -> None:
    payload = {"state_dict": named("backbone.") | {"head.weight": torch.ones(5, 10)}}
    loaded = load_model(save(tmp_path, payload), weights="state_dict.backbone")
    assert_loaded(loaded.module.state_dict(), trained())
    assert loaded.taken == "state_dict.backbone"


def test_what_stands_before_a_network_can_be_told(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path, named("1.")), normalize=(MEAN.tolist(), STD.tolist()))
    assert torch.equal(loaded.module.get_buffer("normalize.mean").flatten(), MEAN)


def test_normalisation_that_a_published_network_has_in_its_code_is_asked_for(tmp_path: Path) -> None:
    state = trained(0, "wrn10-1-silu")
    path = save(tmp_path, {"model_state_dict": named("module.0.", state)})
    loaded = load_model(path)
    assert loaded.name == "wrn10-1-silu"
    assert loaded.notes == (
        "the file holds no normalisation, and the published code of such networks has it inside (normalize)",
    )
    assert torch.equal(loaded.module.state_dict()["logits.weight"], state["logits.weight"])
    assert load_model(path, normalize="cifar10").notes[0].startswith("normalises its images by mean [0.4914")


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_that_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in trained().items()}
    loaded = load_model(save(tmp_path, state))
    assert loaded.notes == (f"its weights are {str(dtype)[6:]}, loaded as float32",)
    assert_loaded(
        loaded.module.state_dict(), {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )


# Networks of libraries


def test_a_file_of_torchvision_is_that_network(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    path = save(tmp_path, {"model": theirs.state_dict()})
    loaded = load_model(path, model="torchvision:mobilenet_v3_small")
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in models.get(loaded.name).normalization or ())
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), theirs((images - mean) / std), rtol=1e-5, atol=1e-5)
    own = save(tmp_path, loaded.module.state_dict())
    again = load_model(own, model="torchvision:mobilenet_v3_small")
    with torch.no_grad():
        torch.testing.assert_close(again.module(images), loaded.module(images), rtol=0, atol=0)


def test_the_head_of_a_vision_transformer_is_known(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    classes = ("bird", "cat", "dog", "eel")
    path = save(tmp_path, {"model": theirs.state_dict(), "class_names": classes})
    loaded = load_model(path, model="timm:vit_tiny_patch16_224", class_names=("eel", "cat", "bird", "dog"))
    assert loaded.num_classes == 4
    rows = theirs.state_dict()["head.weight"][[3, 1, 0, 2]]
    state = loaded.module.state_dict()
    assert torch.equal(state["network.head.weight"], rows)
    assert torch.equal(state["network.blocks.3.attn.qkv.weight"], theirs.blocks[3].attn.qkv.weight)


OLD_SWIN = (
    *((rf"layers\.{stage}\.downsample\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3)),
    (r"head\.fc\.", "head."),
)
"""Names of a Swin transformer of timm, and what they were before its version 0.9."""


@pytest.fixture
def small_swin(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a Swin transformer, which is a small one."""
    registry = pytest.importorskip("timm.models._registry")
    name = "swin_tiny_patch4_window7_224"
    sizes: dict[str, Any] = {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 2, 1, 1)}
    make = registry._model_entrypoints[name]
    monkeypatch.setitem(registry._model_entrypoints, name, lambda **options: make(**(options | sizes)))
    return name


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_file_of_an_older_timm_is_read_as_timm_reads_it(tmp_path: Path, small_swin: str, prefix: str) -> None:
    """The Swin transformers of RobustBench's leaderboard are such files."""
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(small_swin, num_classes=10).eval()
    state = {}
    for key, tensor in theirs.state_dict().items():
        for now, before in OLD_SWIN:
            key = re.sub(now, before, key)
        state[prefix + key] = tensor
    mask = {f"{prefix}layers.0.blocks.1.attn_mask": torch.ones(64, 49, 49)}
    path = save(tmp_path, {"state_dict": state | mask})
    loaded = load_model(path, model=f"timm:{small_swin}")
    images = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in loaded.normalize or ())
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), theirs((images - mean) / std), rtol=1e-4, atol=1e-5)
    assert (
        loaded.notes[0] == f"its names are of an older version: read as timm {timm.__version__} reads such a file"
    )
    assert loaded.dropped == tuple(mask)


def test_timm_changes_no_tensor_of_a_file(tmp_path: Path, small_swin: str) -> None:
    """It would resize the kernel that reads another network's patches."""
    import timm

    state = timm.create_model(small_swin, num_classes=10).state_dict()
    state["patch_embed.proj.weight"] = torch.ones(8, 3, 8, 8)
    state["layers.0.blocks.1.attn_mask"] = torch.ones(64, 49, 49)
    with pytest.raises(ValueError, match=r"these are no weights of timm:swin_tiny_patch4_window7_224: "):
        load_model(save(tmp_path, state), model=f"timm:{small_swin}")


# Files of which each has a part


@pytest.mark.parametrize("model", [None, MODEL])
def test_a_part_of_a_checkpoint_is_told_by_its_name(tmp_path: Path, model: str | None) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    part = dict(list(trained().items())[:20])
    path.write_bytes(safetensors.torch.save(part))
    with pytest.raises(ValueError, match=r"^[^\n]*; it is called as a part of a checkpoint in several files: "):
        load_model(path, model=model)


def test_the_tensors_of_safetensors_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        safetensors.torch.save(trained() | {f"ema.{key}": tensor for key, tensor in trained(1).items()})
    )
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert list(read_tensors(path).value) == list(header)


# Weights for a network that is there


def test_a_network_is_filled_and_keeps_its_head_for_other_classes(tmp_path: Path) -> None:
    found = read_weights(save(tmp_path, {"state_dict": named("module.")}))
    names = tuple("abcd")
    torch.manual_seed(5)
    network = models.build(MODEL, 4)
    head = network.state_dict()["linear.weight"].clone()
    with pytest.raises(ValueError, match="the checkpoint's head has 10 classes, the data set has 4"):
        fill(network, found, names)
    notes = fill(network, found, names, new_head=True)
    assert notes == ("the head is a new one: the checkpoint's head has 10 classes, the data set has 4",)
    state = network.state_dict()
    assert torch.equal(state["linear.weight"], head)
    for key, tensor in trained().items():
        assert key.startswith("linear.") or torch.equal(state[key], tensor), key


def test_a_network_is_filled_in_the_order_of_its_classes(tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    found = read_weights(save(tmp_path, {"net": trained(), "classes": names}))
    network: nn.Module = models.build(MODEL, 10)
    (note,) = fill(network, found, names[::-1])
    assert "another order" in note
    assert torch.equal(network.state_dict()["linear.weight"], trained()["linear.weight"].flip(0))
    with pytest.raises(ValueError, match="these are no weights of resnet8: 280 keys missing"):
        fill(models.build("mobilenetv2", 10), found, names)

from __future__ import annotations

import gzip
import io
import pickle
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine import models
from engine.common.tensor_files import write_tensors
from engine.models.normalize import CONSTANTS
from engine.models.weights import LoadedModel, architecture_of, load_model, read_weights

State = dict[str, Tensor]
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])


@cache
def network(name: str, num_classes: int = 10) -> nn.Module:
    """A network without normalisation, in eval mode, whose BatchNorms are no identity."""
    torch.manual_seed(0)
    model = models.build(name, num_classes)
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(std=0.2)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model.eval()


def changed(**changes: Tensor | None) -> State:
    """The state of a resnet8 with some tensors replaced, added or, by None, removed; "__" stands for a dot."""
    state = dict(network("resnet8").state_dict())
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


def logits(module: nn.Module, x: Tensor) -> Tensor:
    module.double()
    with torch.no_grad():
        out: Tensor = module(x)
    module.float()
    return out


def images(size: int = 8) -> Tensor:
    return torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def save(directory: Path, payload: object) -> Path:
    path = directory / "teacher.pt"
    torch.save(payload, path)
    return path


def same_network(loaded: LoadedModel, name: str, normalised: bool = False) -> None:
    x = images()
    outside = (x - MEAN.double()[:, None, None]) / STD.double()[:, None, None] if normalised else x
    assert loaded.name == name
    assert not loaded.module.training
    torch.testing.assert_close(logits(loaded.module, x), logits(network(name), outside), rtol=0, atol=1e-12)


# Foreign layouts


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["resnet8", "resnet8", "mobilenetv2", "preactresnet18"]),
    container=st.sampled_from([None, "state_dict", "net", "model", "model_state_dict"]),
    wrappers=st.lists(st.sampled_from(["module.", "model.", "_orig_mod.", "basic_net."]), max_size=3),
    buffers=st.sampled_from(
        [None, ("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"), ("0.mean", "0.std")]
    ),
    shape=st.sampled_from([(3,), (3, 1, 1), (1, 3, 1, 1)]),
    depth=st.integers(0, 3),
    counters=st.booleans(),
    told=st.booleans(),
)
def test_any_layout_gives_the_logits_of_its_source(
    name: str,
    container: str | None,
    wrappers: list[str],
    buffers: tuple[str, str] | None,
    shape: tuple[int, ...],
    depth: int,
    counters: bool,
    told: bool,
) -> None:
    if buffers == ("0.mean", "0.std"):  # nn.Sequential(normalize, network), itself perhaps wrapped
        depth = min(depth, len(wrappers))
        wrappers = [*wrappers[:depth], "1.", *wrappers[depth:]]
    prefix = "".join(wrappers)
    state: State = {
        prefix + key: value
        for key, value in network(name).state_dict().items()
        if counters or not key.endswith("num_batches_tracked")
    }
    if buffers is not None:
        outer = "".join(wrappers[:depth])
        state = {outer + key: v.reshape(shape) for key, v in zip(buffers, (MEAN, STD), strict=True)} | state
    payload = state if container is None else {container: state, "epoch": 3, "name": "mine"}
    with tempfile.TemporaryDirectory() as directory:
        path = save(Path(directory), payload)
        loaded = load_model(path, model=name if told else None, num_classes=10)
        weights = read_weights(path)
    same_network(loaded, name, normalised=buffers is not None)
    assert weights.normalize == (buffers is not None)
    assert (weights.model, weights.num_classes, weights.dataset, weights.config) == (name, 10, None, None)
    assert (
        any("mean [0.4, 0.5, 0.6] and std [0.3, 0.2, 0.25]" in note for note in loaded.notes) == weights.normalize
    )


@pytest.mark.parametrize("name", models.TABLE)
def test_every_architecture_is_recognised_and_loaded(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, {"net": {f"module.{key}": value for key, value in network(name).state_dict().items()}})
    loaded = load_model(path)
    same_network(loaded, name)
    assert loaded.num_classes == 10
    assert loaded.notes == ()


def test_unused_sub_block1_of_trades_is_dropped_and_said(tmp_path: Path) -> None:
    state = network("wrn34-10").state_dict()
    copies = {key.replace("block1.", "sub_block1."): value for key, value in state.items() if key[:7] == "block1."}
    parameters = sum(value.numel() for key, value in copies.items() if key.endswith(("weight", "bias")))
    assert 2_000_000 < parameters < 2_200_000
    loaded = load_model(save(tmp_path, {f"module.{key}": value for key, value in (copies | state).items()}))
    same_network(loaded, "wrn34-10")
    assert loaded.notes == (f"dropped {len(copies)} unused sub_block1 tensors (2.1 M parameters no forward uses)",)


def test_note_on_sub_block1_counts_parameters_and_no_running_statistics(tmp_path: Path) -> None:
    state = changed(
        sub_block1__layer__0__bn1__weight=torch.ones(100_000),
        sub_block1__layer__0__bn1__running_mean=torch.ones(100_000),
    )
    note = "dropped 2 unused sub_block1 tensors (0.1 M parameters no forward uses)"
    assert load_model(save(tmp_path, state)).notes == (note,)


def test_counters_that_a_checkpoint_lacks_start_at_zero(tmp_path: Path) -> None:
    state = {k: v for k, v in network("resnet8").state_dict().items() if not k.endswith("num_batches_tracked")}
    path = save(tmp_path, state)
    torch.use_deterministic_algorithms(True)  # fills what is allocated and not written with a large number
    try:
        loaded = load_model(path).module.state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    counters = [value for key, value in loaded.items() if key.endswith("num_batches_tracked")]
    assert [counter.item() for counter in counters] == [0] * 9


def test_architecture_of_needs_all_names() -> None:
    state = dict(network("resnet8").state_dict())
    assert architecture_of(state) == "resnet8"
    del state["bn1.weight"]
    assert architecture_of(state) is None


# Precision, random numbers


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_dtype_is_float64_where_the_weights_are_and_float32_else(
    tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
) -> None:
    state = {k: v.to(saved) if v.is_floating_point() else v for k, v in network("resnet8").state_dict().items()}
    state |= {"mu": MEAN.double(), "sigma": STD.double()}
    got = load_model(save(tmp_path, state)).module.state_dict()
    assert {value.dtype for value in got.values() if value.is_floating_point()} == {loaded}
    assert torch.equal(got["conv1.weight"], state["conv1.weight"].to(loaded))


def test_loading_draws_no_random_numbers_and_shares_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path, network("resnet8").state_dict())
    before = torch.get_rng_state()
    one, other = load_model(path).module, load_model(path).module
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        one.get_parameter("conv1.weight").zero_()
    assert other.get_parameter("conv1.weight").any()
    assert all(parameter.requires_grad for parameter in one.parameters())


# Own checkpoints


def own(**changes: object) -> dict[str, Any]:
    torch.manual_seed(0)
    student = models.build("resnet8", 10, normalize=True, dataset="svhn")
    payload: dict[str, Any] = {
        "format": 1,
        "model": {"name": "resnet8", "num_classes": 10, "normalize": True},
        "dataset": "svhn",
        "class_names": [str(digit) for digit in range(10)],
        "student": student.state_dict(),
        "config": {"epochs": 3},
        "epoch": 7,
    }
    return payload | changes


def test_own_checkpoint_tells_all_about_itself(tmp_path: Path) -> None:
    path = save(tmp_path, own())
    loaded = load_model(path)
    torch.manual_seed(0)
    source = models.build("resnet8", 10, normalize=True, dataset="svhn").eval()
    torch.testing.assert_close(logits(loaded.module, images()), logits(source, images()), rtol=0, atol=1e-12)
    assert (loaded.name, loaded.num_classes, loaded.dataset) == ("resnet8", 10, "svhn")
    assert loaded.config == {"epochs": 3}
    weights = read_weights(path)
    assert (weights.model, weights.num_classes, weights.dataset, weights.normalize) == (
        "resnet8",
        10,
        "svhn",
        True,
    )
    assert weights.config == {"epochs": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 3}, "the key 'format' holds 3, and this version reads 1 and 2"),
        ({"format": None}, "the key 'format' holds None, and this version reads 1 and 2"),
        ({"format": torch.ones(2)}, "the key 'format' holds Tensor, and this version reads 1 and 2"),
        ({"format": [1]}, "the key 'format' holds [1], and this version reads 1 and 2"),
        ({"format": 2}, "is damaged: its checksum is missing"),
        ({"model": {"name": "resnet9"}}, "the key 'model.num_classes' is missing"),
        ({"model": {"name": "resnet9", "num_classes": 10, "normalize": True}}, "model: 'resnet9' is not known"),
        ({"model": {"name": "resnet8", "num_classes": True, "normalize": True}}, "the key 'model.num_classes'"),
        ({"config": {3: 4}}, "the key 'config"),
        ({"config": {"attack": {"epsilon": torch.ones(1)}}}, "the key 'config"),
        ({"class_names": ["a"] * 10}, "the key 'class_names' holds"),
        ({"class_names": [1] * 10}, "the key 'class_names.0' holds 1: input should be a valid string"),
        ({"dataset": None}, "the key 'dataset' holds None: input should be a valid string"),
        ({"student": [1]}, "the key 'student' holds [1]: input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_own_checkpoint_that_holds_something_else_is_refused(tmp_path: Path, changes: Any, words: str) -> None:
    path = save(tmp_path, own(**changes))
    with pytest.raises(ValueError, match=r"^[^\n]{1,600}$") as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: {words}")


def test_a_file_of_others_may_have_a_key_student(tmp_path: Path) -> None:
    same_network(load_model(save(tmp_path, {"student": network("resnet8").state_dict(), "epoch": 3})), "resnet8")


def test_an_unsealed_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    assert "before they had a checksum" in load_model(save(tmp_path, own())).notes[0]
    write_tensors(tmp_path / "sealed.pt", own(format=2))
    assert not any("checksum" in note for note in load_model(tmp_path / "sealed.pt").notes)


# Which weights


def several(**more: object) -> dict[str, object]:
    zeros = {key: torch.zeros_like(value) for key, value in network("resnet8").state_dict().items()}
    return {"state_dict": zeros, **more, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 2)}}}}


@pytest.mark.parametrize(
    ("average", "place"),
    [
        ("swa_state_dict", "swa_state_dict"), ("state_dict_ema", "state_dict_ema"), ("model_ema", "model_ema"),
        ("ema", "ema"), ("ema", "ema.module"), ("ema", "ema.state_dict"),
    ],
)  # fmt: skip
def test_which_of_several_weights_are_taken_is_said_and_can_be_chosen(
    tmp_path: Path, average: str, place: str
) -> None:
    state = {f"module.{key}": value for key, value in network("resnet8").state_dict().items()}
    inner = place.removeprefix(average).removeprefix(".")
    path = save(
        tmp_path,
        several(**{average: {inner: state, "decay": 0.9} if inner else state | {"n_averaged": torch.tensor(3)}}),
    )
    usual = load_model(path)
    assert usual.taken == "state_dict"
    assert (
        f"the weights under 'state_dict' are taken, and the file also has '{place}' (--weights-key)" in usual.notes
    )
    assert "each of its weight matrices holds one value only: this is no trained network" in usual.notes
    chosen = load_model(path, weights=place)
    same_network(chosen, "resnet8")
    assert chosen.taken == place
    assert not any("one value only" in note for note in chosen.notes)
    with pytest.raises(
        ValueError, match=r"^[^\n]*teacher.pt: weights: 'absent' is not known; [^\n]*state_dict[^\n]*$"
    ):
        load_model(path, weights="absent")


def test_an_average_alone_is_taken(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path, {"model_ema": network("resnet8").state_dict(), "epoch": 2}))
    same_network(loaded, "resnet8")
    assert (loaded.taken, loaded.notes) == ("model_ema", ())


def test_nothing_can_be_chosen_of_a_bare_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights: 'ema' is not there, as it holds one unnamed state dict"):
        load_model(save(tmp_path, dict(network("resnet8").state_dict())), weights="ema")


# Normalisation that is told


@pytest.mark.parametrize("given", ["imagenet", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_a_network_whose_loader_normalised_is_told_so(tmp_path: Path, given: Any) -> None:
    loaded = load_model(save(tmp_path, network("resnet8").state_dict()), normalize=given)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in CONSTANTS["imagenet"])
    x = images()
    torch.testing.assert_close(
        logits(loaded.module, x), logits(network("resnet8"), (x - mean) / std), rtol=0, atol=1e-5
    )
    assert loaded.normalize == CONSTANTS["imagenet"]
    assert loaded.notes == ("normalises its images by mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]",)


@pytest.mark.parametrize(
    ("payload", "given", "words"),
    [
        (lambda: changed(mean=MEAN, std=STD), "cifar10", "normalize: the network does so itself; drop it"),
        (own, "cifar10", "normalize: the network does so itself; drop it"),
        (changed, "cifar", "normalize: 'cifar' is not known; did you mean 'cifar10'? known: "),
        (changed, ((1, 2), (3, 4, 5)), "normalize: a mean and a std of three numbers each are expected"),
        (
            changed,
            ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
            "normalize: images are in [0, 1], and so are mean and std",
        ),
        (changed, ((0.5,) * 3, (0.5, 0.5, 0.0)), "normalize: finite numbers and a std above 0 are expected"),
        (
            changed,
            ((0.5, 0.5, float("nan")), (0.5,) * 3),
            "normalize: finite numbers and a std above 0 are expected",
        ),
        (
            lambda: changed(mean=MEAN, std=STD * 0),
            None,
            "normalize: finite numbers and a std above 0 are expected",
        ),
        (lambda: changed(mean=MEAN * 255, std=STD * 255), None, "normalize: images are in [0, 1]"),
    ],
)
def test_normalisation_that_cannot_be(tmp_path: Path, payload: Any, given: Any, words: str) -> None:
    path = save(tmp_path, payload())
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(path, normalize=given)
    assert str(error.value).startswith(f"{path}: {words}")


def test_an_own_checkpoint_tells_itself_that_it_does_not_normalise(tmp_path: Path) -> None:
    plain = own(student=dict(network("resnet8").state_dict()))
    with pytest.raises(ValueError, match="normalize: the checkpoint records that it was trained without; drop it"):
        load_model(save(tmp_path, plain), normalize="cifar10")


# Odd tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (lambda: torch.ones(64, 10).to_sparse(), "'linear.weight' is a sparse tensor (sparse_coo)"),
        (lambda: torch.ones(10, 64).to_sparse_csr(), "'linear.weight' is a sparse tensor (sparse_csr)"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(10, 64), 0.1, 0, torch.qint8),
            "'linear.weight' is a quantised tensor (qint8)",
        ),
        (
            lambda: torch.empty(10, 64, device="meta"),
            "'linear.weight' is a tensor without values (on the device meta)",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "'linear.weight' is a nested tensor"),
        (
            lambda: torch.ones(1, 1).expand(10**6, 10**6),
            "'linear.weight' is a tensor of 1,000,000,000,000 values, of",
        ),
        (
            lambda: torch.ones(1, 64).expand(10, 64),
            "'linear.weight' is a tensor of 640 values, of which fewer are there",
        ),
        (
            lambda: torch.ones(10, 64).to(torch.float8_e4m3fn),
            "'linear.weight' is of torch.float8_e4m3fn, and weights",
        ),
        (
            lambda: torch.ones(10, 64, dtype=torch.complex64),
            "'linear.weight' is of torch.complex64, and weights are",
        ),
        (lambda: torch.ones(10, 64, dtype=torch.bool), "'linear.weight' is of torch.bool, and weights are of"),
        (lambda: torch.ones(10, 64, dtype=torch.int64), "'linear.weight' is of torch.int64, and weights are of"),
        (
            lambda: torch.full((10, 64), torch.inf),
            "1 tensors hold values that are not finite, the first 'linear.weight'",
        ),
        (lambda: torch.ones(10**9, 0), "these are no weights of resnet8"),
        (lambda: torch.empty(2**62, 0), "these are no weights of resnet8"),
    ],
)
@pytest.mark.parametrize("bare", [True, False])
def test_odd_tensors_are_refused_by_name(tmp_path: Path, tensor: Any, words: str, bare: bool) -> None:
    state = changed(linear__weight=tensor())
    path = save(tmp_path, state if bare else {"state_dict": state})
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: {words}")


def test_variances_below_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bn1.running_var' holds negative variances"):
        load_model(save(tmp_path, changed(bn1__running_var=torch.full((16,), -1.0))))


def test_odd_tensors_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    payload = {"state_dict": changed(), "mask": torch.eye(3).to_sparse(), "big": torch.ones(1).expand(10**12)}
    same_network(load_model(save(tmp_path, payload)), "resnet8")


# Errors


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (
            lambda: changed(conv1__weight=None, linear__bias=None),
            "these are no weights of resnet8: 2 keys missing, the first 'conv1.weight'",
        ),
        (
            lambda: changed(linear__weight=None, linear__bias=None),
            "these are no weights of resnet8: 2 keys missing, the first 'linear.weight'",
        ),
        (
            lambda: changed(extra__bias=torch.ones(3), more__bias=torch.ones(3)),
            "these are no weights of resnet8: 2 unknown keys, the first 'extra.bias'",
        ),
        (
            lambda: changed(conv1__weight=torch.ones(16, 3, 7, 7)),
            "these are no weights of resnet8: 1 of another shape, "
            "the first 'conv1.weight' of shape (16, 3, 7, 7) and not (16, 3, 3, 3)",
        ),
        (
            # Sequential(something without buffers, network): what stands before the network cannot be known.
            lambda: {f"1.{key}": value for key, value in changed().items()},
            "normalize: the network is '1.' of a sequence, and what stands before it has no tensors: tell by what",
        ),
        (
            lambda: {(key if key == "bn1.weight" else f"module.{key}"): value for key, value in changed().items()},
            "these are no weights of resnet8: 1 keys missing, the first 'bn1.weight'",
        ),
        (
            lambda: changed(linear__weight=torch.ones(1, 64), linear__bias=torch.ones(1)),
            "num_classes: a classifier has at least 2 classes, got 1",
        ),
        (lambda: {}, "holds no weights, its state dict is empty"),
        (lambda: {"state_dict": {}, "epoch": 1}, "holds no weights, its state dict is empty"),
        (
            lambda: {"epoch": 1, "optimizer": {}},
            "holds no weights, its state dict is empty",
        ),
        (
            lambda: {"net": {3: torch.ones(1)}},
            "holds no weights: nothing in it is a mapping of names to tensors; the first is 'net', {3: Tensor}",
        ),
        (lambda: [torch.ones(1)], "holds no weights: nothing in it is a mapping of names to tensors; the first"),
        (lambda: torch.ones(1), "holds Tensor where a dict of tensors is expected"),
        (
            lambda: changed(mu=MEAN),
            "one mean and one std are expected for normalisation, got ['mu']",
        ),
        (
            lambda: changed(mu=MEAN, normalize__mean=MEAN, sigma=STD),
            "one mean and one std are expected for normalisation, got ['mu', 'normalize.mean', 'sigma']",
        ),
        (
            lambda: changed(mean=torch.ones(1), std=torch.ones(1)),
            "normalisation needs 3 channels, 'mean' has shape (1,)",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, payload: Any, message: str) -> None:
    path = save(tmp_path, payload())
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(path, model="resnet8")
    assert str(error.value).startswith(f"{path}: {message}")


def test_unrecognised_tensors_ask_for_the_model(tmp_path: Path) -> None:
    path = save(tmp_path, {"features.0.weight": torch.ones(4, 3, 3, 3), "head.weight": torch.ones(10, 4)})
    assert (read_weights(path).model, read_weights(path).num_classes) == (None, None)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(path)
    assert str(error.value) == (
        f"{path}: its 2 tensors (first 'features.0.weight') fit no known architecture; name one to be told what "
        f"differs; known: {', '.join(sorted((*models.TABLE, *models.FAMILIES)))}"
    )
    path = save(tmp_path, {"sub_block1.weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="its 0 tensors"):
        load_model(path)


def test_head_of_another_class_count_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, network("resnet8", 100).state_dict())
    assert load_model(path).num_classes == load_model(path, num_classes=100).num_classes == 100
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(path, num_classes=10)
    assert str(error.value) == f"{path}: the checkpoint's head has 100 classes, the data set has 10"


def test_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = save(tmp_path, network("resnet8").state_dict())
    with pytest.raises(
        ValueError, match=r"teacher.pt: model: 'resnet-8' is not known; did you mean 'resnet8'\? known"
    ):
        load_model(path, model="resnet-8")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^/.*/absent.pt: cannot be read: No such file or directory$"):
        load_model(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"^/.*: cannot be read: Is a directory$"):
        load_model(str(tmp_path))


NO_CHECKPOINT = "is no checkpoint, or a damaged one"


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"0")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"epoch,natural_accuracy\n1,0.5\n", "it is a text"),
        (
            b'{"metadata": {}, "weight_map": {"a": "m-00001-of-00002.safetensors"}}',
            "it is the index of a checkpoint ",
        ),
        (
            pickle.dumps({"a": 1}),
            "it is a plain pickle, whose code would run: write the network's state_dict() by ",
        ),
        (b"Rar!\x1a\x07\x01\x00" + bytes(100), "it is a RAR archive: unpack it"),
        (bytes(range(256)) * 2, NO_CHECKPOINT),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100), "it is a PNG image"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "it is an HDF5 file (Keras?)"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "it is a NumPy array"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:\xff" + bytes(100), "it is an ONNX model"),
        (bytes(257) + b"ustar\x0000" + bytes(1000), "it is a tar archive: unpack it"),
        (gzip.compress(b"weights"), "it is compressed by gzip: unpack it"),
        (b"<!DOCTYPE html><html>quota exceeded", "it is a web page: the download gave that instead of the file"),
        ("\n<!doctype HTML>\n<title>Trop de requ\xeates".encode(), "it is a web page: the download gave that "),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "it is a pointer of Git LFS, and not the file itself",
        ),
        (archive("readme.txt", "b"), "it is a ZIP archive of 2 other files, the first 'readme.txt'"),
        (archive(), "it is an empty ZIP archive"),
        (archive("images.npy", "labels.npy"), "it is an .npz file of NumPy arrays"),
        (archive("net/data.pkl", "net/constants.pkl", "net/code/a.py"), "it is a TorchScript archive, whose code"),
        (archive("net/archive_format", "net/models/model.json"), "it is an exported program of torch.export"),
        (b"\x10" + bytes(7) + b'{"a":{"dtype":"F32"', "is a damaged safetensors file: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time
)
def test_a_file_of_another_kind_is_told_by_its_kind(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        load_model(path)
    if words.startswith("it is"):
        words = f"is no checkpoint: {words}"
    assert str(error.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("kind", ["truncated", "flipped", "noise"])
def test_a_damaged_file(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, network("resnet8").state_dict())
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "flipped": b"\x80\x02}" + whole[3:],
            "noise": bytes(torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(0)).tolist()),
        }[kind]
    )
    with pytest.raises(ValueError, match=r"^[^\n]*teacher.pt: is no checkpoint, or a damaged one$"):
        load_model(path)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_no_content_of_a_file_raises_anything_but_value_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "teacher.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*teacher.pt: [^\n]*$"):
            read_weights(path)


class Trap:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    sprung = tmp_path / "sprung"
    payload = {"net": network("resnet8").state_dict(), "args": Trap(sprung)}
    path = tmp_path / "teacher.pt"
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(path)
    assert not sprung.exists()
    assert str(error.value).startswith(f"{path}: holds the Python object ")
    assert str(error.value).endswith("and loading it could run code; save the network's state_dict() alone")
    pickle.loads(pickle.dumps(Trap(sprung)))  # noqa: S301  # the trap works where nothing guards
    assert sprung.exists()


def test_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, network("resnet8"))
    with pytest.raises(ValueError, match=r"holds the Python object engine\.models\.networks\.resnet\.ResNet, and"):
        load_model(path)

"""Registration: each kind of a user's own, in use, and wrong use in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import config, methods, models, register
from engine.attacks import table
from engine.models.normalize import CONSTANTS
from engine.pipelines import datasets
from engine.pipelines.base import Batch
from engine.plugins import loggers, own_data
from engine.plugins.loggers import Loggers
from engine.plugins.origins import Origin, registering
from engine.system.precision import Precision
from engine.training.learner import Learner
from engine.training.step import StepOutput


def cross_entropy(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(logits["s_adv"], labels, reduction="none")


class Net(nn.Module):
    """Holds a tensor that is neither a parameter nor a buffer, and names like those of wrappers."""

    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.shift = torch.full((3, 1, 1), 0.5)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images - self.shift - self.mean)
        return logits


def images_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(count) % 3


# ---------------------------------------------------------------- methods


def test_a_method_by_terms_is_a_row_with_its_own_defaults() -> None:
    register.method(
        "mine",
        terms=lambda p: {"ce_nat": 1 - p.lam, "kl_at_nat": (0, p.lam * p.tau**2)},
        attack={"num_steps": 3, "loss": "kl"},
        defaults={"loss": {"lam": 0.25, "tau": 2.0}, "epochs": 7},
        base="at",
    )
    wanted = config.load({"method": "mine"})
    assert (wanted.attack.num_steps, wanted.attack.loss, wanted.epochs, wanted.loss.lam) == (3, "kl", 7, 0.25)
    assert config.load({"method": "mine", "epochs": 9}).epochs == 9, "what a user says wins"
    found = methods.get("mine", loss=wanted.loss)
    assert {name: (weight.a, weight.b) for name, weight in found.weights.items()} == {
        "ce_nat": (0.75, 0.0),
        "kl_at_nat": (0.0, 1.0),
    }
    assert found.warmup is not None
    assert found.warmup.name == "at"
    assert methods.get("mine+igdm", loss=wanted.loss).weights.keys() >= {"kl_difference"}


def step_of(method: str, logged: list[StepOutput], **keys: Any) -> nn.Module:
    """The student after a step of that method on the same images."""
    torch.manual_seed(0)
    student, teacher = (models.build("resnet8", 3) for _ in range(2))
    wanted = config.load({"method": method, "model": "resnet8", "dataset": "folder", "device": "cpu", **keys})
    of_run = methods.get(method, loss=wanted.loss)
    learner = Learner(
        student, {"teacher": teacher.eval()}, of_run, wanted, Precision(torch.device("cpu"), torch.float32)
    )
    images, labels = images_of(12)
    batch = Batch(images / 255, labels, torch.arange(12))
    learner.learn(batch, of_run, 0.1, on_output=lambda output, labels: logged.append(output))
    return student


@pytest.mark.parametrize("keys", [{}, {"micro_batch": 4}, {"attack": {"num_steps": 2, "bn": "train"}}], ids=str)
def test_a_loss_that_is_a_function_trains_as_the_same_terms_do(keys: dict[str, Any]) -> None:
    register.method("by-function", loss=cross_entropy, reads=[("student", "x_adv")], attack={"bn": "eval"})
    own: list[StepOutput] = []
    built_in: list[StepOutput] = []
    ours, theirs = step_of("by-function", own, **keys), step_of("at", built_in, **keys)
    for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert [float(each.loss.loss) for each in own] == pytest.approx([float(each.loss.loss) for each in built_in])
    assert [each.terms for each in own] == [("loss_function",)] * len(built_in)


def test_a_loss_gets_the_logits_that_it_reads_in_float32() -> None:
    seen: dict[str, Tensor] = {}

    def loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
        seen.update(logits)
        return cross_entropy(logits, labels)

    register.method("looks", loss=loss, reads=["s_adv", ("teacher", "x"), ("teacher", "x_adv")])
    step_of("looks", [])
    assert {name: value.dtype for name, value in seen.items()} == dict.fromkeys(
        ("s_adv", "t_at_nat", "t_at_adv"), torch.float32
    )


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda logits, labels: cross_entropy(logits, labels).mean(), r"must be a floating \(12,\), got \(\)"),
        (lambda logits, labels: labels, "must be a floating"),
        (lambda logits, labels: 1.0, "got float"),
        (lambda logits, labels: cross_entropy(logits, labels).detach(), "no gradient"),
        (
            lambda logits, labels: logits["t_at_nat"],
            r"method 'bad': KeyError: 't_at_nat' \(test_register.py, line \d+\)",
        ),
    ],
)
def test_a_loss_that_is_none_is_told_in_one_line(loss: Any, told: str) -> None:
    register.method("bad", loss=loss, reads=["s_adv"])
    with pytest.raises(ValueError, match=told) as error:
        step_of("bad", [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "give terms or a loss"),
        ({"terms": {"ce_nat": 1}, "loss": cross_entropy}, "give terms or a loss"),
        ({"terms": {"ce_nta": 1}}, "'ce_nta' is no term; did you mean 'ce_nat'"),
        ({"terms": {"ce_nat": "much"}}, "ce_nat"),
        ({"terms": 3}, "a function is expected, got int"),
        ({"terms": lambda p: 3}, "gives int, and no dict"),
        ({"terms": lambda p: {"ce_nat": p.lamb}}, "AttributeError"),
        ({"terms": {"ce_nat": 1}, "base": "adt"}, "'adt' is not known"),
        ({"terms": {"ce_nat": 1}, "attack": {"steps": 3}}, "unknown key 'attack.steps'"),
        ({"terms": {"ce_nat": 1}, "defaults": {"method": "at"}}, "method is no default"),
        ({"terms": {"ce_nat": 1}, "defaults": {"lr": -1}}, "lr: "),
        ({"loss": cross_entropy}, "reads logits of the student"),
        ({"loss": cross_entropy, "reads": ["t_at_nat"]}, "reads logits of the student"),
        ({"loss": cross_entropy, "reads": ["s_avd"]}, "'s_avd' is not known; known: s_nat = .student, x."),
        ({"loss": cross_entropy, "reads": [("student", "y")]}, "is not known"),
        ({"loss": lambda logits: logits, "reads": ["s_adv"]}, "a function of 2 arguments"),
        ({"loss": 3, "reads": ["s_adv"]}, "a function is expected"),
        ({"loss": cross_entropy, "reads": ["s_adv"], "base": "at"}, "are of terms"),
    ],
)
def test_what_is_no_method_is_refused_and_nothing_is_registered(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        register.method("mine", **keys)
    assert "\n" not in str(error.value)
    assert "mine" not in methods.METHODS


@pytest.mark.parametrize("name", ["", "a b", "../up", "a+b", ".hidden", "-x", "a:b", "n" * 65, 3, "grüß"])
def test_what_is_no_name_is_refused(name: Any) -> None:
    makers: tuple[Callable[[], None], ...] = (
        lambda: register.method(name, terms={"ce_nat": 1}),
        lambda: register.model(name, Net),
        lambda: register.dataset(name, lambda: None),
        lambda: register.attack(name, lambda model, x, y: x),
        lambda: register.logger(name, print),
    )
    for make in makers:
        with pytest.raises(ValueError, match="a name of at most 64 letters"):
            make()


def test_a_name_that_is_taken_is_refused_and_the_same_definition_is_not() -> None:
    makers: tuple[Callable[[], None], ...] = (
        lambda: register.method("at", terms={"ce_nat": 1}),
        lambda: register.model("resnet8", Net),
        lambda: register.dataset("digits", lambda: None),
        lambda: register.attack("fgsm", lambda model, x, y: x),
    )
    for make in makers:
        with pytest.raises(ValueError, match="is built in"):
            make()
    for _ in range(2):
        register.method("mine", terms={"ce_nat": 1})
        register.model("mine", Net)
    with registering(Origin("other.py", "1")):
        with pytest.raises(ValueError, match=f"'mine' is registered by {__name__} already"):
            register.method("mine", terms={"ce_nat": 2})
        register.method("theirs", terms={"ce_nat": 1})
        with pytest.raises(ValueError, match="other.py registers 'theirs' twice"):
            register.method("theirs", terms={"ce_nat": 2})


# ---------------------------------------------------------------- models


def test_a_model_is_read_back_from_its_checkpoint_with_all_that_it_holds(tmp_path: Path) -> None:
    from engine.common.tensor_files import write_tensors
    from engine.models.weights import architecture_of, load_model
    from engine.runs import checkpoints

    register.model("net", Net, input_sizes=[8])
    torch.manual_seed(3)
    network = models.build("net", 3).eval()
    state = torch.get_rng_state()
    part = checkpoints.student_part(network, config.load({"model": "net", "dataset": "folder"}), ("a", "b", "c"))
    write_tensors(tmp_path / "net.pt", checkpoints.content(part, checkpoints.Progress()))
    loaded = load_model(tmp_path / "net.pt")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.module(images), network(images))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert architecture_of(network.state_dict()) == "net"
    with pytest.raises(ValueError, match="the head of net is not known"):
        loaded.for_classes(("b", "a", "c"))
    with pytest.raises(ValueError, match="net does not normalise"):
        models.build("net", 3, normalize=True)


@pytest.mark.parametrize(
    ("builder", "told"),
    [
        (lambda num_classes: 3, "gives int, and no torch.nn.Module"),
        (lambda num_classes: nn.Identity(), "Identity has no parameters"),
        (
            lambda num_classes: nn.Linear(3, **{"bais": num_classes}),
            r"'bad': TypeError: .*\(test_register.py, line",
        ),
    ],
)
def test_a_builder_that_fails_is_told_in_one_line(builder: Any, told: str) -> None:
    register.model("bad", builder)
    with pytest.raises(ValueError, match=told):
        models.build("bad", 3)
    with pytest.raises(ValueError, match="a function of 1 argument is expected"):
        register.model("worse", lambda: Net(3))  # type: ignore[arg-type,misc]
    with pytest.raises(ValueError, match="input_sizes: whole numbers"):
        register.model("worse", Net, input_sizes=[0])


def test_logits_of_another_shape_are_refused() -> None:
    images = torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    network = Net(3)
    models.check_logits("net", network, images, 3)
    assert network.training
    with pytest.raises(ValueError, match=r"must give logits \(2, 4\), and gives \(2, 3\)"):
        models.check_logits("net", network, images, 4)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"fails on images \(2, 3, 8, 8\)"):
        models.check_logits("flat", flat, images, 3)


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize("form", ["uint8 first", "uint8 last", "float", "Dataset"])
def test_a_data_set_in_any_form_holds_the_same_images(form: str) -> None:
    def parts() -> tuple[Any, Any]:
        found = []
        for count, seed in ((12, 0), (6, 1)):
            images, labels = images_of(count, seed)
            shaped = {
                "uint8 first": images,
                "uint8 last": images.permute(0, 2, 3, 1),
                "float": images / 255,
                "Dataset": images / 255,
            }[form]
            found.append(TensorDataset(shaped, labels) if form == "Dataset" else (shaped, labels))
        return found[0], found[1]

    register.dataset("mine", parts, class_names=("a", "b", "c"), flip=False, normalize=((0.5,) * 3, (0.2,) * 3))
    found = datasets.load("mine", limit_train=6)
    assert (len(found.train), len(found.test), found.class_names, found.flip) == (6, 6, ("a", "b", "c"), False)
    assert found.train.images.dtype == torch.uint8
    assert found.train.labels.bincount().tolist() == [2, 2, 2]
    whole = datasets.load("mine")
    expected = datasets.Dataset(
        "mine", *own_data.splits("x", images_of(12), images_of(6, 1), "abc"), tuple("abc"), False, ""
    )
    assert torch.equal(whole.train.images, images_of(12)[0].permute(0, 2, 3, 1))
    assert whole.sha256 == expected.sha256, "the identity of data is that of their content"
    assert CONSTANTS["mine"] == ((0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ValueError, match="is read from no path"):
        datasets.load("mine", "somewhere")


class Random(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = self.tensors[0][index], self.tensors[1][index]
        return (image + torch.randint(0, 50, image.shape, dtype=torch.uint8)), label


IMAGES, LABELS = images_of(9)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ((IMAGES / 255 * 2 - 1, LABELS), "grey levels k / 255"),
        ((IMAGES / 300, LABELS), "grey levels k / 255"),
        ((IMAGES.float() * math.nan, LABELS), "grey levels k / 255"),
        ((IMAGES.long(), LABELS), "uint8, or floats"),
        ((IMAGES[:, :2], LABELS), "one or three channels"),
        ((IMAGES[:, 0], LABELS), "one or three channels"),
        ((IMAGES, LABELS[:5]), "9 whole numbers are expected as labels"),
        ((IMAGES, LABELS.float()), "9 whole numbers are expected as labels"),
        ((IMAGES, LABELS - 1), "labels from 0 on"),
        ((IMAGES, LABELS + 1), "there is a label 3, and there are 3 class names"),
        ((IMAGES[:0], LABELS[:0]), "labels from 0 on are expected, got none"),
        ((IMAGES[:, :, :4], LABELS), "of two sizes"),
        (Random(IMAGES, LABELS), "another one each time"),
        (3, "expected a Dataset"),
    ],
)
def test_what_is_no_data_set_is_told_in_one_line(train: Any, told: str) -> None:
    register.dataset("mine", lambda: (train, images_of(6)), class_names="abc")
    with pytest.raises(ValueError, match=told) as error:
        datasets.load("mine")
    assert "\n" not in str(error.value)
    assert "dataset 'mine'" in str(error.value)


def test_a_loader_may_get_the_place_of_the_data(tmp_path: Path) -> None:
    def load(place: str | None) -> tuple[Any, Any]:
        if place is None:
            raise FileNotFoundError("no place given")
        return images_of(int(Path(place).name)), images_of(6)

    register.dataset("mine", load)
    assert len(datasets.load("mine", str(tmp_path / "9")).train) == 9
    with pytest.raises(ValueError, match=r"dataset 'mine': FileNotFoundError: no place given \(test_register.py"):
        datasets.load("mine")


# ---------------------------------------------------------------- attacks and loggers


def test_an_attack_is_found_by_its_name() -> None:
    register.attack("same", lambda model, x, y: x, title="Same", summary="nothing")
    assert table.find("same").title == "Same"
    with pytest.raises(ValueError, match="expected a function"):
        register.attack("none", 3)  # type: ignore[arg-type]


class Kept:
    def __init__(self) -> None:
        self.rows: list[tuple[Any, Path]] = []
        self.closed = 0

    def __call__(self, row: dict[str, Any], run: Path) -> None:
        self.rows.append((row["step"], run))
        row.clear()  # its own copy

    def close(self) -> None:
        self.closed += 1


def test_loggers_get_every_row_and_one_that_fails_no_more(tmp_path: Path) -> None:
    kept, said = Kept(), list[str]()
    calls: list[int] = []

    def fails(row: dict[str, Any]) -> None:
        calls.append(row["step"])
        raise OSError("no\nroom")

    register.logger("kept", kept)
    register.logger("fails", fails)
    seen: list[Any] = []
    opened = Loggers(("fails", "kept"), tmp_path, said.append, [lambda row: seen.append(row.pop("step"))])
    row = {"step": 1, "cases": {"a": 1}}
    opened.write(row)
    opened.write(row | {"step": 2})
    opened.close()
    assert kept.rows == [(1, tmp_path), (2, tmp_path)]
    assert (kept.closed, calls, seen, row["step"]) == (1, [1], [1, 2], 1)
    assert len(said) == 1
    assert said[0].startswith(
        "Warning: the logger fails failed and gets no more rows: OSError: no room (test_register"
    )
    with pytest.raises(ValueError, match="loggers: 'keep' is not known; .*--import"):
        loggers.check(["kept", "keep"])
    with pytest.raises(ValueError, match="a function of 1 argument"):
        register.logger("bad", lambda: None)


def test_what_a_callback_raises_is_passed_on(tmp_path: Path) -> None:
    def stop(row: object) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        Loggers((), tmp_path, print, [stop]).write({"step": 1})

"""Classes are compared by name: the same ones in another order are mapped, others are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine import config, models
from engine.common.tensor_files import write_tensors
from engine.models import class_names
from engine.models.weights import load_model
from engine.runs import checkpoints

NAMES = ("bird", "cat", "dog", "eel")


@pytest.mark.parametrize("seed", range(20))
def test_any_order_is_mapped_to_the_names(seed: int) -> None:
    draw = random.Random(seed)
    ours = [f"class {index}" for index in range(draw.randint(2, 200))]
    theirs = draw.sample(ours, len(ours))
    order = class_names.order(theirs, ours)
    assert ours == (theirs if order is None else [theirs[place] for place in order])


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (NAMES, (*NAMES[:3], "fox"), "not the 4 of the data: it has 'eel', and the data have 'fox'"),
        (NAMES, NAMES[:3], "its 4 classes are not the 3 of the data: it has 'eel'"),
        (NAMES[:3], NAMES, "its 3 classes are not the 4 of the data: the data have 'eel'"),
        (
            [f"{index:02}" for index in range(12)],
            [*map(str, range(12))],
            "it has '00', and the data have '0'; as numbers they are the same: rename the folders",
        ),
        (NAMES, [name.title() for name in NAMES], "but for capital letters they are the same"),
        (("a" * 10**5, "b"), ("c", "b"), "it has 'aaa"),
    ],
)  # fmt: skip
def test_other_classes_are_refused_with_a_name_of_each_side(theirs: Any, ours: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        class_names.order(theirs, ours)
    assert words in str(error.value)


def test_ten_thousand_classes_are_compared_at_once() -> None:
    names = [str(index) for index in range(10_000)]
    assert class_names.order(names, sorted(names)) == [int(name) for name in sorted(names)]


@pytest.mark.parametrize(
    ("payload", "names"),
    [
        ({"classes": ["b", "a"]}, ("b", "a")),
        ({"class_names": ("b", "a")}, ("b", "a")),
        ({"class_to_idx": {"a": 1, "b": 0}}, ("b", "a")),
        ({"class_to_idx": {"a": 1, "b": 1}}, None),
        ({"class_to_idx": {"a": True, "b": False}}, None),
        ({"classes": 10, "class_names": [1, 2]}, None),
        ({"classes": torch.ones(2)}, None),
        ({}, None),
    ],
)
def test_names_that_files_of_others_tell(payload: Any, names: Any) -> None:
    assert class_names.found_in(payload) == names


# Networks


def own(path: Path, names: tuple[str, ...], **changes: Any) -> torch.nn.Module:
    """A checkpoint of a network that knows those classes, and the network."""
    torch.manual_seed(0)
    network = models.build("resnet8", len(names))
    part = checkpoints.student_part(network, config.load({"model": "resnet8", "dataset": "folder"}), names)
    write_tensors(path, checkpoints.content(part, checkpoints.Progress()) | changes)
    return network.eval()


def test_the_outputs_are_those_of_the_named_classes(tmp_path: Path) -> None:
    network = own(tmp_path / "a.pt", NAMES)
    images = torch.rand(2, 3, 8, 8)
    ours = ("eel", "cat", "bird", "dog")
    loaded = load_model(tmp_path / "a.pt", class_names=ours)
    expected = network(images)[:, [NAMES.index(name) for name in ours]]
    torch.testing.assert_close(loaded.module(images), expected, rtol=0, atol=0)
    assert loaded.class_names == ours
    assert any("another order" in note for note in loaded.notes)
    same = load_model(tmp_path / "a.pt", class_names=NAMES)
    torch.testing.assert_close(same.module(images), network(images), rtol=0, atol=0)
    assert same.notes == ()


def test_the_names_of_another_data_set_do_not_matter_where_classes_are_the_same(tmp_path: Path) -> None:
    own(tmp_path / "a.pt", NAMES, dataset="cifar10")
    assert load_model(tmp_path / "a.pt", class_names=NAMES).notes == ()


def test_a_file_that_names_no_classes_is_taken_in_the_order_of_the_data_and_that_is_said(tmp_path: Path) -> None:
    torch.save(models.build("resnet8", 12).state_dict(), tmp_path / "a.pt")
    names = sorted(map(str, range(12)))
    (note,) = load_model(tmp_path / "a.pt", class_names=names).notes
    assert note == "the file names no classes: its outputs are taken as 0, 1, 10, 11, ..., 9"
    index = {name: place for place, name in enumerate(NAMES)}
    torch.save({"net": models.build("resnet8", 4).state_dict(), "class_to_idx": index}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: its 4 classes are not the 4 of the data: it has 'bird', and"):
        load_model(tmp_path / "b.pt", class_names=tuple("abcd"))


# Commands


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 classes, 0 to 11, of one grey level each: as text they are sorted 0, 1, 10, 11, 2, ..."""
    root = tmp_path_factory.mktemp("numbered")
    for split, count in (("train", 2), ("test", 1)):
        for label in range(12):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (20 * label,) * 3).save(folder / f"{number}.png")
    return root


def accuracy(cli: Any, path: Path, data: Path) -> str:
    outcome = cli(
        "eval", str(path), "--dataset", "folder", "--data", str(data), "--attacks", "natural", "--device", "cpu"
    )
    assert outcome.code == 0, outcome.err
    return str(next(word for word in outcome.out.split() if word.endswith("%")))


def test_a_network_of_numbered_classes_keeps_its_accuracy_in_another_order(
    numbered: Path, tmp_path: Path, cli: Any
) -> None:
    """Two orders of the same names give one accuracy; 00 to 11 is refused, as teacher too."""
    text = tuple(sorted(map(str, range(12))))
    network = own(tmp_path / "text.pt", text)
    number = tuple(map(str, range(12)))
    with torch.no_grad():
        rows = [text.index(name) for name in number]
        for name in ("linear.weight", "linear.bias"):
            network.get_parameter(name).copy_(network.get_parameter(name)[rows])
    part = checkpoints.student_part(network, config.load({"model": "resnet8", "dataset": "folder"}), number)
    write_tensors(tmp_path / "number.pt", checkpoints.content(part, checkpoints.Progress()))
    assert accuracy(cli, tmp_path / "text.pt", numbered) == accuracy(cli, tmp_path / "number.pt", numbered)

    own(tmp_path / "padded.pt", tuple(f"{index:02}" for index in range(12)))
    data = ("--dataset", "folder", "--data", str(numbered))
    trained = ("train", "--method", "ard", "--model", "resnet8", *data, "--teacher", str(tmp_path / "padded.pt"))
    for command in (("eval", str(tmp_path / "padded.pt"), *data), (*trained, "--out", str(tmp_path / "run"))):
        outcome = cli(*command, "--device", "cpu")
        assert outcome.code == 2
        assert "it has '00', and the data have '0'; as numbers they are the same" in outcome.err
        assert len(outcome.err.splitlines()) == 1

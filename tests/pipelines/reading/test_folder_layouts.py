"""Folders as people have them: flat, one split alone, nested, with other files, packed by other programs."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from engine.pipelines import datasets
from engine.pipelines.datasets import AnyDataset
from engine.pipelines.reading import decoding
from engine.pipelines.reading.folder import Wanted, image_folder
from engine.pipelines.reading.held_out import HeldOut
from engine.pipelines.splits import Request
from tests.pipelines.photographs import encode, write, write_zip

Content = dict[str, bytes]
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture(number: int) -> bytes:
    return encode(np.full((4, 4, 3), number % 256, np.uint8), "PNG")


def classes(prefix: str, count: int, below: str = "", names: str = "ab") -> Content:
    """`<prefix><class>/<below>NN.png`, each of its own grey level."""
    return {
        f"{prefix}{name}/{below}{number:02}.png": picture(100 * place + number)
        for place, name in enumerate(names)
        for number in range(count)
    }


def placed(tmp_path: Path, files: Content, packed: bool) -> Path:
    return write_zip(tmp_path / "mine.zip", files) if packed else write(tmp_path / "mine", files)


def find(path: Path, **wanted: object) -> AnyDataset:
    return datasets.find("folder", str(path), Request(**wanted))  # type: ignore[arg-type]


def greys(split: datasets.AnySplit) -> set[int]:
    return {int(image[0, 0, 0]) for image in split.images[torch.arange(len(split))]}


def refused(path: Path, *words: str, only_test: bool = False) -> None:
    with pytest.raises(ValueError, match=r"\Adata: [^\n]+\Z") as error:
        find(path, only_test=only_test)
    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------- without test images


def lowest_fifth(class_name: str, names: list[str]) -> set[str]:
    """The rule, written a second time."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"0/{class_name}/{name}".encode()).hexdigest())
    return set(order[: max(1, round(len(names) / 5))])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "train/", "photographs/", "Train/"])
def test_without_test_images_a_fifth_of_each_class_is_held_out(prefix: str, packed: bool, tmp_path: Path) -> None:
    found = find(placed(tmp_path, classes(prefix, 13), packed))
    expected = {
        100 * place + int(name[:2])
        for place, class_name in enumerate("ab")
        for name in lowest_fifth(class_name, [f"{number:02}.png" for number in range(13)])
    }
    assert greys(found.test) == expected
    assert greys(found.train) | greys(found.test) == {*range(13), *range(100, 113)}
    assert found.test.labels.bincount().tolist() == [3, 3]
    assert found.train.labels.bincount().tolist() == [10, 10]
    assert found.held_out is not None
    assert len(found.notes) == 1
    assert "has no test images of its own: 6 of its 26 images, a fifth of each class" in found.notes[0]


def test_the_side_of_a_file_depends_on_its_class_alone(tmp_path: Path) -> None:
    """Not on other classes, the form of the folder, or how a system spells its accents."""
    few = find(write(tmp_path / "few", classes("", 13, names="ab"))).held_out
    more = find(write_zip(tmp_path / "more.zip", classes("train/", 13, "images/", names="0abz"))).held_out
    assert few is not None
    assert more is not None
    assert set(few.names) == {name for name in more.names if name[0] in "ab"}
    spelled = [
        {f"{name}/{e}{number}.png": picture(number) for name in "ab" for number in range(9)}
        for e in ("\u00e9", "e\u0301")
    ]
    composed, apart = (find(write_zip(tmp_path / f"{form}.zip", spelled[form])).held_out for form in range(2))
    assert composed == apart


def test_an_evaluation_finds_the_same_test_images(tmp_path: Path) -> None:
    path = write(tmp_path, classes("", 13))
    trained, evaluated = find(path), find(path, only_test=True)
    assert torch.equal(evaluated.test.images[torch.arange(6)], trained.test.images[torch.arange(6)])
    assert (len(evaluated.train), evaluated.held_out) == (0, trained.held_out)


def test_test_images_that_are_there_are_not_chosen(tmp_path: Path) -> None:
    found = find(write(tmp_path, classes("train/", 5) | classes("val/", 3)))
    assert (found.held_out, found.notes, len(found.train), len(found.test)) == (None, (), 10, 6)


def test_a_class_with_one_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, classes("", 5) | {"c/1.png": picture(1)})
    refused(path, "has no test images, and its class 'c' has a single image")


def test_test_images_alone_train_nothing(tmp_path: Path) -> None:
    refused(write(tmp_path, classes("val/", 3)), "holds no train/ or train.zip")


def test_a_run_writes_the_names_and_an_evaluation_sees_a_change(tmp_path: Path) -> None:
    held_out = find(write(tmp_path / "data", classes("", 5))).held_out
    assert held_out is not None
    held_out.write(tmp_path / "test_split.json")
    told = json.loads((tmp_path / "test_split.json").read_text())
    assert told["test"] == list(held_out.names) == sorted(held_out.names)
    assert (told["fraction"], told["seed"], told["of_images"]) == (0.2, 0, 10)
    assert "SHA-256" in told["rule"]
    assert held_out.difference(tmp_path / "test_split.json") == ""
    other = HeldOut(("a/new.png", *held_out.names), 11)
    assert "1 of 3 test images were no test images of the training, the first: a/new.png" in other.difference(
        tmp_path / "test_split.json"
    )
    assert other.difference(tmp_path / "gone.json") == ""


# ---------------------------------------------------------------- one split alone, for an evaluation


@pytest.mark.parametrize(
    "layout", ["val/", "test/", "Validation/", "val.zip with val/", "val.zip", "val.zip itself"]
)
def test_test_images_alone_serve_an_evaluation(layout: str, tmp_path: Path) -> None:
    if layout.endswith("/") and "zip" not in layout:
        path = write(tmp_path, classes(layout, 3))
    else:
        prefix = "val/" if "with" in layout or "itself" in layout else ""
        path = write_zip(tmp_path / "val.zip", classes(prefix, 3))
        path = path if "itself" in layout else tmp_path
    found = find(path, only_test=True)
    assert (len(found.train), len(found.test), found.class_names, found.notes) == (0, 6, ("a", "b"), ())


@pytest.mark.parametrize("packed", [False, True])
def test_a_flat_folder_may_be_of_test_images_only(packed: bool, tmp_path: Path) -> None:
    path = placed(tmp_path, classes("", 3), packed)
    found = find(path, only_test=True, whole_if_flat=True)
    assert (len(found.test), found.held_out) == (6, None)
    assert found.notes == (f"the classes lie in {path} itself: all of its 6 images are test images",)
    only_train = find(write(tmp_path / "other", classes("train/", 5)), only_test=True, whole_if_flat=True)
    assert len(only_train.test) == 2  # train/ is never taken for test images


# ---------------------------------------------------------------- nested


@pytest.mark.parametrize("packed", [False, True])
def test_images_may_lie_one_folder_below_their_class(packed: bool, tmp_path: Path) -> None:
    files = classes("train/", 4, "images/") | {"train/a/a_boxes.txt": b"boxes"} | classes("val/", 2)
    found = find(placed(tmp_path, files, packed))
    assert (greys(found.train), greys(found.test)) == ({*range(4), *range(100, 104)}, {0, 1, 100, 101})
    (note,) = found.notes
    assert note.startswith("files that are no images are left out: 1, the first ")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"train/a/own.png": picture(0)},  # beside the folder
        {"train/a/old/1.png": picture(0)},  # two folders
        {"train/c/1.png": picture(0), "test/c/1.png": picture(0)},  # a class without the folder
        {"train/a/images/deeper/1.png": picture(0)},
    ],
)
def test_other_folders_in_a_class_are_refused(more: Content, packed: bool, tmp_path: Path) -> None:
    files = classes("train/", 2, "images/") | classes("test/", 2) | more
    refused(placed(tmp_path, files, packed), "a class folder must hold images only, and no folder")


# ---------------------------------------------------------------- other files


STRAYS = {
    "train/a/desktop.ini": b"[.ShellClassInfo]",
    "train/a/labels.csv": b"a,b",
    "train/b/notes.json": b"{}",
    "train/b/empty": b"",
    "test/b/readme.txt": b"words",
}
NAMELESS = {"train/a/without_an_extension": picture(50), "train/b/x.dat": picture(51)}


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_no_images_are_left_out_and_counted(packed: bool, tmp_path: Path) -> None:
    path = placed(tmp_path, classes("train/", 3) | classes("test/", 1) | STRAYS | NAMELESS, packed)
    found = find(path)
    assert greys(found.train) == {0, 1, 2, 100, 101, 102, 50, 51}
    assert len(found.test) == 2
    where = f"{path}{':' if packed else '/'}"
    assert found.notes == (
        f"files that are no images are left out: 4, the first {where}train/a/desktop.ini",
        f"files that are no images are left out: 1, the first {where}test/b/readme.txt",
    )
    assert found.train.skipped == ()


def test_a_damaged_file_with_an_image_s_name_is_no_stray(tmp_path: Path) -> None:
    path = write(
        tmp_path, classes("train/", 3) | classes("test/", 1) | {"train/a/x.jpg": b"", "train/a/y.heic": b"?"}
    )
    refused(path, "train/a/x.jpg is not a readable image")
    found = find(path, on_bad_image="skip")
    assert [Path(name).name for name in found.train.skipped] == ["x.jpg", "y.heic"]


def test_a_class_of_strays_alone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, classes("", 3) | {"annotations/a.xml": b"<a/>"})
    refused(path, "annotations holds no image")


def test_fifos_and_sockets_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, classes("train/", 3) | classes("test/", 1))
    os.mkfifo(path / "train" / "a" / "pipe")
    monkeypatch.chdir(path / "train" / "b")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("talk.sock")
        found = find(path)
    assert len(found.train) == 6
    assert "files that are no images are left out: 2," in found.notes[0]


def test_images_named_as_such_are_not_opened_to_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, classes("train/", 3) | classes("test/", 1))
    monkeypatch.setattr("engine.pipelines.reading.folder.is_image", lambda *_: pytest.fail("it was opened"))
    assert len(image_folder(path).train) == 6


def test_many_classes_are_listed_folder_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in place of seconds: one listing for each folder."""
    for part in ("train", "test"):
        for number in range(300):
            (tmp_path / part / f"{number:03}").mkdir(parents=True)
            (tmp_path / part / f"{number:03}" / "1.png").touch()
    scan = Mock(wraps=os.scandir)
    monkeypatch.setattr(os, "scandir", scan)
    assert len(image_folder(tmp_path).train.class_names) == 300
    assert scan.call_count < 1 + 2 * (300 + 3)


# ---------------------------------------------------------------- names and archives


def test_names_with_backslashes_are_read_as_folders(tmp_path: Path) -> None:
    files = classes("train/", 3) | classes("test/", 2)
    path = write_zip(tmp_path / "x.zip", {f"mine/{name}".replace("/", "\\"): data for name, data in files.items()})
    found = find(path)
    assert (greys(found.train), greys(found.test)) == ({0, 1, 2, 100, 101, 102}, {0, 1, 100, 101})


def test_archives_of_other_kinds_get_a_hint(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner" / "train.zip", classes("", 3))
    outer = write_zip(tmp_path / "outer.zip", {"train.zip": inner.read_bytes()})
    refused(outer, "outer.zip holds no", "unpack train.zip")
    write(tmp_path / "src", classes("", 2))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "src", "src")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "src", "src")
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(40))
    (tmp_path / "x.rar").write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(40))
    for name, kind in (("x.tar", "tar"), ("x.tar.gz", "gzip"), ("x.7z", "7z"), ("x.rar", "rar")):
        refused(tmp_path / name, f"{tmp_path / name} is a {kind} archive; unpack it and give its folder")
    write(tmp_path / "folder", {"train.tar.gz": b"\x1f\x8b"})
    refused(tmp_path / "folder", "holds no train/ or train.zip; unpack train.tar.gz first")


def test_classes_that_differ_in_case_are_named(tmp_path: Path) -> None:
    refused(
        write_zip(tmp_path / "x.zip", classes("train/", 2, names="Ab") | classes("test/", 2, names="ab")),
        "only in",
        "train: A",
        "test: a",
        "they differ in upper and lower case alone",
    )
    both = write_zip(tmp_path / "y.zip", classes("train/", 2, names="aAb") | classes("test/", 2, names="aAb"))
    assert find(both).notes == ("classes whose names differ in upper and lower case alone: A, a",)
    twice = classes("train/", 3) | classes("Train/", 3)
    refused(write_zip(tmp_path / "z.zip", twice), "holds both Train/ and train/")


def test_a_split_of_no_classes_is_no_class(tmp_path: Path) -> None:
    """Else a network would learn to tell the training images from the test images."""
    files = {f"{part}/{number}.png": picture(number) for part in ("train", "test") for number in range(4)}
    refused(write(tmp_path, files), "train holds no class folder")


def damaged(path: Path, name: str) -> Path:
    """The archive, a byte of whose entry is another."""
    content = bytearray(path.read_bytes())
    content[content.index(name.encode()) + len(name) + 50] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_entry_is_named_by_whoever_reads_it(tmp_path: Path) -> None:
    """Also by a hash of the data, which decodes nothing; and one that is no image is left out."""
    stray = {"train/a/notes.txt": bytes(200)}
    path = write_zip(tmp_path / "x.zip", classes("train/", 3) | classes("test/", 1) | stray)
    found = find(damaged(damaged(path, "train/b/01.png"), "notes.txt"), image_size=4)
    assert [note.rpartition("/")[2] for note in found.notes] == ["notes.txt"]
    with pytest.raises(OSError, match="Bad CRC-32") as error:
        _ = found.sha256
    assert error.value.filename == f"{path}:train/b/01.png"
    with pytest.raises(ValueError, match=r"01\.png is not a readable image \(Bad CRC-32"):
        _ = found.train.images[torch.tensor([4])]


def test_names_that_are_no_text_are_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, classes("train/", 3) | classes("test/", 1))
    own = find(path, resident="never").sha256
    folder = path / "train" / "a"
    (folder / "00.png").rename(folder / "\udcff.png")
    other = find(path, resident="never").sha256
    assert other != own
    folder.rename(folder.with_name("\udcff"))
    refused(path, "the name of a class must be UTF-8")


# ---------------------------------------------------------------- as much as is needed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_a_limit_reads_those_images_alone(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(np.zeros((32, 32, 3), np.uint8), "PNG")
    files = {f"{part}/{each}/{i}.png": content for part in ("train", "test") for each in CIFAR10 for i in range(5)}
    path = placed(tmp_path, files, packed)
    if packed:
        (tmp_path / "both").mkdir()
        for part in ("train", "test"):
            own = {file: data for file, data in files.items() if file.startswith(part)}
            write_zip(tmp_path / "both" / f"{part}.zip", own)
        path = tmp_path / "both"
    decode = Mock(wraps=decoding.pixels)
    monkeypatch.setattr("engine.pipelines.reading.encoded.pixels", decode)
    found = datasets.find(name, str(path), Request(limit_test=20, only_test=True))
    assert len(found.test) == 20
    assert decode.call_count == 20


def test_a_search_for_cifar_holds_nothing_out(tmp_path: Path) -> None:
    """Its accuracies are of its own test images."""
    content = encode(np.zeros((32, 32, 3), np.uint8), "PNG")
    path = write(tmp_path, {f"{each}/{i}.png": content for each in CIFAR10 for i in range(5)})
    with pytest.raises(ValueError, match="no image folder of its classes"):
        datasets.find("cifar10", str(path), Request())
    with pytest.raises(ValueError, match="holds no train/"):
        image_folder(path, Wanted(may_split=False))

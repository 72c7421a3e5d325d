"""The places in which data sets are looked for, and the images that are read there.

The true CIFAR and SVHN files are not at hand: their readers run on small files in the same formats, whose md5 sums
stand in for torchvision's. Downloads come from a server on this machine.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from engine.pipelines import datasets
from engine.pipelines.reading import published
from engine.pipelines.splits import Request

Pixels = npt.NDArray[np.uint8]
REAL = os.environ.get("ENGINE_DATA")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty places to look in, and no network."""
    found = {
        "environment": tmp_path / "environment",
        "data": tmp_path / "data",
        "cache": tmp_path / "cache" / "data",
    }
    monkeypatch.setenv("ENGINE_DATA", str(found["environment"]))
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nin tests")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    return found


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def error_of(name: str, data: Path | None = None) -> str:
    with pytest.raises(ValueError, match=r"^(data|dataset): ") as caught:
        datasets.load(name, None if data is None else str(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_images(seed: int, count: int, size: int = 32) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# --- what can be loaded


def test_the_registry_tells_what_load_gives() -> None:
    assert set(datasets.DATASETS) == {"digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"}
    assert {name for name, entry in datasets.DATASETS.items() if not entry.flip} == {"digits", "svhn"}
    entry, digits = datasets.DATASETS["digits"], datasets.load("digits")
    assert entry.num_classes == len(digits.class_names)
    assert entry.image_size == digits.train.images.shape[1] == digits.train.images.shape[2]
    assert digits.flip is entry.flip
    assert all("\n" not in entry.summary + entry.origin for entry in datasets.DATASETS.values())


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert "dataset: 'cifar-10' is not known; did you mean 'cifar10'? known: cifar10," in error_of("cifar-10")
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        datasets.check("digit")
    datasets.check("digits")


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    dataset = datasets.load("digits")
    assert len(dataset.train) + len(dataset.test) == 1797
    assert len(dataset.test) == 359
    raw = load_digits()
    counts = dataset.test.labels.bincount() / torch.from_numpy(raw.target).bincount()
    assert (counts - 0.2).abs().max() < 0.01

    images = torch.cat((dataset.train.images, dataset.test.images))
    labels = torch.cat((dataset.train.labels, dataset.test.labels))
    assert torch.equal(images[..., 0], images[..., 1])
    assert torch.equal(images[..., 0], images[..., 2])
    grey = torch.from_numpy(raw.images)[:, None] * (255 / 16)
    expected = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear")[:, 0]
    # Every digit is found once among those of scikit-learn, with its label.
    distance = torch.cdist(images[..., 0].flatten(1).double(), expected.flatten(1).double(), p=2)
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(1797))
    assert torch.equal(labels, torch.from_numpy(raw.target)[nearest])
    assert (images[..., 0].double() - expected[nearest]).abs().max() < 1.5


def test_digits_never_change_and_their_limits_follow_the_seed() -> None:
    first, second = datasets.load("digits", seed=1), datasets.load("digits", seed=2)
    assert first.sha256 == second.sha256
    few = [datasets.load("digits", limit_train=40, limit_test=20, seed=seed) for seed in (1, 1, 2)]
    assert few[0].train.labels.bincount().tolist() == [4] * 10
    assert few[0].test.labels.bincount().tolist() == [2] * 10
    assert few[0].sha256 == few[1].sha256 != few[2].sha256


def test_digits_are_not_read_from_a_path(tmp_path: Path) -> None:
    assert error_of("digits", tmp_path).startswith("data: the dataset digits is embedded")


def test_the_hash_sees_every_part() -> None:
    def build(image: int = 0, label: int = 0, name: str = "a", shape: tuple[int, ...] = (1, 2, 2, 3)) -> str:
        images = torch.full(shape, image, dtype=torch.uint8)
        names = (name, "b")
        split = datasets.Split(images, torch.tensor([label]), names)
        other = datasets.Split(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([1]), names)
        return datasets.Dataset("x", split, other, names, True, "here").sha256

    hashes = [build(), build(image=1), build(label=1), build(name="ab"), build(shape=(1, 1, 4, 3))]
    assert len(set(hashes)) == 5
    assert build() == hashes[0]
    assert len(bytes.fromhex(hashes[0])) == 32


# --- where it is looked for


def test_places_are_named_when_nothing_is_found(places: dict[str, Path]) -> None:
    expected = (
        f"dataset: cifar10 not found in {places['environment']}, {places['data']}, {places['cache']} and the "
        "download failed (no network in tests); `--dataset digits` needs no download"
    )
    assert error_of("cifar10") == expected
    for name in ("cifar100", "svhn", "tiny-imagenet"):
        assert error_of(name) == expected.replace("cifar10", name)
    assert list(places["cache"].iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file"))
    assert "the download failed (" in error_of("cifar10")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert datasets.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert datasets.cache_dir() == Path("/xdg/iad-engine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert datasets.cache_dir() == Path("/home/someone/.cache/iad-engine")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-imagenet"])
def test_a_given_path_is_the_only_place(
    name: str, tmp_path: Path, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a download was tried")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    write_image_folder(places["data"], CIFAR10)
    (tmp_path / "empty").mkdir()
    assert error_of(name, tmp_path / "empty").startswith(
        f"data: {name} is not in {tmp_path / 'empty'}: it has no "
    )
    assert error_of(name, tmp_path / "gone") == f"data: {tmp_path / 'gone'} does not exist"


# --- CIFAR as image files


def write_image_folder(path: Path, class_names: tuple[str, ...], size: int = 32) -> None:
    for i, name in enumerate(class_names):
        for split in ("train", "test"):
            (path / split / name).mkdir(parents=True)
            Image.fromarray(random_images(i, 1, size)[0]).save(path / split / name / "0.png")


@pytest.mark.parametrize("place", ["environment", "data", "cache"])
def test_an_image_folder_of_its_classes_serves_as_cifar10(place: str, places: dict[str, Path]) -> None:
    write_image_folder(places[place], CIFAR10)
    dataset = datasets.load("cifar10")
    assert dataset.class_names == CIFAR10
    assert dataset.source == f"image folder {places[place]} (cifar10 as image files)"
    assert dataset.flip
    assert np.array_equal(dataset.train.images.numpy(), np.stack([random_images(i, 1)[0] for i in range(10)]))


def test_an_image_folder_of_other_classes_is_passed_over(places: dict[str, Path]) -> None:
    write_image_folder(places["environment"], (*CIFAR10[:9], "tractor"))
    write_image_folder(places["cache"], CIFAR10)
    assert datasets.load("cifar10").source == f"image folder {places['cache']} (cifar10 as image files)"
    assert (
        "it has no cifar-10-batches-py, no cifar-10-python.tar.gz and no image folder of its classes"
        in error_of("cifar10", places["environment"])
    )
    assert "cifar100 is not in" in error_of("cifar100", places["cache"])


def test_an_image_folder_of_another_size_is_refused(places: dict[str, Path]) -> None:
    write_image_folder(places["data"], CIFAR10, size=16)
    assert "train/airplane/0.png is 16x16 pixels and must be 32x32" in error_of("cifar10")


# --- torchvision's formats


def write_cifar(path: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> tuple[Pixels, list[int]]:
    """Three images a batch, with their md5 sums in torchvision's class; gives the train part."""
    coarse = kind.__name__ == "CIFAR100"
    base = path / kind.base_folder  # type: ignore[attr-defined]
    base.mkdir(parents=True)
    lists: dict[str, list[list[str]]] = {}
    images, labels = [], []
    for key in ("train_list", "test_list"):
        lists[key] = []
        for i, (file, _) in enumerate(getattr(kind, key)):
            batch, targets = random_images(len(file) + i, 3), [i, (i + 3) % 10, 9 - i]
            entry = {"data": batch.transpose(0, 3, 1, 2).reshape(3, -1)}
            (base / file).write_bytes(pickle.dumps(entry | {"fine_labels" if coarse else "labels": targets}))
            lists[key].append([file, md5(base / file)])
            if key == "train_list":
                images.append(batch)
                labels.extend(targets)
        monkeypatch.setattr(kind, key, lists[key])
    meta = dict(kind.meta)  # type: ignore[attr-defined]
    names = [f"name {c}" for c in range(10)]
    (base / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
    monkeypatch.setattr(kind, "meta", meta | {"md5": md5(base / meta["filename"])})
    return np.concatenate(images), labels


def pack(path: Path, kind: type, monkeypatch: pytest.MonkeyPatch, out: Path) -> Path:
    """The unpacked folder as torchvision's archive in another folder."""
    out.mkdir(parents=True, exist_ok=True)
    packed: Path = out / kind.filename  # type: ignore[attr-defined]
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(path / kind.base_folder, kind.base_folder)  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "tgz_md5", md5(packed))
    return packed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address of a server that gives its files; downloads work again."""
    import urllib.request

    def fetch(url: str, filename: str) -> None:
        with urllib.request.urlopen(url) as response:  # noqa: S310
            Path(filename).write_bytes(response.read())

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    root = tmp_path / "served"
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield root, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_is_read_as_torchvision_stores_it(
    name: str, packed: bool, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets as torchvision_datasets

    kind = getattr(torchvision_datasets, name.upper())
    written = tmp_path / "written" if packed else places["data"]
    images, labels = write_cifar(written, kind, monkeypatch)
    source = written / kind.base_folder
    if packed:
        source = pack(written, kind, monkeypatch, places["data"])
    dataset = datasets.load(name)
    assert np.array_equal(dataset.train.images.numpy(), images)
    assert dataset.train.images.is_contiguous()
    assert dataset.train.labels.tolist() == labels
    assert dataset.class_names == tuple(f"name {c}" for c in range(10))
    assert dataset.source == str(source)
    assert sorted(path.name for path in places["data"].iterdir()) == [source.name]


def test_cifar_with_a_limit_keeps_images_and_labels_together(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10 as Kind

    images, labels = write_cifar(places["data"], Kind, monkeypatch)
    part = datasets.load("cifar10", limit_train=12).train
    assert len(part) == 12
    for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True):
        place = int(np.flatnonzero((images == image).all((1, 2, 3)))[0])
        assert labels[place] == label


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_5", "test_batch", "batches.meta"])
def test_nothing_is_unpickled_whose_md5_differs(
    file: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10 as Kind

    write_cifar(places["data"], Kind, monkeypatch)
    trapped = places["data"] / Kind.base_folder / file
    trapped.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert error_of("cifar10").startswith(f"data: {trapped.parent} is damaged or incomplete")
    assert not (tmp_path / "sprung").exists()


def test_an_archive_whose_md5_differs_is_not_unpacked(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10 as Kind

    write_cifar(tmp_path / "written", Kind, monkeypatch)
    packed = pack(tmp_path / "written", Kind, monkeypatch, places["data"])
    packed.write_bytes(packed.read_bytes() + b"\0")
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", lambda *_: pytest.fail("it was unpacked"))
    assert error_of("cifar10").startswith(f"data: {packed} is damaged or incomplete")


def test_a_download_lands_in_the_cache_and_is_found_there(
    places: dict[str, Path], tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10 as Kind

    root, address = server
    images, _ = write_cifar(tmp_path / "written", Kind, monkeypatch)
    packed = pack(tmp_path / "written", Kind, monkeypatch, root)
    monkeypatch.setattr(Kind, "url", f"{address}/{packed.name}")
    dataset = datasets.load("cifar10")
    assert np.array_equal(dataset.train.images.numpy(), images)
    assert dataset.source == str(places["cache"] / Kind.base_folder)
    assert [path.name for path in places["cache"].iterdir()] == [Kind.base_folder]
    packed.unlink()
    assert datasets.load("cifar10").sha256 == dataset.sha256


def test_a_download_with_another_md5_leaves_nothing_behind(
    places: dict[str, Path], server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10 as Kind

    root, address = server
    (root / "wrong").write_bytes(b"wrong")
    monkeypatch.setattr(Kind, "url", f"{address}/wrong")
    assert "the download failed (File not found or corrupted.)" in error_of("cifar10")
    assert list(places["cache"].iterdir()) == []


def write_svhn(path: Path, monkeypatch: pytest.MonkeyPatch, address: str = "") -> Pixels:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    path.mkdir(parents=True, exist_ok=True)
    images = random_images(0, 4)
    split_list = {}
    for part in ("train", "test"):
        file = path / f"{part}_32x32.mat"
        savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [2], [9]], dtype=np.uint8)})
        split_list[part] = [f"{address}/{file.name}", file.name, md5(file)]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    return images


def test_svhn_is_read_as_torchvision_stores_it(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_svhn(places["data"], monkeypatch)
    dataset = datasets.load("svhn")
    assert np.array_equal(dataset.train.images.numpy(), images)
    assert dataset.train.images.is_contiguous()
    assert dataset.train.labels.tolist() == [0, 1, 2, 9]  # a zero is stored as 10
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.class_names == tuple("0123456789")
    assert not dataset.flip
    (places["data"] / "test_32x32.mat").write_bytes(b"damaged")
    assert "is damaged or incomplete" in error_of("svhn")
    (places["data"] / "test_32x32.mat").unlink()
    assert "it has no train_32x32.mat or no test_32x32.mat" in error_of("svhn", places["data"])


def test_svhn_is_fetched_into_the_cache(
    places: dict[str, Path], server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_svhn(server[0], monkeypatch, server[1])
    dataset = datasets.load("svhn")
    assert np.array_equal(dataset.test.images.numpy(), images)
    assert dataset.source == str(places["cache"])


# --- Tiny-ImageNet


def tiny_imagenet(path: Path) -> dict[tuple[str, str], Pixels]:
    """Two classes as published: train by class, val by a list, test without labels, boxes beside the images."""
    written = {}
    root = path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(b"without a label")
    lines = []
    for c, name in enumerate(("n02", "n01")):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
        for split, file in (("train", f"train/{name}/images/{name}_0.JPEG"), ("val", f"val/images/val_{c}.JPEG")):
            image = Image.fromarray(random_images(c, 1, 64)[0]).convert("L" if c else "RGB")  # some are grey
            image.save(root / file)
            written[split, name] = np.asarray(Image.open(root / file).convert("RGB"))
        lines.append(f"val_{c}.JPEG\t{name}\t0\t0\t32\t44\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return written


def zipped(path: Path, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for file in sorted(path.rglob("*")):
            archive.write(file, file.relative_to(path))
    return out


@pytest.mark.parametrize("kind", ["folder around it", "folder", "zip beside", "zip"])
def test_tiny_imagenet_is_read_as_published(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    place = places["data"]
    if "zip" in kind:
        written = tiny_imagenet(tmp_path / "written")
        path = zipped(tmp_path / "written", place / "tiny-imagenet-200.zip")
    else:
        written = tiny_imagenet(place)
        path = place / "tiny-imagenet-200"
    data = str(path) if kind in ("folder", "zip") else None
    dataset = datasets.load("tiny-imagenet", data)
    assert dataset.class_names == ("n01", "n02")
    assert dataset.source == str(path)
    for split, part in ((dataset.train, "train"), (dataset.test, "val")):
        assert split.labels.tolist() == [0, 1]
        assert np.array_equal(split.images.numpy(), np.stack([written[part, "n01"], written[part, "n02"]]))


@pytest.mark.parametrize("line", ["../../../evil.JPEG\tn01\t0", "val_9.JPEG\tn01\t0", "val_0.JPEG"])
def test_tiny_imagenet_with_a_wrong_line_is_refused(line: str, places: dict[str, Path]) -> None:
    tiny_imagenet(places["data"])
    Image.fromarray(random_images(0, 1, 64)[0]).save(places["data"] / "evil.JPEG")
    annotations = places["data"] / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + line)
    assert error_of("tiny-imagenet").startswith(f"data: {annotations} names what is not there: {line.split()[0]}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("around", ["tiny-imagenet-200/", ""])
@pytest.mark.parametrize("val", ["val/{}/images/", "val/{}/", "val/{}/ and the list"])
@pytest.mark.parametrize("train", ["train/{}/images/", "train/{}/"])
def test_tiny_imagenet_is_read_in_each_layout_that_people_have(
    train: str, val: str, around: str, packed: bool, tmp_path: Path
) -> None:
    pictures = {
        f"{part}{name}": random_images(i, 1, 64)[0]
        for i, (part, name) in enumerate([("t", "n01"), ("t", "n02"), ("v", "n01"), ("v", "n02")])
    }
    root = tmp_path / "here" / around
    for layout, part in ((train, "t"), (val.removesuffix(" and the list"), "v")):
        for name in ("n01", "n02"):
            folder = root / layout.format(name)
            folder.mkdir(parents=True)
            Image.fromarray(pictures[part + name]).save(folder / "0.JPEG", "PNG")  # exact
    if val.endswith("list"):
        (root / "val" / "images").mkdir()  # out of which its images were moved
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\nval_1.JPEG\tn01\t0\n")
    path = zipped(tmp_path / "here", tmp_path / "tiny.zip") if packed else tmp_path / "here"
    dataset = datasets.load("tiny-imagenet", str(path))
    assert dataset.class_names == ("n01", "n02")
    for split, part in ((dataset.train, "t"), (dataset.test, "v")):
        assert split.labels.tolist() == [0, 1]
        assert np.array_equal(split.images.numpy(), np.stack([pictures[part + "n01"], pictures[part + "n02"]]))


def test_tiny_imagenet_s_val_alone_serves_an_evaluation(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "tiny-imagenet-200" / "train")
    found = datasets.find("tiny-imagenet", str(tmp_path), Request(only_test=True))
    assert (len(found.train), len(found.test), found.class_names) == (0, 2, ("n01", "n02"))


def test_tiny_imagenet_without_images_of_a_class_is_refused(places: dict[str, Path]) -> None:
    tiny_imagenet(places["data"])
    annotations = places["data"] / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    root = annotations.parents[1]
    annotations.write_text("val_0.JPEG\tn02\t0\nval_1.JPEG\tn03\t0\n")
    assert error_of("tiny-imagenet") == (
        f"data: train and test must have the same classes; only in {root}/train: n01; only in {root}/val: n03"
    )


def test_tiny_imagenet_is_fetched_into_the_cache(
    places: dict[str, Path], server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import utils

    written = tiny_imagenet(tmp_path / "written")
    served = zipped(tmp_path / "written", server[0] / "tiny-imagenet-200.zip")
    asked = []

    def from_here(url: str, root: str, filename: str | None = None, md5: str | None = None) -> None:
        asked.append((url, md5))
        original(f"{server[1]}/{url.rsplit('/')[-1]}", root, md5=md5_here)

    original, md5_here = utils.download_url, md5(served)
    monkeypatch.setattr(utils, "download_url", from_here)
    dataset = datasets.load("tiny-imagenet")
    assert asked == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")]
    assert np.array_equal(dataset.train.images[0].numpy(), written["train", "n01"])
    assert dataset.source == str(places["cache"] / "tiny-imagenet-200.zip")


# --- real images


@pytest.mark.skipif(REAL is None, reason="ENGINE_DATA is not set: no real CIFAR-10 image folder")
def test_real_cifar10_images_are_those_pillow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL is not None
    if not (Path(REAL) / "train.zip").is_file():
        pytest.skip(f"ENGINE_DATA={REAL} holds no train.zip of CIFAR-10 images")
    monkeypatch.setenv("ENGINE_DATA", REAL)
    dataset = datasets.load("cifar10", limit_train=30, limit_test=10)
    assert dataset.class_names == CIFAR10
    assert dataset.source == f"image folder {REAL} (cifar10 as image files)"
    assert dataset.train.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert dataset.test.labels.tolist() == list(range(10))
    with zipfile.ZipFile(Path(REAL) / "test.zip") as archive:
        for image, name in zip(dataset.test.images, CIFAR10, strict=True):
            paths = [path for path in archive.namelist() if path.startswith(f"test/{name}/") and path[-1] != "/"]
            assert len(paths) == 1000
            decoded = (np.asarray(Image.open(archive.open(path)).convert("RGB")) for path in paths)
            assert any(np.array_equal(image.numpy(), pixels) for pixels in decoded)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_looked_for_under_torchvision_s_names(name: str) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    assert published.CIFAR_NAMES[name] == (kind.base_folder, kind.filename)

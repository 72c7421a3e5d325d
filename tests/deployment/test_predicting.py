"""Predictions: evaluation's to the bit, views by torchvision, answers under an attack, all kinds of images."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from torch import Tensor
from torchvision.transforms import functional as TF

from engine import config, models
from engine.attacks import table
from engine.attacks.autoattack import Outcome
from engine.common.console import Reporter
from engine.common.stopping import RunFailed
from engine.common.tensor_files import write_tensors
from engine.deployment import predicting, views
from engine.deployment.challenges import challenge
from engine.deployment.predicted_files import PredictedFiles, PredictionConfig, run
from engine.deployment.predicting import Predictor, predict
from engine.deployment.views import View, view_for
from engine.evaluation.measure import evaluate
from engine.models.weights import LoadedModel, Predictions, load_model
from engine.pipelines import datasets
from engine.pipelines.splits import Request
from engine.runs import checkpoints
from engine.system.precision import Precision
from tests.conftest import CLASSES
from tests.evaluation.saved import EPSILON, shorten, trained
from tests.pipelines.photographs import smooth


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that classifies most images of `tiny_folder`."""
    return trained(tmp_path_factory.mktemp("network") / "at.pt", tiny_folder)


@pytest.fixture
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)


def untrained(path: Path, names: tuple[str, ...] = CLASSES, **keys: Any) -> Path:
    """A checkpoint of a random resnet8 whose training had those keys."""
    torch.manual_seed(3)
    network = models.build("resnet8", len(names), normalize=True, dataset="cifar10")
    complete = config.load({"model": "resnet8", "method": "at", "normalize": True, **keys})
    write_tensors(
        path, checkpoints.content(checkpoints.student_part(network, complete, names), checkpoints.Progress())
    )
    return path


def split_files(folder: Path) -> list[str]:
    """The test images in the order of an evaluation."""
    return [str(path) for name in CLASSES for path in sorted((folder / "test" / name).iterdir())]


def answers(path: Path, places: list[str], **options: Any) -> PredictedFiles:
    return run(path, places, PredictionConfig(**{"device": "cpu", **options}), Reporter())


# ---------------------------------------------------------------- the same as in evaluation


def test_files_are_classified_as_by_hand(loaded: LoadedModel, checkpoint: Path, tiny_folder: Path) -> None:
    files = split_files(tiny_folder)
    x = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        by_hand = softmax(load_model(checkpoint).module.double()(x / 255).numpy(), axis=1)
    found = predict(loaded, files)
    assert found.labels.tolist() == by_hand.argmax(axis=1).tolist()
    assert found.names == [CLASSES[label] for label in by_hand.argmax(axis=1)]
    np.testing.assert_allclose(found.probabilities.numpy(), by_hand, atol=1e-5)

    rows = answers(checkpoint, [str(tiny_folder / "test")], top=2).rows
    assert [row.file for row in rows] == files
    for row, of_image in zip(rows, by_hand, strict=True):
        order = np.argsort(-of_image)[:2]
        assert [each.label for each in row.top] == order.tolist()
        np.testing.assert_allclose([each.probability for each in row.top], of_image[order], atol=1e-5)


def test_verdicts_of_an_evaluation_follow(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(untrained(tmp_path / "m.pt", dataset="folder"))
    images = datasets.find("folder", str(tiny_folder), Request(only_test=True))
    natural = evaluate(loaded.module, images.test, ["natural"], batch_size=5)["natural"]
    found = predict(loaded, split_files(tiny_folder), batch_size=5)
    assert torch.equal(found.labels == images.test.labels, natural.verdicts)
    assert 0 < natural.correct < natural.n


@pytest.mark.parametrize("name", ["pgd10", "fgsm", "apgd-ce", "doubling"])
def test_answers_hold_where_the_evaluation_finds_no_adversarial_image(
    name: str, checkpoint: Path, loaded: LoadedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is right is the label, so both attacks are one."""
    shorten(monkeypatch)
    table.add("doubling", lambda model, x, y, epsilon: (2 * x).clamp(x - epsilon, x + epsilon).clamp(0, 1))
    images = datasets.find("folder", str(tiny_folder), Request(only_test=True))
    results = evaluate(loaded.module, images.test, ["natural", name], epsilon=float(24 / 255), batch_size=5)
    right = results["natural"].verdicts
    rows = answers(checkpoint, split_files(tiny_folder), attack=name, epsilon=EPSILON, batch_size=5).rows
    holds = torch.tensor([row.attacked is not None and row.attacked.holds for row in rows])
    assert torch.equal(holds[right], results[name].verdicts[right])
    if name != "doubling":
        assert 0 < holds.sum() < len(holds)
    for row in rows:
        assert row.attacked is not None
        assert row.attacked.holds == (row.attacked.label == row.top[0].label)


def test_views_of_any_size_are_those_of_an_evaluation(tmp_path: Path) -> None:
    root, size = tmp_path / "photographs", 16
    for split in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                picture = smooth(10 * number + i, 40 + 7 * i, 70 - 9 * number)
                Image.fromarray(picture).save(root / split / name / f"{i}.jpg", quality=90)
    path = untrained(tmp_path / "m.pt", dataset="folder", image_size=size)
    images = datasets.find("folder", str(root), Request(only_test=True, image_size=size))
    loaded, files = load_model(path), split_files(root)
    found = predict(loaded, files)
    assert torch.equal(found.logits, loaded.predict(images.test.images[torch.arange(9)]).logits)

    def by_torchvision(file: str) -> Tensor:
        with Image.open(file) as image:
            side = round(min(image.size) * 7 / 8)
            top, left = (image.height - side) // 2, (image.width - side) // 2
            view = TF.resized_crop(image, top, left, side, side, [size, size], antialias=True)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255

    x = torch.stack([by_torchvision(file) for file in files])
    with torch.no_grad():
        torch.testing.assert_close(found.logits, loaded.module(x), rtol=0, atol=1e-5)
    rows = answers(path, [str(root / "test")])
    assert [row.top[0].label for row in rows.rows] == found.labels.tolist()
    assert rows.header["image_size"] == size
    assert not any(row.resized for row in rows.rows)  # such views are those of the training


def test_real_jpeg_files_are_classified_as_the_data_set_s(real_images: Path, tmp_path: Path) -> None:
    count = 130  # of the first class; two whole batches and a part of one
    try:
        images = datasets.find("cifar10", str(real_images), Request(only_test=True))
        archive = zipfile.ZipFile(real_images / "test.zip")
    except (ValueError, OSError) as error:
        pytest.skip(f"needs CIFAR-10 as test.zip with JPEG files: {error}")
    path = untrained(tmp_path / "m.pt", images.class_names, dataset="cifar10")
    with archive:
        names = sorted(name for name in archive.namelist() if f"/{images.class_names[0]}/" in f"/{name}")
        names = [name for name in names if not name.endswith("/")][:count]
        for name in names:
            (tmp_path / Path(name).name).write_bytes(archive.read(name))
    loaded = load_model(path)
    part = images.test.take(torch.arange(count))
    natural = evaluate(loaded.module, part, ["natural"])["natural"]
    files = [str(tmp_path / Path(name).name) for name in names]
    found = predict(loaded, files)
    assert torch.equal(found.labels == part.labels, natural.verdicts)
    logits = [loaded.predict(part.images[index_B]).logits for index_B in torch.arange(count).split(64)]
    assert torch.equal(found.logits, torch.cat(logits))
    assert found.notes == ()


# ---------------------------------------------------------------- views


def test_an_image_of_another_size_is_cut_to_its_central_square_and_resized(tmp_path: Path) -> None:
    path = untrained(tmp_path / "m.pt", dataset="cifar10")
    picture = smooth(1, 40, 60)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(smooth(2, 32, 32)).save(tmp_path / "exact.png")
    loaded = load_model(path)
    found = predict(loaded, [tmp_path / "wide.png", tmp_path / "exact.png"])
    square = TF.resized_crop(Image.fromarray(picture), 0, 10, 40, 40, [32, 32], antialias=True)
    views_BHWC = np.stack([np.asarray(square), smooth(2, 32, 32)])
    assert torch.equal(found.logits, loaded.predict(torch.from_numpy(views_BHWC)).logits)
    (note,) = found.notes
    assert note.startswith("1 image is not of 32x32 pixels, as in training: cut to the central square")
    rows = answers(path, [str(tmp_path / name) for name in ("wide.png", "exact.png")]).rows
    assert [(row.size, row.resized) for row in rows] == [((60, 40), True), ((32, 32), False)]


@pytest.mark.parametrize("form", ["grey", "palette", "alpha", "turned"])
def test_other_forms_of_an_image_give_its_pixels(form: str, tmp_path: Path) -> None:
    loaded = load_model(untrained(tmp_path / "m.pt", dataset="cifar10"))
    grey = np.repeat(smooth(3, 32, 32)[:, :, :1], 3, axis=2)
    picture, path = Image.fromarray(grey), tmp_path / "x.png"
    if form == "turned":
        exif = Image.Exif()
        exif[0x112] = 6  # shown turned by 90 degrees clockwise
        picture.rotate(90).save(path, exif=exif)
    else:
        picture.convert({"grey": "L", "palette": "P", "alpha": "RGBA"}[form]).save(path)
    seen = np.array(Image.open(path).convert("RGB")) if form == "palette" else grey
    assert torch.equal(predict(loaded, path).logits, loaded.predict(torch.from_numpy(seen)[None]).logits)


def of_elsewhere(loaded: LoadedModel, **facts: Any) -> LoadedModel:
    return replace(loaded, **{"config": None, "dataset": None, "class_names": None, **facts})


def test_the_view_comes_from_what_the_checkpoint_tells(loaded: LoadedModel) -> None:
    trained_at = {"image_size": 24, "dataset": "folder", "method": "at"}
    assert view_for(replace(loaded, dataset="cifar10"))[0] == View(32)
    assert view_for(replace(loaded, config=trained_at))[0] == View(24, is_crop=True)
    view, notes = view_for(replace(loaded, config=trained_at), image_size=20)
    assert (view, notes) == (View(20, is_crop=True), ("views of 20 pixels; in training 24",))
    view, (note,) = view_for(loaded)
    assert (view, "taken as they are" in note) == (View(None), True)
    assert view_for(of_elsewhere(loaded), dataset="tiny-imagenet")[0] == View(64)
    view, (note,) = view_for(of_elsewhere(loaded, name="resnet50"))
    assert (view, "that of resnet50" in note) == (View(224, is_crop=True), True)


@pytest.mark.parametrize(
    ("facts", "options", "told"),
    [
        ({"dataset": "cifar10"}, {"image_size": 24}, "all images of cifar10 are of one size, 32x32"),
        ({"dataset": "cifar10"}, {"dataset": "svhn"}, "was trained on cifar10, got 'svhn'"),
        ({}, {"dataset": "cifar11"}, "dataset: 'cifar11' is not known; did you mean 'cifar10'?"),
        ({}, {"image_size": 0}, "image_size must be 1 to 8,192, got 0"),
        ({}, {"image_size": 9000}, "image_size must be 1 to 8,192, got 9000"),
        ({"config": {"epochs": -1}}, {}, "the key 'config': epochs"),
    ],
)
def test_views_that_cannot_be_are_refused(
    facts: dict[str, Any], options: dict[str, Any], told: str, loaded: LoadedModel
) -> None:
    with pytest.raises(ValueError, match=told):
        view_for(of_elsewhere(loaded, **facts), **options)


def test_images_of_two_sizes_need_a_size(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.fromarray(smooth(1, 8, 8)), Image.fromarray(smooth(1, 8, 9))]
    with pytest.raises(ValueError, match=r"is 9x8 pixels and the first image 8x8; .* --image-size N"):
        predict(loaded, pictures)
    assert len(predict(loaded, pictures, image_size=8)) == 2
    monkeypatch.setattr(views, "LARGEST_IMAGE", 8)
    with pytest.raises(ValueError, match=r"9x8 pixels, and without --image-size 8 a side are the most"):
        predict(loaded, pictures[1:])


# ---------------------------------------------------------------- kinds of images, from Python


def test_all_kinds_of_images_give_the_same(loaded: LoadedModel, tiny_folder: Path) -> None:
    files = split_files(tiny_folder)[:3]
    pictures = [Image.open(file) for file in files]
    arrays = [np.array(picture) for picture in pictures]
    images_NHWC = torch.from_numpy(np.stack(arrays))
    x = images_NHWC.permute(0, 3, 1, 2) / 255
    kinds: list[Any] = [files, [Path(file) for file in files], pictures, [pictures[0], *files[1:]], arrays]
    kinds += [images_NHWC, np.stack(arrays), x, x.double(), x.numpy(), list(x), list(images_NHWC)]
    expected = loaded.predict(images_NHWC)
    for images in kinds:
        found = predict(loaded, images)
        assert torch.equal(found.logits, expected.logits)
        assert found.class_names == CLASSES
    for one in (files[0], Path(files[0]), pictures[0], arrays[0], x[0]):
        assert predict(loaded, one).labels.tolist() == expected.labels[:1].tolist()


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], "there is none"),
        (["missing.png"], r"images: missing\.png is not a readable image \(No such file"),
        (torch.zeros(2, 8, 8), "expected three channels"),
        (torch.zeros(2, 3, 8, 8) + 2, r"floats must lie in \[0, 1\], got 2..2"),
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), "expected three channels, got 4"),
        (torch.zeros(0, 3, 8, 8), "there is nothing in images"),
        (torch.zeros(8, 8), "expected uint8"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], "of one size"),
        ([torch.zeros(3, 8, 8), "missing.png"], "or of tensors and arrays, got Tensor, str"),
        ([3], "got int"),
    ],
)
def test_what_is_no_image_is_refused(images: Any, told: str, loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=told):
        predict(loaded, images)


def test_tensors_of_another_size_are_refused(tmp_path: Path) -> None:
    loaded = load_model(untrained(tmp_path / "m.pt", dataset="cifar10"))
    with pytest.raises(ValueError, match="takes 32x32 pixels, got 8x9; files are resized"):
        predict(loaded, torch.zeros(2, 3, 9, 8))


def test_equal_logits_are_told_in_the_order_of_classes() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    found = Predictions(logits, tuple("abcd"))
    assert (found.labels.tolist(), found.names) == ([1, 0], ["b", "a"])
    assert [[each.name for each in row] for row in found.top(9)] == [["b", "c", "a", "d"], ["a", "b", "c", "d"]]
    expected = softmax(logits.double().numpy(), axis=1)
    assert [each.probability for each in found.top(2)[0]] == pytest.approx([expected[0, 1], expected[0, 2]])
    assert float(found.probabilities.sum(1).sub(1).abs().max()) < 1e-15


def test_the_network_is_left_as_it_was(loaded: LoadedModel, tiny_folder: Path) -> None:
    loaded.module.train()
    before = {key: value.clone() for key, value in loaded.module.state_dict().items()}
    state = torch.get_rng_state()
    predict(loaded, split_files(tiny_folder)[:2])
    assert loaded.module.training
    assert all(parameter.requires_grad for parameter in loaded.module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in loaded.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Counted(list[Any]):
    """A list that counts the items that were taken out of it."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.taken += 1
            yield item


def test_few_images_are_decoded_in_advance(loaded: LoadedModel) -> None:
    picture = Image.fromarray(smooth(0, 8, 8))
    images = Counted([picture] * 5000)
    predictor = Predictor(loaded, View(None), batch_size=10)
    batches = predictor.batches(images)
    next(batches)
    threads = len(os.sched_getaffinity(0))
    assert images.taken <= 2 * (
        10 + predicting._AHEAD * threads + 1
    )  # read by two: decoding, and names for faults
    batches.close()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- files that are none, logits that are none


def test_files_that_are_no_images_have_a_row(checkpoint: Path, loaded: LoadedModel, tiny_folder: Path) -> None:
    files = split_files(tiny_folder)[:7]
    expected = predict(loaded, files).names
    places = [*files[:3], "/nowhere.png", *files[3:], str(Path(__file__))]
    rows = answers(checkpoint, places, on_bad_image="skip", batch_size=3).rows
    assert [row.file for row in rows] == places
    assert [row.top[0].name for row in rows if row.error is None] == expected
    errors = {row.file: row.as_dict() for row in rows if row.error is not None}
    assert errors["/nowhere.png"] == {
        "file": "/nowhere.png",
        "error": "/nowhere.png is not a readable image (No such file or directory)",
    }
    assert len(errors) == 2
    with pytest.raises(ValueError, match=r"^IMAGES: /nowhere\.png is not a readable image"):
        answers(checkpoint, places)
    with pytest.raises(ValueError, match=r"^IMAGES: none can be read; the first: /nowhere\.png"):
        answers(checkpoint, ["/nowhere.png"], on_bad_image="skip")


def test_logits_that_are_not_finite_are_refused(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    state = load_model(checkpoint).module.state_dict()
    large = {key: value * 1e25 for key, value in state.items() if value.ndim == 1 and key.endswith(".weight")}
    torch.save(state | large, tmp_path / "m.pt")
    with pytest.raises(RunFailed, match=r"m\.pt: the logits of 2 of 2 images are NaN or infinite; no prediction"):
        answers(tmp_path / "m.pt", split_files(tiny_folder)[:2])


def test_a_checkpoint_without_class_names_is_told_them(checkpoint: Path, tmp_path: Path) -> None:
    network = models.build("resnet8", 10)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    Image.fromarray(smooth(1, 32, 32)).save(tmp_path / "x.png")
    (row,) = answers(tmp_path / "m.pt", [str(tmp_path / "x.png")]).rows
    assert row.top[0].name == str(row.top[0].label)
    (named,) = answers(tmp_path / "m.pt", [str(tmp_path / "x.png")], dataset="cifar10").rows
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert named.top[0]._replace(name="") == row.top[0]._replace(name="")
    assert named.top[0].name == classes[row.top[0].label]


# ---------------------------------------------------------------- attacks


def test_an_answer_with_zero_gradients_is_doubtful(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    state = load_model(checkpoint).module.state_dict()
    head = {key: value * 1e9 for key, value in state.items() if key.startswith("linear")}
    torch.save(state | head, tmp_path / "large.pt")
    files = split_files(tiny_folder)
    found = answers(tmp_path / "large.pt", files, attack="pgd10", epsilon=EPSILON)
    masked = [row.attacked.masked for row in found.rows if row.attacked is not None]
    assert len(masked) == len(files)
    assert all(masked)  # a softmax of 0 and 1 has no gradient
    (warning,) = found.warnings
    assert f"of {len(files)} answers hold although most of their gradient was zero or NaN" in warning
    plain = answers(checkpoint, files, attack="pgd10", epsilon=EPSILON)
    assert plain.warnings == ()
    assert not any(row.attacked.masked for row in plain.rows if row.attacked is not None)


def test_saved_images_change_the_answer(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    files, folder = split_files(tiny_folder), tmp_path / "adversarial"
    found = answers(checkpoint, files, attack="pgd10", epsilon=EPSILON, save_adversarial=folder)
    changed = {str(folder / f"{number:06d}.png"): row for number, row in enumerate(found.rows) if not _holds(row)}
    assert sorted(changed) == sorted(map(str, folder.iterdir()))
    assert len(changed) > 1
    network = load_model(checkpoint)
    for file, row in changed.items():
        assert row.attacked is not None
        assert row.attacked.saved is not None
        attacked, natural = (np.array(Image.open(path)).astype(int) for path in (file, row.file))
        assert 0 < np.abs(attacked - natural).max() <= 24
        label = predict(network, file).labels.item()
        assert (row.attacked.saved.label, row.attacked.saved.still) == (label, label != row.top[0].label)
    with pytest.raises(ValueError, match="exists and is no empty folder"):
        answers(checkpoint, files, attack="pgd10", save_adversarial=folder)


def _holds(row: Any) -> bool:
    return bool(row.attacked.holds)


def test_an_attack_gets_the_network_s_answers_and_the_places_of_the_images(
    checkpoint: Path, loaded: LoadedModel, tiny_folder: Path
) -> None:
    given: list[tuple[list[int], list[int], str]] = []

    def watch(model: Any, x: Tensor, y: Tensor, sample: Tensor) -> Tensor:
        given.append((sample.tolist(), y.tolist(), torch.get_float32_matmul_precision()))
        return x

    table.add("watch", watch)
    files = split_files(tiny_folder)
    expected = predict(loaded, files).labels.tolist()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rows = answers(checkpoint, [*files[:7], "/nowhere.png", *files[7:]], attack="watch", batch_size=5,
                       on_bad_image="skip").rows  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    samples = [number for batch, _, _ in given for number in batch]
    assert samples == [*range(7), *range(8, 19)]
    assert [label for _, batch, _ in given for label in batch] == expected
    assert {precision for _, _, precision in given} == {"highest"}
    assert all(row.attacked is None or row.attacked.holds for row in rows)
    assert [row.attacked.masked for row in rows if row.attacked is not None] == [
        None
    ] * 18  # no gradient was taken


@pytest.mark.parametrize(
    ("add", "told"), [(0.2, "an image lies .* outside the ball"), (float("nan"), "an image lies nan outside")]
)
def test_an_attack_that_leaves_its_ball_is_refused(
    add: float, told: str, checkpoint: Path, tiny_folder: Path
) -> None:
    table.add("leaves", lambda model, x, y: (x + add).clamp(0, 1))
    with pytest.raises(RunFailed, match=told):
        answers(checkpoint, split_files(tiny_folder)[:2], attack="leaves", epsilon="8/255")


def test_an_answer_that_another_form_of_the_network_does_not_give_does_not_hold(loaded: LoadedModel) -> None:
    """AutoAttack leaves alone what it takes to be wrong already; that must not count as holding."""
    x = torch.rand(3, 3, 8, 8)
    found = challenge(loaded, "apgd-ce", (8 / 255, "Linf"), Precision(torch.device("cpu"), torch.float32))
    labels = loaded.predict(x).labels
    outcome = Outcome(x, torch.tensor([0, 1, 2], dtype=torch.int8), 0)
    held = replace(found, perturb=lambda *_: outcome).run(x, labels, torch.arange(3))
    assert held.holds_B.tolist() == [False, True, True]
    (warning,) = found.warnings()
    assert "1 answers change by rounding alone" in warning


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attack": "natural"}, "'natural' changes no image; known: fgsm"),
        ({"attack": "pgd"}, "'pgd' is not known"),
        ({"attack": "apgd-t"}, "apgd-t: needs 4 classes, and the model has 3"),
        ({"attack": "pgd10", "epsilon": "8"}, "epsilon"),
        ({"attack": "pgd10", "threat_model": "L1"}, "threat_model"),
        ({"save_adversarial": Path("x")}, "there is no attack; give --attack"),
        ({"top": 0}, "--top"),
        ({"on_bad_image": "ignore"}, "--on-bad-image: 'ignore' is not known"),
        ({"device": "tpu"}, "--device"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], told: str, checkpoint: Path, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        answers(checkpoint, split_files(tiny_folder)[:1], **options)


def test_the_ball_is_that_of_the_training(tiny_folder: Path, tmp_path: Path) -> None:
    path = untrained(tmp_path / "m.pt", dataset="folder", attack={"epsilon": 0.25, "threat_model": "L2"})
    found = answers(path, split_files(tiny_folder)[:2], attack="pgd10")
    assert (found.header["attack"]["epsilon"], found.header["attack"]["threat_model"]) == (0.25, "L2")
    assert found.header["attack"]["description"].startswith("L2, epsilon 0.25, 10 steps")


def test_bytes_of_an_image_are_no_path(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="images: a list is of paths"):
        predict(loaded, io.BytesIO(b"line\n"))  # type: ignore[arg-type]

"""Runs that train on extra images: labelled ones, and ones that a teacher or a checkpoint labels. N images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import config, models, resume, train
from engine.common.stopping import Interrupted
from engine.evaluation import pseudo_labels
from engine.models.weights import load_model
from engine.pipelines import datasets, extra
from engine.pipelines.splits import Request, Split
from engine.runs import teachers
from engine.system.distributed import World
from engine.training.learner import Learner
from tests.processes import together
from tests.runs.helpers import Listener
from tests.runs.test_resume import StopAt, assert_same_run

TINY: dict[str, Any] = {
    "method": "at",
    "dataset": "digits",
    "model": "resnet8",
    "epochs": 2,
    "limit_train": 100,
    "limit_test": 20,
    "validation": 0.1,
    "batch_size": 40,
    "augment": False,
    "attack": {"num_steps": 1},
    "eval": {"final": [], "attack": "fgsm", "probe_size": 10},
    "extra_fraction": 0.5,
}
CPU = torch.device("cpu")
ORIGINALS = 90  # 100 but those that are held out


@pytest.fixture
def extra_npz(tmp_path: Path) -> Path:
    """Other digits of the training split than the 100 that are trained on."""
    train = datasets.load("digits").train
    known = {image.numpy().tobytes() for image in datasets.load("digits", limit_train=100).train.images}
    chosen = [number for number, image in enumerate(train.images) if image.numpy().tobytes() not in known][-60:]
    path = tmp_path / "extra.npz"
    np.savez(path, image=train.images[chosen].numpy(), label=train.labels[chosen].numpy())
    return path


@contextmanager
def seen_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Indices, labels and images of the batches that are learnt from."""
    seen = []
    before = Learner.learn

    def learn(self: Learner, batch: Any, *arguments: Any, **keys: Any) -> Any:
        seen.append((batch.sample.clone(), batch.labels.clone(), batch.x_nat.clone()))
        return before(self, batch, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", learn)
        yield seen


def test_a_run_learns_from_the_extra_images_and_their_labels(
    tmp_path: Path, extra_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = np.load(extra_npz)
    console = Listener()
    with seen_batches(monkeypatch) as seen:
        found = train(TINY, console, extra_data=str(extra_npz), out=str(tmp_path / "run"))
    sample_N, labels_N, x_N = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert [len(batch[0]) for batch in seen] == [40, 40, 40, 40, 20] * 2
    assert [int((batch[0] >= ORIGINALS).sum()) for batch in seen] == [20, 20, 20, 20, 10] * 2
    is_extra_N = sample_N >= ORIGINALS
    assert torch.equal(sample_N[~is_extra_N].bincount(), torch.full((ORIGINALS,), 2))
    assert torch.equal(sample_N[is_extra_N].bincount()[ORIGINALS:], torch.full((60,), 3))
    number_N = sample_N[is_extra_N] - ORIGINALS
    assert torch.equal(labels_N[is_extra_N], torch.from_numpy(given["label"])[number_N])
    wanted = torch.from_numpy(given["image"])[number_N].permute(0, 3, 1, 2).float() / 255
    assert torch.equal(x_N[is_extra_N], wanted)
    assert f"Extra data: 60 images from {extra_npz}" in console.lines
    kept = json.loads((found.path / "provenance.json").read_text())["data"]["extra"]
    assert kept == {"source": str(extra_npz), "images": 60, "labels": None}


def test_the_labels_of_extra_images_move_the_weights(tmp_path: Path, extra_npz: Path) -> None:
    given = np.load(extra_npz)
    np.savez(tmp_path / "other.npz", image=given["image"], label=(given["label"] + 1) % 10)
    weights = []
    for name in ("extra", "other"):
        keys = {"extra_data": str(tmp_path / f"{name}.npz"), "out": str(tmp_path / name), "epochs": 1}
        weights.append(load_model(train(TINY | keys).path / "last.pt").module.state_dict())
    assert not torch.equal(weights[0]["linear.weight"], weights[1]["linear.weight"])


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path: Path, extra_npz: Path, step: int) -> None:
    given = TINY | {"extra_data": str(extra_npz)}
    whole = train(given, out=str(tmp_path / "whole")).path
    with pytest.raises(Interrupted):
        train(given, StopAt(step), out=str(tmp_path / "stopped"))
    resume(tmp_path / "stopped")
    assert_same_run(whole, tmp_path / "stopped")


def test_a_run_refuses_other_extra_images_than_before(tmp_path: Path, extra_npz: Path) -> None:
    with pytest.raises(Interrupted):
        train(TINY, StopAt(3), extra_data=str(extra_npz), out=str(tmp_path / "run"))
    given = np.load(extra_npz)
    moved = tmp_path / "moved.npz"
    np.savez_compressed(moved, images=given["image"], labels=given["label"])
    np.savez(extra_npz, image=given["image"], label=given["label"][::-1])
    with pytest.raises(ValueError, match="--resume: .* changed since"):
        resume(tmp_path / "run")
    resume(tmp_path / "run", extra_data=str(moved))  # the same content elsewhere


@pytest.fixture
def unlabelled(tmp_path: Path, extra_npz: Path) -> Path:
    path = tmp_path / "unlabelled.npz"
    np.savez(path, image=np.load(extra_npz)["image"])
    return path


def directly(checkpoint: Path, npz: Path) -> Tensor:
    """Classes of the images by the network in a checkpoint, in float64."""
    network = load_model(checkpoint).module.double().eval()
    x_N = torch.from_numpy(np.load(npz)["image"]).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        labels: Tensor = network(x_N).argmax(1)
    return labels


def write_labeller(path: Path) -> Path:
    """A network of random weights that tells some digits apart: no class is usual."""
    torch.manual_seed(0)
    network = models.build("resnet8", 10).train()
    x_N = datasets.load("digits", limit_train=100).train.images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for _ in range(30):
            network(x_N)
        network.get_parameter("linear.bias").sub_(network.eval()(x_N).mean(0))
    torch.save(network.state_dict(), path)
    return path


def digits_with(npz: Path) -> tuple[datasets.AnyDataset, Any]:
    dataset: Any = datasets.load("digits", limit_train=100, limit_test=20)
    return dataset, extra.find(str(npz), dataset, Request(), with_labels=False).images


def test_a_checkpoint_labels_extra_images_and_a_resumed_run_has_the_same_labels(
    tmp_path: Path, unlabelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labeller").mkdir()
    labeller = write_labeller(tmp_path / "labeller" / "best.pt")
    given = TINY | {"extra_data": str(unlabelled), "extra_labels": str(labeller.parent)}
    expected = directly(labeller, unlabelled)
    assert len(expected.unique()) > 1  # else the test could not fail
    console = Listener()
    whole = train(given, out=str(tmp_path / "whole")).path
    with seen_batches(monkeypatch) as seen:
        with pytest.raises(Interrupted):
            train(given, StopAt(2), out=str(tmp_path / "stopped"))
        monkeypatch.setattr(pseudo_labels, "_share", None)  # what is in the cache is not labelled again
        resume(tmp_path / "stopped", console)
    assert_same_run(whole, tmp_path / "stopped")
    sample_N, labels_N, _ = (torch.cat(parts) for parts in zip(*seen, strict=True))
    is_extra_N = sample_N >= ORIGINALS
    assert torch.equal(labels_N[is_extra_N], expected[sample_N[is_extra_N] - ORIGINALS])
    (line,) = [line for line in console.lines if line.startswith("Extra labels by")]
    assert str(labeller) in line
    for label, count in enumerate(expected.bincount(minlength=10).tolist()):
        assert f" {label}: {count}" in line


def test_the_robust_teacher_labels_extra_images_and_is_trained_without_them(
    tmp_path: Path, unlabelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"method": "ard", "teacher": {"epochs": 3}, "epochs": 1, "extra_labels": "teacher"}
    console = Listener()
    with seen_batches(monkeypatch) as seen:
        run = train(TINY | keys, console, extra_data=str(unlabelled), out=str(tmp_path / "run"))
    of_teacher = [batch for batch in seen if len(batch[0]) in (40, 10)]
    assert max(int(batch[0].max()) for batch in seen[: 3 * 3]) < ORIGINALS
    assert len(of_teacher) >= 3 * 3
    sample_N, labels_N, _ = (torch.cat(parts) for parts in zip(*seen[3 * 3 :], strict=True))
    is_extra_N = sample_N >= ORIGINALS
    expected = directly(run.path / "teacher" / "best.pt", unlabelled)
    assert torch.equal(labels_N[is_extra_N], expected[sample_N[is_extra_N] - ORIGINALS])
    assert any(line.startswith("Extra labels by the teacher") for line in console.lines)
    trained = config.load(TINY | keys, {"extra_data": str(unlabelled)})
    plain = config.load({key: value for key, value in (TINY | keys).items() if not key.startswith("extra")})
    dataset, _ = digits_with(unlabelled)
    places = [teachers.cache_path(teachers.run_config(each, "teacher"), dataset) for each in (trained, plain)]
    assert places[0] == places[1]
    assert places[0].exists()


def test_a_teacher_of_a_run_with_labelled_extra_images_learns_from_them_too(
    tmp_path: Path, extra_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seen_batches(monkeypatch) as seen:
        train(
            TINY,
            method="ard",
            teacher={"epochs": 1},
            epochs=1,
            extra_data=str(extra_npz),
            out=str(tmp_path / "run"),
        )
    assert [int((batch[0] >= ORIGINALS).sum()) for batch in seen] == [20, 20, 20, 20, 10] * 2


class Brightness(nn.Module):
    """Logits by the mean of an image: class i where it is nearest to i / 9."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.arange(10) / 9)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = -50 * (x.mean((1, 2, 3))[:, None] - self.places) ** 2
        return logits


def label(network: nn.Module, images: Any, version: str | None = "1", world: World | None = None) -> Any:
    return pseudo_labels.label(network, images, version=version, device=CPU, world=world)


def shades() -> Split:
    """100 images of one shade each: two batches on a CPU."""
    shade_N = (torch.arange(100) * 255 // 99).to(torch.uint8)
    images = shade_N[:, None, None, None].expand(-1, 2, 2, 3).contiguous()
    return Split(images, torch.full((100,), extra.UNLABELLED), tuple("abcdefghij"))


def test_labels_and_confidences_are_those_of_the_closed_form() -> None:
    images = shades()
    found = label(Brightness().train(), images)
    mean_N = images.images[:, 0, 0, 0].double() / 255
    logits = -50 * (mean_N[:, None] - torch.arange(10) / 9) ** 2
    assert torch.equal(found.labels, logits.argmax(1))
    assert torch.allclose(found.confidence, logits.softmax(1).max(1).values, atol=1e-5)


def test_labels_are_kept_by_everything_that_decides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = Brightness(), shades()
    expected = label(network, images)
    network.calls = 0
    again = label(network, images)
    assert network.calls == 0
    assert torch.equal(again.labels, expected.labels)
    assert torch.equal(again.confidence, expected.confidence)
    label(network, images, version="2")
    assert network.calls == 2  # other code
    other = shades()
    other.images[99] = 3
    label(network, other)
    assert network.calls == 4
    with torch.no_grad():
        network.places.add_(0.01)
    label(network, images)
    assert network.calls == 6
    label(network, images, version=None)
    label(network, images, version=None)
    assert network.calls == 10  # of code that nobody knows nothing is kept


def test_a_damaged_file_of_labels_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path))
    network, images = Brightness(), shades()
    expected = label(network, images)
    (path,) = (tmp_path / "labels").iterdir()
    path.write_bytes(path.read_bytes()[:-70])
    assert torch.equal(label(network, images).labels, expected.labels)
    assert network.calls == 4


def test_logits_that_are_not_finite_are_refused() -> None:
    network = Brightness()
    with torch.no_grad():
        network.places[3] = torch.nan
    with pytest.raises(ValueError, match="extra_labels: .*image 0, and of 99 more, are not finite"):
        label(network, shades())


def run_together(world: World, npz: str, out: str) -> None:
    """The labelling is shared, and both processes have their half of every batch and of its extra images."""
    network = Brightness()
    alone = pseudo_labels.label(network, shades(), version=None, device=CPU)
    network.calls = 0
    for _ in range(2):  # the second time from the cache
        shared = label(network, shades(), world=world)
        assert torch.equal(shared.labels, alone.labels)
        assert torch.equal(shared.confidence, alone.confidence)
        assert network.calls == 1
    with pytest.MonkeyPatch.context() as patch, seen_batches(patch) as seen:
        train(TINY, extra_data=npz, out=out, epochs=1, world=world)
    assert [len(batch[0]) for batch in seen] == [20, 20, 20, 20, 10]
    assert [int((batch[0] >= ORIGINALS).sum()) for batch in seen] == [10, 10, 10, 10, 5]
    whole = world.gather(torch.cat([batch[0] for batch in seen])).flatten()
    assert torch.equal(whole[whole < ORIGINALS].sort().values, torch.arange(ORIGINALS))


def test_two_processes_share_the_labelling_and_the_images(tmp_path: Path, extra_npz: Path) -> None:
    together(2, run_together, str(extra_npz), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, "has no labels; --extra-labels teacher, or a checkpoint"),
        ({"extra_labels": "teacher"}, "extra_labels: 'teacher', and at has none"),
        ({"extra_labels": "/nowhere.pt"}, "extra_labels: /nowhere.pt: cannot be read"),
        ({"extra_data": None}, "extra_fraction: it is of extra images, and extra_data names none"),
        ({"extra_data": None, "extra_fraction": 0.7, "extra_labels": "teacher"}, "extra_labels: it is of extra"),
        ({"extra_fraction": 1}, "extra_fraction"),
        ({"extra_data": "/nowhere.npz"}, "extra_data: cannot read /nowhere.npz"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, unlabelled: Path, keys: dict[str, Any], named: str
) -> None:
    given = TINY | {"extra_data": str(unlabelled)} | keys
    with pytest.raises(ValueError, match=named):
        train(given, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_images_that_stay_in_their_files_are_trained_on_with_extra_ones(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=levels, label=np.arange(9) % 3)
    keys = {"dataset": "folder", "data": str(tiny_folder), "pipeline": "image", "limit_train": None, "epochs": 1}
    with seen_batches(monkeypatch) as seen:
        train(TINY | keys, extra_data=str(tmp_path / "extra.npz"), out=str(tmp_path / "run"))
    sample_N, labels_N, x_N = (torch.cat(parts) for parts in zip(*seen, strict=True))
    originals = 42 - 4  # validation holds 4 out
    number_N = sample_N[sample_N >= originals] - originals
    assert len(number_N) == originals
    assert torch.equal(labels_N[sample_N >= originals], number_N % 3)
    expected = torch.from_numpy(levels)[number_N].permute(0, 3, 1, 2).float() / 255
    assert torch.equal(x_N[sample_N >= originals], expected)

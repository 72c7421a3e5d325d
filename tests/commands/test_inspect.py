"""`engine inspect`: each kind of file and folder is told by its content, and garbage in one line."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import models
from engine.commands.inspect import Told, look
from engine.models.weights import load_model, save_safetensors, weights_sha256
from tests.conftest import CLASSES, write_checkpoint

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])


def network(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return models.build("resnet8", 10).state_dict()


def told(cli: Any, *arguments: str) -> dict[str, Any]:
    outcome = cli("inspect", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_a_checkpoint_of_others(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "theirs.pth"
    state = {f"module.{key}": tensor for key, tensor in network().items()}
    torch.save({"state_dict": state | {"module.mu": MEAN, "module.sigma": STD}, "ema": network(1)}, path)
    found = told(cli, str(path))
    facts = found["facts"]
    assert found["kind"] == "checkpoint (torch)"
    assert found["rows"] == [
        ["state_dict", "module.", "resnet8", 10, 56, 78042, "float32"],
        ["ema", "", "resnet8", 10, 56, 78042, "float32"],
    ]
    loaded = load_model(path)
    assert facts["parameters"] == sum(parameter.numel() for parameter in loaded.module.parameters()) == 78042
    assert (facts["taken"], facts["prefix"], facts["model"], facts["classes"]) == (
        "state_dict",
        "module.",
        "resnet8",
        10,
    )
    assert (facts["sha256"], facts["weights_sha256"]) == (loaded.sha256, weights_sha256(loaded.module))
    assert facts["normalisation"] == [pytest.approx(MEAN.tolist()), pytest.approx(STD.tolist())]
    assert found["next"] == [f"engine eval {path} --dataset DATASET"]
    outcome = cli("inspect", str(path))
    for words in ("resnet8", loaded.sha256, "78,042", "Note: the weights under 'state_dict' are taken"):
        assert words in outcome.out


def test_several_networks_are_shown_and_one_can_be_named(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "two.pth"
    torch.save({"student": network(), "teacher": network(1)}, path)
    found = told(cli, str(path))
    assert [row[0] for row in found["rows"]] == ["student", "teacher"]
    assert "it cannot be used as it is: holds several networks" in found["notes"][0]
    for option in ("--weights-key", "--weights"):
        found = told(cli, str(path), option, "teacher")
        assert found["facts"]["taken"] == "teacher"
        assert found["next"] == [f"engine eval {path} --weights-key teacher --dataset DATASET"]


def test_an_own_checkpoint_and_a_run(tiny: Any, tmp_path: Path, cli: Any) -> None:
    facts = told(cli, str(tiny.teacher))["facts"]
    assert (facts["class names"], facts["trained on"], facts["method"]) == (list(CLASSES), "folder", "at")
    run = tmp_path / "run"
    assert cli(*tiny.flags(method="at", epochs=1), "--out", str(run)).code == 0
    found = told(cli, str(run))
    assert found["kind"] == "run directory"
    assert found["facts"]["finished"]
    assert found["facts"]["best.pt: weights_sha256"] == weights_sha256(load_model(run / "best.pt").module)
    assert found["next"][0] == f"engine eval {run}"
    measured = {name for name in found["facts"] if name.startswith("best: ")}
    assert measured == {
        f"best: {name}" for name in ("epoch", "natural_accuracy", "robust_accuracy", "measured_on")
    }


def test_a_checkpoint_of_no_known_architecture(tmp_path: Path, cli: Any) -> None:
    state = network()
    del state["linear.bias"]
    torch.save({"net": {key: tensor.half() for key, tensor in state.items()}}, tmp_path / "theirs.pth")
    found = told(cli, str(tmp_path / "theirs.pth"))
    assert found["rows"] == [["net", "", "no known architecture", None, 55, 78042 - 10, "float16"]]
    assert "it cannot be used as it is: its 46 tensors" in found["notes"][0]


def test_a_stray_file_of_a_flat_folder_counts_once(tiny_folder: Path, tmp_path: Path, cli: Any) -> None:
    shutil.copytree(tiny_folder / "train", tmp_path / "photos")
    (tmp_path / "photos" / CLASSES[1] / "notes.txt").write_text("none")
    facts = told(cli, str(tmp_path / "photos"))["facts"]
    assert (facts["train images"], facts["test images"], facts["left out"]) == (33, 9, 1)


def test_a_folder_of_images(tiny_folder: Path, tmp_path: Path, cli: Any) -> None:
    shutil.copytree(tiny_folder, tmp_path / "photos")
    Image.new("RGB", (20, 10)).save(tmp_path / "photos" / "train" / CLASSES[0] / "large.jpg")
    (tmp_path / "photos" / "train" / CLASSES[0] / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "photos" / "test" / CLASSES[1] / "notes.txt").write_text("none")
    found = told(cli, str(tmp_path / "photos"))
    facts = found["facts"]
    assert found["kind"] == "image folder"
    assert (facts["classes"], facts["train images"], facts["test images"], facts["left out"]) == (3, 44, 18, 1)
    assert (facts["pixels"], facts["formats"]) == ("8x8 to 20x10", "42 PNG RGB, 1 JPEG RGB")
    assert "bad.png" in facts["unreadable"][0]
    assert found["rows"] == [[name, label, 14 + 2 * (label == 0), 6] for label, name in enumerate(CLASSES)]
    assert "--image-size" in found["next"][0]


def test_a_zip_archive_and_a_flat_folder_of_images(tiny_folder: Path, tmp_path: Path, cli: Any) -> None:
    archive = shutil.make_archive(str(tmp_path / "tiny"), "zip", tiny_folder)
    assert told(cli, archive)["facts"]["train images"] == 42
    shutil.copytree(tiny_folder / "train", tmp_path / "flat")
    found = told(cli, str(tmp_path / "flat"))
    assert (found["facts"]["train images"], found["facts"]["test images"]) == (33, 9)
    assert any("a fifth of each class" in note for note in found["notes"])


def test_an_npz_of_images(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "generated.npz"
    np.savez(path, image=np.full((5, 8, 10, 3), 9, np.uint8), label=np.array([0, 1, 1, 2, 1]))
    found = told(cli, str(path))
    assert (found["kind"], found["facts"]["pixels"]) == ("images in an .npz file", "10x8")
    assert found["rows"] == [[0, 1], [1, 3], [2, 1]]


def test_what_is_nothing_is_told_in_one_line(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    for name, words in (
        ("absent", "does not exist"),
        ("empty", "cannot be taken as a folder of images: holds no train/"),
        ("page.pt", "it is a web page"),
    ):
        outcome = cli("inspect", str(tmp_path / name))
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert words in outcome.err


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), seed=st.integers(0, 2**32))
def test_no_bytes_raise_anything_but_value_error(content: bytes, seed: int) -> None:
    """Random bytes, and checkpoints, safetensors and .npz files with some bytes changed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        sources = (small_torch, small_safetensors, small_npz)
        for make in (None, *sources):
            if make is None:
                path.write_bytes(content)
            else:
                make(path)
                changed = bytearray(path.read_bytes())
                for _ in range(draw.randint(1, 4)):
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
                path.write_bytes(bytes(changed[: draw.choice((None, draw.randrange(len(changed))))]))
            said = ""
            try:
                look(path, Told())
            except ValueError as error:
                said = str(error)
            assert "\n" not in said


def small_torch(path: Path) -> None:
    torch.save({"net": {"conv1.weight": torch.ones(2, 3, 1, 1), "fc.weight": torch.ones(2, 2)}, "epoch": 1}, path)


def small_safetensors(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, {"a": "b"}))


def small_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, image=np.zeros((2, 4, 4, 3), np.uint8), label=np.array([0, 1]))


# safetensors


def test_safetensors_keep_all_that_is_known_of_a_network(tmp_path: Path, cli: Any) -> None:
    source, target = write_checkpoint(tmp_path / "own.pt", 3), tmp_path / "own.bin"
    outcome = cli("inspect", str(source), "--save-safetensors", str(target))
    assert outcome.code == 0, outcome.err
    ours, again = load_model(source), load_model(target)
    assert weights_sha256(again.module) == weights_sha256(ours.module)
    for name in ("name", "num_classes", "class_names", "normalize", "dataset", "config"):
        assert getattr(again, name) == getattr(ours, name), name
    assert again.notes == ()
    assert told(cli, str(target))["notes"] == []
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata()["model"] == '"resnet8"'
        assert json.loads(file.metadata()["class_names"]) == list(CLASSES)
        for name, tensor in ours.module.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor), name
    assert cli("inspect", str(source), "--save-safetensors", str(target)).code == 2


def test_safetensors_of_a_network_from_elsewhere(tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in network().items()}}, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", normalize="cifar10")
    save_safetensors(loaded, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors")
    assert again.normalize is not None
    assert loaded.normalize is not None
    assert again.normalize[0] == pytest.approx(loaded.normalize[0])
    assert again.normalize[1] == pytest.approx(loaded.normalize[1])
    assert (again.config, again.class_names) == (None, None)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(again.module(images), loaded.module(images), rtol=0, atol=0)


def test_safetensors_of_others_are_read_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(safetensors.torch.save({f"model.{k}": v for k, v in network().items()}, {"format": "pt"}))
    loaded = load_model(path)
    assert loaded.prefix == "model."
    assert loaded.notes == ("a safetensors file, which has no checksums: damage to it cannot be seen",)
    for key, tensor in network().items():
        assert torch.equal(loaded.module.state_dict()[key], tensor)


def test_a_changed_byte_of_own_safetensors_is_found(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_safetensors(load_model(write_checkpoint(tmp_path / "a.pt", 3)), path)
    data, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(data[:8], "little")
    places = [draw.randrange(8, 8 + header) for _ in range(150)] + [
        draw.randrange(header, len(data)) for _ in range(50)
    ]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        other.write_bytes(bytes(changed))
        with pytest.raises(
            ValueError, match=r"^[^\n]*b.safetensors: (is damaged|is a damaged|is no checkpoint)[^\n]*$"
        ):
            load_model(other)

"""Whatever a user can get wrong: one clear line on stderr, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine import models


def assert_user_error(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, (outcome.out, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("engine: ")
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word in lines[0], lines[0]


# ---------------------------------------------------------------- flags and keys

FLAGS: dict[str, tuple[list[str], list[str]]] = {
    # name: (arguments after `engine`, what the line must say)
    "no such command": (["trian"], ["trian"]),
    "no such flag": (["train", "--mehtod", "at"], ["--mehtod", "--method"]),
    "flag without value": (["train", "--method"], ["--method"]),
    "method": (["train", "--method", "iad3"], ["method", "iad3", "iad1"]),
    "model": (["train", "--model", "resnet19"], ["model", "resnet19", "resnet18"]),
    "dataset": (["train", "--dataset", "cifar11"], ["dataset", "cifar11", "cifar10"]),
    "semantics": (["train", "--semantics", "papr"], ["semantics", "papr", "official"]),
    "epochs not a number": (["train", "--epochs", "many"], ["--epochs", "many"]),
    "epochs zero": (["train", "--epochs", "0"], ["epochs", "0"]),
    "batch size": (["train", "--batch-size", "-1"], ["batch_size", "-1"]),
    "lr text": (["train", "--lr", "fast"], ["lr", "fast"]),
    "lr zero": (["train", "--lr", "0"], ["lr", "0"]),
    "lr beyond float32": (["train", "--lr", "1e39"], ["lr", "1e39"]),
    "unknown table of recipes": (["train", "--config", "recipe:table99-x"], ["table99-x", "engine recipes"]),
    "lr infinite": (["train", "--lr", ".inf"], ["lr", "inf"]),
    "seed negative": (["train", "--seed", "-3"], ["seed", "-3"]),
    "limit zero": (["train", "--limit-train", "0"], ["limit_train", "0"]),
    "attack bn": (["train", "--attack-bn", "frozen"], ["attack.bn", "frozen", "'batch'"]),
    "device": (["train", "--device", "tpu"], ["--device", "tpu", "cpu"]),
    "device with an odd name": (["train", "--device", "gpu:x"], ["--device", "gpu:x"]),
    "gpus none": (["train", "--gpus", "0"], ["gpus", "0"]),
    "processes none": (["train", "--procs", "0"], ["procs", "0"]),
    "gpus and processes": (["train", "--gpus", "1", "--procs", "1"], ["--gpus", "--procs", "exclude"]),
    "gpus on a cpu": (["train", "--gpus", "0", "--device", "cpu"], ["gpus"]),
    "processes on gpus": (["train", "--procs", "2", "--device", "cuda"], ["--procs", "--gpus 2"]),
    "micro-batch": (["train", "--micro-batch", "half"], ["micro_batch", "half"]),
    "micro-batch and statistics": (
        ["train", "--micro-batch", "auto", "--sync-bn", "on"],
        ["micro_batch", "sync_bn"],
    ),
    "batch that cannot be shared": (
        ["train", "--dataset", "digits", "--batch-size", "15", "--procs", "2", "--device", "cpu"],
        ["batch_size", "15", "2"],
    ),
    "set without equals": (["train", "--set", "epochs"], ["--set", "epochs"]),
    "set unknown key": (["train", "--set", "attack.num_step=3"], ["attack.num_step", "num_steps"]),
    "set unknown group": (["train", "--set", "atack.num_steps=3"], ["atack", "attack"]),
    "set group to value": (["train", "--set", "attack=3"], ["attack", "num_steps"]),
    "set no yaml": (["train", "--set", "lr=[1,"], ["lr"]),
    "epsilon": (["train", "--set", "attack.epsilon=-1/255"], ["attack.epsilon"]),
    "epsilon fraction": (["train", "--set", "attack.epsilon=8/0"], ["attack.epsilon", "8/0"]),
    "attack loss": (
        ["train", "--set", "attack.loss=hinge"],
        ["attack.loss: 'hinge' is not known", "ce, cw, dlr, kl"],
    ),
    "tau": (["train", "--set", "loss.tau=0"], ["loss.tau", "0"]),
    "beta": (["train", "--set", "loss.beta=-1"], ["loss.beta", "-1"]),
    "lambda": (["train", "--set", "loss.lam=1.5"], ["loss.lam", "1.5"]),
    "term": (["train", "--set", "loss.weights.kl_slf=1"], ["kl_slf", "kl_self"]),
    "warm-up": (["train", "--set", "loss.warmup=1.5"], ["loss.warmup", "1.5"]),
    "milestones": (["train", "--set", "optim.milestones=[0.75, 0.5]"], ["optim.milestones"]),
    "milestones and factors": (["train", "--set", "optim.lr_factors=[0.1]"], ["optim.lr_factors"]),
    "official and tau_self": (
        ["train", "--semantics", "official", "--set", "loss.tau_self=2"],
        ["loss.tau_self", "official"],
    ),
    "official and gamma": (
        ["train", "--semantics", "official", "--set", "loss.gamma=1"],
        ["loss.gamma", "Table 9"],
    ),
    "amp and float64": (["train", "--amp", "--set", "dtype=float64"], ["amp", "float64"]),
    "dtype": (["train", "--set", "dtype=float16"], ["dtype", "float16"]),
    "eval attack": (["train", "--set", "eval.attack=pgd0"], ["pgd0", "pgd10"]),
    "final attacks": (["train", "--set", "eval.final=[pgd20, xyz]"], ["xyz", "pgd20"]),
    "teacher method": (["train", "--set", "teacher.method=ard"], ["teacher.method", "ard", "trades"]),
    "recipe": (["train", "--config", "recipe:table2-cifar10-at-iad9"], ["table2-cifar10-at-iad9"]),
    "config missing": (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "resume missing": (["train", "--resume", "nowhere"], ["--resume", "nowhere"]),
    "resume and flags": (["train", "--resume", "runs/a", "--lr", "0.1"], ["runs/a", "no run directory"]),
    "resume and config": (["train", "--resume", "runs/a", "--config", "x"], ["--resume DIR", "drop --config"]),
    "resume and out": (["train", "--resume", "runs/a", "--out", "runs/b"], ["--resume DIR", "drop --out"]),
    "eval without checkpoint": (["eval"], ["CHECKPOINT"]),
    "eval missing": (["eval", "nowhere.pt"], ["nowhere.pt"]),
    "eval attacks": (["eval", "nowhere.pt", "--attacks", "pgd-21"], ["pgd-21", "pgd20"]),
    "eval no attacks": (["eval", "nowhere.pt", "--attacks", ","], ["--attacks"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_and_keys(name: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = FLAGS[name]
    assert_user_error(cli(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "arguments", [["--gpus", "1"], ["--gpus", "8"], ["--device", "cuda"], ["--device", "cuda:3"]]
)
def test_gpus_that_are_not_there(arguments: list[str], cli: Any, tmp_path: Path) -> None:
    outcome = cli("train", "--dataset", "digits", "--out", str(tmp_path / "run"), *arguments)
    assert_user_error(outcome, arguments[0], arguments[1], "0 CUDA GPUs")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- configuration files

FILES: dict[str, tuple[bytes, list[str]]] = {
    "not yaml": (b"lr: [1,\nx", ["not valid YAML", "line"]),
    "a list": (b"- lr\n- 1\n", ["list"]),
    "a number": (b"3", ["int"]),
    "numeric keys": (b"1: 2", ["key: value"]),
    "binary": (bytes(range(128, 256)), ["not a text file"]),
    "unknown key": (b"epoch: 3", ["'epoch'", "'epochs'"]),
    "unknown nested key": (b"attack:\n  steps: 3", ["attack.steps"]),
    "null where a number is due": (b"lr: null", ["lr"]),
    "python object": (b"lr: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files(name: str, cli: Any, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / "config.yaml").write_bytes(content)
    assert_user_error(cli("train", "--config", str(tmp_path / "config.yaml")), *words)


def test_a_folder_as_configuration(cli: Any, tmp_path: Path) -> None:
    assert_user_error(cli("train", "--config", str(tmp_path)), str(tmp_path))


# ---------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint was run",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def resnet8(classes: int = 3) -> dict[str, Any]:
    return dict(models.build("resnet8", classes).state_dict())


def without(key: str) -> dict[str, Any]:
    state = resnet8()
    del state[key]
    return state


CHECKPOINTS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "text": (lambda: b"not a checkpoint", ["no checkpoint"]),
    "empty file": (lambda: b"", ["is empty"]),
    "half a file": (lambda: saved(resnet8())[:9000], ["no checkpoint"]),
    "a list": (lambda: saved([1, 2]), ["no weights"]),
    "an empty dict": (lambda: saved({}), ["empty"]),
    "a pickle that runs code": (lambda: saved({"net": Evil()}), ["run code"]),
    "a plain pickle that runs code": (lambda: pickle.dumps(Evil()), []),
    "other classes": (lambda: saved({"net": resnet8(5)}), ["5 classes", "3"]),
    "a key too few": (lambda: saved(without("bn1.weight")), ["no known architecture"]),
    "a key too many": (
        lambda: saved(resnet8() | {"further": torch.zeros(1)}),
        ["no known architecture", "resnet8"],
    ),
    "another shape": (lambda: saved(resnet8() | {"conv1.weight": torch.zeros(16, 3, 5, 5)}), ["conv1.weight"]),
    "no tensors": (lambda: saved({"epoch": 3}), ["epoch"]),
    "not finite": (
        lambda: saved(resnet8() | {"bn1.weight": torch.full((16,), torch.nan)}),
        ["bn1.weight", "finite"],
    ),
    "a later format": (lambda: saved({"format": 99, "student": resnet8()}), ["format", "99"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_teachers(name: str, tiny: Any, cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = CHECKPOINTS[name]
    path = tmp_path / "teacher.pt"
    path.write_bytes(make())
    keys = tiny.flags(method="ard", teacher={"checkpoint": str(path)}, out=str(tmp_path / "run"))
    outcome = cli(*keys)
    assert_user_error(outcome, str(path), *words)
    assert "code of a checkpoint was run" not in outcome.out


def test_a_named_model_tells_what_differs(tiny: Any, cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes(saved(without("bn1.weight")))
    teacher = {"checkpoint": str(path), "model": "resnet8"}
    outcome = cli(*tiny.flags(method="ard", teacher=teacher, out=str(tmp_path / "run")))
    assert_user_error(outcome, str(path), "1 keys missing", "bn1.weight")


def test_a_missing_teacher(tiny: Any, cli: Any, tmp_path: Path) -> None:
    flags = tiny.flags(method="ard", teacher={"checkpoint": "nowhere.pt"}, out=str(tmp_path / "run"))
    assert_user_error(cli(*flags), "nowhere.pt")


def test_eval_of_another_number_of_classes(tiny: Any, cli: Any) -> None:
    assert_user_error(cli("eval", str(tiny.teacher), "--dataset", "digits"), "3 classes", "10")


def test_a_run_directory_without_a_checkpoint(cli: Any, tmp_path: Path) -> None:
    assert_user_error(cli("eval", str(tmp_path)), "best.pt")


def test_a_damaged_checkpoint_of_a_run(tiny: Any, cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(*tiny.flags(method="st", epochs=1, out=str(run))).code == 0
    (run / "summary.json").unlink()
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    assert_user_error(cli("train", "--resume", str(run)), "last.pt")


# ---------------------------------------------------------------- data


def image(size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (9, 99, 199)).save(buffer, "PNG")
    return buffer.getvalue()


def float_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("F", (8, 8), 0.5).save(buffer, "TIFF")
    return buffer.getvalue()


TWO_CLASSES = {
    f"{split}/{name}/{n}.png": image() for split in ("train", "test") for name in "ab" for n in range(3)
}


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


DATA: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "nothing": ({}, []),
    "no test and a single image": ({f"train/{name}/0.png": image() for name in "ab"}, ["no test images", "'a'"]),
    "no train": ({name: content for name, content in TWO_CLASSES.items() if name.startswith("test")}, ["train"]),
    "an unreadable image": (TWO_CLASSES | {"train/a/9.png": b"no image"}, ["train/a/9.png"]),
    "an image of floats": (TWO_CLASSES | {"train/a/9.png": float_image()}, ["train/a/9.png", "8 or 16 bits"]),
    "half an image": (TWO_CLASSES | {"test/b/9.png": image()[:40]}, ["test/b/9.png"]),
    "an image of another size": (TWO_CLASSES | {"train/b/9.png": image(16)}, ["train/b/9.png", "16"]),
    "an empty class": (TWO_CLASSES | {"train/c/": b"", "test/c/1.png": image()}, ["c"]),
    "a class only in test": (TWO_CLASSES | {"test/c/1.png": image()}, ["c"]),
    "a single class": ({n: c for n, c in TWO_CLASSES.items() if "/a/" in n}, ["a"]),
    "text called an image": (TWO_CLASSES | {"train/a/9.jpg": b"hello"}, ["9.jpg"]),
    "text alone in a class": (TWO_CLASSES | {"train/c/readme.txt": b"hello", "test/c/1.png": image()}, ["c"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", DATA)
def test_data(name: str, packed: bool, cli: Any, tmp_path: Path) -> None:
    files, words = DATA[name]
    place = tmp_path / ("data.zip" if packed else "data")
    if packed:
        place.write_bytes(zipped(files))
    else:
        place.mkdir()
        for path, content in files.items():
            target = place / path
            (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
            if not path.endswith("/"):
                target.write_bytes(content)
    outcome = cli(
        "train", "--method", "st", "--dataset", "folder", "--data", str(place), "--out", str(tmp_path / "r")
    )
    assert_user_error(outcome, place.name, *words)
    assert not (tmp_path / "r").exists()  # mended, the same command can be given again


def test_other_bad_places(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_DATA", raising=False)
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    (tmp_path / "escape.zip").write_bytes(zipped(TWO_CLASSES | {"../train/a/x.png": image()}))
    common = ["train", "--method", "st", "--out", str(tmp_path / "run"), "--dataset"]
    assert_user_error(cli(*common, "folder"), "ENGINE_DATA")
    assert_user_error(cli(*common, "folder", "--data", str(tmp_path / "none")), "none")
    assert_user_error(cli(*common, "folder", "--data", str(tmp_path / "broken.zip")), "broken.zip")
    assert_user_error(cli(*common, "folder", "--data", str(tmp_path / "escape.zip")), "..")
    assert_user_error(cli(*common, "cifar10", "--data", str(tmp_path)), "cifar10")
    assert_user_error(cli(*common, "digits", "--limit-train", "5"), "validation", "single image")


def test_a_taken_or_impossible_run_directory(tiny: Any, cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(*tiny.flags(method="st", epochs=1, out=str(run))).code == 0
    assert_user_error(cli(*tiny.flags(method="st", epochs=1, out=str(run))), "--resume", str(run))
    (tmp_path / "file").write_text("in the way")
    assert_user_error(cli(*tiny.flags(method="st", out=str(tmp_path / "file" / "run"))), "--out")
    assert_user_error(cli("eval", str(tiny.teacher), "--attacks", "natural", "--data", str(tiny.folder),
                          "--out", str(tmp_path / "file" / "x.json")), "--out")  # fmt: skip

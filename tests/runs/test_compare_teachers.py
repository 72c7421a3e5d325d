"""Comparison of candidate teachers: the report, its files, and what is refused or warned of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine import models
from engine.common.stopping import Interrupted, Stop
from engine.config import load
from engine.evaluation.candidates import MEASURES
from engine.evaluation.measure import evaluate
from engine.models.weights import load_model
from engine.pipelines import datasets
from engine.runs import compare_teachers
from engine.runs.compare_teachers import TeachersConfig
from tests.conftest import write_checkpoint
from tests.runs.helpers import Listener


@pytest.fixture
def config(tiny: Any) -> TeachersConfig:
    """18 test images of 3 classes; a student that is trained for a step."""
    return TeachersConfig(dataset="folder", data=str(tiny.folder), student_epochs=1, epsilon="0.1", device="cpu")


def changed(config: TeachersConfig, **keys: Any) -> TeachersConfig:
    return TeachersConfig(**{**vars(config), **keys})


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report without times, and without the session."""
    for entry in report["candidates"]:
        for result in entry["attacks"].values():
            del result["seconds"]
    return {key: report[key] for key in ("student", "candidates", "comparisons", "data")}


def test_the_numbers_are_those_of_the_evaluation_and_the_same_again(tiny: Any, config: TeachersConfig) -> None:
    paths = [tiny.teacher, tiny.teacher_st]
    listener = Listener()
    report = compare_teachers.run(paths, config, listener)
    data = datasets.load("folder", str(tiny.folder)).test
    for entry in report["candidates"]:
        network = load_model(entry["path"]).module
        expected = evaluate(network, data, ["natural", "pgd10"], epsilon=0.1)
        for name, attack in (("natural", "natural"), ("robust", "pgd10")):
            assert entry["measures"][name]["value"] == expected[attack].accuracy
            assert entry["measures"][name]["n"] == 18
        x_nat = data.images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            likelihood = float(F.cross_entropy(network(x_nat), data.labels))
        assert entry["measures"]["nll_natural"]["value"] == pytest.approx(likelihood, rel=1e-5)
        assert entry["measures"]["nll_transfer"]["value"] != pytest.approx(likelihood, rel=1e-5)
        assert entry["measures"]["parameters"]["value"] == 78042 - 7 * 65
    values = [entry["measures"]["reliability"]["value"] for entry in report["candidates"]]
    assert values == sorted(values, reverse=True)
    assert any("18 of them: the standard error" in line for line in listener.lines)
    again = compare_teachers.run(paths, config, Listener())
    assert numbers(report) == numbers(again)
    other = compare_teachers.run(paths, changed(config, seed=1), Listener())
    assert other["student"]["weights_sha256"] != report["student"]["weights_sha256"]


def test_a_student_may_be_given_and_the_order_changed(tiny: Any, config: TeachersConfig) -> None:
    wanted = changed(config, student=tiny.teacher, sort_by="nll_transfer", split="train", limit=9, beta=1.0)
    listener = Listener()
    report = compare_teachers.run([tiny.teacher_st, tiny.teacher], wanted, listener)
    values = [entry["measures"]["nll_transfer"]["value"] for entry in report["candidates"]]
    assert values == sorted(values)
    assert (report["data"]["split"], report["data"]["n"]) == ("train", 9)
    itself = next(entry for entry in report["candidates"] if entry["path"] == str(tiny.teacher))
    # On the student's own images its accuracy is that of the student.
    assert itself["measures"]["transfer"]["value"] == report["student"]["adversarial"]
    assert itself["measures"]["natural"]["value"] == report["student"]["natural"]
    assert "has the same weights as the student" in itself["warnings"]
    (pair,) = report["comparisons"]
    assert pair["ranks"] == [1, 2]
    assert pair["difference"] == pytest.approx(values[1] - values[0])


def test_both_files_are_written_and_no_other_is_replaced(
    tiny: Any, config: TeachersConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "a$b$ c" / "out"
    candidate = tmp_path / "run $x^$" / "best.pt"  # no formula in the picture
    candidate.parent.mkdir()
    shutil.copy(tiny.teacher, candidate)
    report = compare_teachers.run([candidate], config, Listener(), folder)
    assert json.loads((folder / "teachers.json").read_text()) == json.loads(json.dumps(report))
    assert report["candidates"][0]["label"] == "run $x^$"
    with Image.open(folder / "teachers.png") as picture:
        assert picture.width == 1000
    assert sorted(path.name for path in folder.iterdir()) == ["teachers.json", "teachers.png"]
    (folder / "teachers.json").unlink()
    with pytest.raises(ValueError, match=r"--out: .*teachers\.png exists already"):
        compare_teachers.run([candidate], config, Listener(), folder)


def test_a_wish_to_stop_writes_nothing(
    tiny: Any, config: TeachersConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stop: Stop) -> None:
        raise Interrupted

    monkeypatch.setattr(Stop, "check", interrupt)
    with pytest.raises(Interrupted, match="nothing was written"):
        compare_teachers.run([tiny.teacher], config, Listener(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_student_that_learns_nothing_finite_is_no_yardstick(
    tiny: Any, config: TeachersConfig, tmp_path: Path
) -> None:
    broken = tmp_path / "huge.pt"
    state = models.build("resnet8", 3).state_dict()
    torch.save({key: value * 1e30 if value.is_floating_point() else value for key, value in state.items()}, broken)
    with pytest.raises(ValueError, match=r"huge\.pt: is no teacher: .* NaN or infinite"):
        compare_teachers.run([broken], config, Listener())
    with pytest.raises(ValueError, match=r"--student: .*huge\.pt: the logits of 18 of 18 images"):
        compare_teachers.run([tiny.teacher], changed(config, student=broken), Listener())


def test_masked_gradients_lower_the_robustness_and_are_told(
    tiny: Any, config: TeachersConfig, tmp_path: Path
) -> None:
    """The last layer times 1e6: no gradient of the cross-entropy is left, and the accuracy is too high."""
    masked = tmp_path / "masked.pt"
    state = load_model(tiny.teacher).module.state_dict()
    head = next(key for key, tensor in state.items() if tensor.dim() == 2)
    state[head] = state[head] * 1e6
    torch.save(state, masked)
    listener = Listener()
    report = compare_teachers.run([masked], changed(config, student=tiny.teacher_st), listener)
    (entry,) = report["candidates"]
    assert set(entry["attacks"]) == {"pgd10", "pgd20-dlr"}
    assert entry["measures"]["robust"]["value"] <= entry["attacks"]["pgd20-dlr"]["accuracy"]
    assert entry["measures"]["robust"]["value"] < entry["attacks"]["pgd10"]["accuracy"]
    assert any(line.startswith(f"Warning: {masked}: pgd10 and pgd20-dlr together") for line in listener.lines)


def test_guessing_is_warned_of(tiny: Any, config: TeachersConfig, tmp_path: Path) -> None:
    foreign = tmp_path / "theirs.pth"
    state = load_model(tiny.teacher).module.state_dict()
    head = next(key for key, tensor in state.items() if tensor.dim() == 2)
    state[head] = torch.zeros_like(state[head])  # one class for all
    torch.save(state, foreign)
    listener = Listener()
    report = compare_teachers.run([foreign], changed(config, student=foreign), listener)
    (entry,) = report["candidates"]
    assert entry["measures"]["natural"]["value"] == pytest.approx(1 / 3)
    assert any(
        "33.33% of 18 images is no better than guessing among 3 classes; if its loader" in line
        for line in listener.lines
    )
    assert any("the student is no better than guessing" in line for line in listener.lines)


def test_normalisation_is_for_those_that_do_not_tell(tiny: Any, config: TeachersConfig, tmp_path: Path) -> None:
    foreign = tmp_path / "theirs.pth"
    torch.save(load_model(tiny.teacher).module.state_dict(), foreign)
    wanted = changed(config, student=tiny.teacher_st, normalize="cifar10")
    report = compare_teachers.run([foreign, tiny.teacher], wanted, Listener())
    notes = {entry["path"]: " ".join(entry["notes"]) for entry in report["candidates"]}
    assert "normalises its images by mean" in notes[str(foreign)]
    assert "normalises" not in notes[str(tiny.teacher)]
    with pytest.raises(ValueError, match="cifar11"):
        compare_teachers.run([foreign], changed(wanted, normalize="cifar11"), Listener())


def test_what_the_candidates_agree_on_is_taken(tiny: Any, tmp_path: Path) -> None:
    loaded = load_model(tiny.teacher)

    def trained(epsilon: float, dataset: str = "digits") -> Any:
        tree = load({"method": "at", "dataset": dataset, "attack": {"epsilon": epsilon}}).tree()
        return vars(loaded) | {"dataset": dataset, "config": tree}

    networks = [type(loaded)(**trained(epsilon)) for epsilon in (0.1, 0.1, 0.2)]
    complete = TeachersConfig().completed(networks[:2])
    assert (complete.dataset, complete.attack.epsilon, complete.attack.step_size) == ("digits", 0.1, 0.05)
    assert (complete.method, complete.attack.num_steps, complete.model) == ("at", 3, "resnet8")
    with pytest.raises(ValueError, match=r"--epsilon: the candidates were trained with 0\.1, 0\.2; name one"):
        TeachersConfig().completed(networks)
    assert TeachersConfig(epsilon="4/255").completed(networks).attack.epsilon == 4 / 255
    others = [*networks[:1], type(loaded)(**trained(0.2, "svhn"))]
    with pytest.raises(ValueError, match="--dataset: the candidates were trained with digits, svhn"):
        TeachersConfig().completed(others)
    assert (
        TeachersConfig(dataset="digits").completed(others).attack.epsilon == 0.1
    )  # the others' is of other images
    foreign = type(loaded)(**vars(loaded) | {"dataset": None, "config": None})
    assert TeachersConfig(dataset="digits").completed([foreign]).attack.epsilon == 8 / 255
    with pytest.raises(ValueError, match="--dataset: no candidate tells"):
        TeachersConfig().completed([foreign])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"sort_by": "acuracy"}, "--sort-by: 'acuracy' is not known"),
        ({"split": "val"}, "--split: 'val' is not known"),
        ({"model": "resnet9"}, "resnet9"),
        ({"beta": -1.0}, "loss.beta"),
        ({"epsilon": "8"}, "attack.epsilon"),
        ({"threat_model": "Linff"}, "attack.threat_model"),
        ({"limit": 0}, "limit"),
        ({"student": Path("none.pt")}, "none.pt"),
    ],
)
def test_wrong_choices_are_refused_in_a_line(
    keys: dict[str, Any], told: str, tiny: Any, config: TeachersConfig
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        compare_teachers.run([tiny.teacher], changed(config, **keys), Listener())
    assert "\n" not in str(caught.value)


def test_other_classes_and_files_that_are_none_are_refused(
    tiny: Any, config: TeachersConfig, tmp_path: Path
) -> None:
    ten = write_checkpoint(tmp_path / "ten.pt", 1, num_classes=10)
    with pytest.raises(ValueError, match=r"ten\.pt: its 10 classes are not the 3 of the data"):
        compare_teachers.run([tiny.teacher, ten], config, Listener())
    (tmp_path / "text.pt").write_text("none")
    with pytest.raises(ValueError, match=r"text\.pt"):
        compare_teachers.run([tmp_path / "text.pt"], config, Listener())


def test_every_measure_has_words_for_the_report() -> None:
    titles = [measure.title for measure in MEASURES.values()]
    assert len(set(titles)) == len(titles)
    assert all(measure.definition and measure.style.format(0.5) for measure in MEASURES.values())

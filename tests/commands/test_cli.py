"""Output and files of the commands where all goes well; what goes wrong is in test_bad_input.py."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import methods, models
from engine.attacks import table
from engine.common.console import Reporter
from engine.common.stopping import Interrupted
from engine.config import recipes
from engine.evaluation import evaluate_checkpoint, reports
from engine.models.weights import load_model
from engine.pipelines.datasets import DATASETS
from engine.runs import lifecycle


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("attacks", [*table.ATTACKS, *table.PATTERNS]),
        ("methods", list(methods.METHODS)),
        ("models", list(models.TABLE)),
        ("datasets", list(DATASETS)),
        ("recipes", recipes.names()),
    ],
)
def test_lists_are_whole(command: str, names: list[str], cli: Any) -> None:
    outcome = cli(command)
    assert outcome.code == 0
    first_words = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    assert [word for word in first_words if word in names] == names


def test_all_of_one_method_is_told(cli: Any) -> None:
    told = cli("methods", "iad2+igdm", "--semantics", "official")
    assert told.code == 0, told.err
    text = " ".join(told.out.split())
    for part in (
        "0.5 (1 - alpha) KL(S(x) || S(x~))",
        "akd2+igdm, 40 of 200 epochs",
        "T_at(x-)",
        "10 steps of 2/255",
    ):
        assert part in text
    wrong = cli("methods", "iad3")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean" in wrong.err


def test_the_paper_s_numbers_stand_beside_the_recipes(cli: Any) -> None:
    (line,) = [line for line in cli("recipes").out.splitlines() if line.split()[:1] == ["table2-cifar10-at-iad1"]]
    assert line.split()[-5:] == ["82.09", "63.20", "52.14", "50.74", "48.66"]


def test_recipes_beyond_the_rows_stand_apart_as_aims(cli: Any) -> None:
    rows, note, aims = cli("recipes").out.partition("aims, not results. None of them was run.")
    assert note
    assert "modern-" not in rows
    for recipe in recipes.modern_recipes():
        (line,) = [line for line in aims.splitlines() if line.split()[:1] == [recipe.name]]
        assert f"{recipe.marks[recipe.aims[0]].accuracies['aa']:.2f}" in line


def test_train_then_eval(tiny: Any, cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = cli(*tiny.flags(method="iad1", out=str(run), attack={"epsilon": 0.1}))
    assert trained.code == 0, trained.err
    assert f"teacher: resnet8, {78042 - 7 * 65:,} parameters" in trained.out  # of 3 classes, not 10
    assert "selected on test" in trained.out
    assert str(run / "summary.json") in trained.out

    found = cli(
        "eval", str(run), str(tiny.teacher), "--attacks", "natural,pgd10,pgd10", "--data", str(tiny.folder)
    )
    assert found.code == 0, found.err
    report = {result["attack"]: result for result in reports.read(run / "best.pt.eval.json")}
    summary = json.loads((run / "summary.json").read_text())
    assert list(report) == ["natural", "pgd10"]
    # As after training: same images, same epsilon, same seed.
    for attack in ("natural", "pgd10"):
        assert report[attack]["correct"] == summary["test_of_best"][attack]["correct"]
    assert "epsilon 25.5/255" in report["pgd10"]["description"]
    assert "n = 18" in found.out
    assert report["pgd10"]["precision"]["evaluation"] == "float32, TF32 off"
    reports.path_of(tiny.teacher, None).unlink()

    other = cli(
        "eval", str(run), "--attacks", "pgd10", "--epsilon", "2/255", "--limit", "9", "--out", str(tmp_path)
    )
    assert other.code == 0, other.err
    (path,) = tmp_path.glob("run-best.pt-*.eval.json")
    (result,) = reports.read(path)
    assert (result["n"], "epsilon 2/255" in result["description"]) == (9, True)


def test_a_foreign_checkpoint_is_evaluated(tiny: Any, cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    state = models.build("resnet8", 3).state_dict()
    torch.save({"net": {f"module.{key}": value for key, value in state.items()}}, path)
    outcome = cli("eval", str(path), "--dataset", "folder", "--data", str(tiny.folder), "--attacks", "natural")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "theirs.pth.eval.json").exists()


def test_evaluations_accumulate(tiny: Any, cli: Any, tmp_path: Path) -> None:
    """By every parameter; the same one replaces itself and says so; nothing else is left in the folder."""
    path = tmp_path / "m.pt"
    shutil.copy(tiny.teacher, path)
    where = ["--dataset", "folder", "--data", str(tiny.folder)]
    calls = [
        ["--attacks", "natural,pgd10"], ["--attacks", "pgd10", "--epsilon", "4/255"],
        ["--attacks", "pgd10", "--seed", "1"], ["--attacks", "pgd10", "--limit", "6"],
        ["--attacks", "natural,fgsm"],
    ]  # fmt: skip
    said = ""
    for call in calls:
        outcome = cli("eval", str(path), *where, *call)
        assert outcome.code == 0, outcome.err
        said += outcome.out
    found = reports.read(tmp_path / "m.pt.eval.json")
    assert [entry["attack"] for entry in found] == ["pgd10", "pgd10", "pgd10", "pgd10", "natural", "fgsm"]
    assert [entry["n"] for entry in found] == [18, 18, 18, 6, 18, 18]
    assert said.count("Replaced the result of natural") == said.count("Replaced the result") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"m.pt", "m.pt.eval.json"}


def test_the_size_of_views_is_part_of_what_is_noted(tiny: Any, cli: Any, tmp_path: Path) -> None:
    """An evaluation that was stopped with views of one size does not lend its numbers to one of another size."""
    path = tmp_path / "m.pt"
    shutil.copy(tiny.teacher, path)
    call = ["eval", str(path), "--dataset", "folder", "--data", str(tiny.folder), "--attacks", "natural,pgd10"]

    class Stops(Reporter):
        def begin(self, what: str, total: int, done: int = 0) -> None:
            if what.startswith("PGD-10"):
                raise Interrupted

    wanted = evaluate_checkpoint.EvaluationConfig(
        ["natural", "pgd10"], dataset="folder", data=str(tiny.folder), image_size=16
    )
    with pytest.raises(Interrupted):
        evaluate_checkpoint.run(path, wanted, Stops(), out=tmp_path / "m.pt.eval.json")
    (kept,) = (tmp_path / "m.pt.eval.partial").glob("*/*.jsonl")
    fresh = cli(*call, "--image-size", "32", "--out", str(tmp_path / "elsewhere"))
    outcome = cli(*call, "--image-size", "32")
    assert outcome.code == 0, outcome.err
    assert kept.exists()
    assert "has notes of 1 attacks with other settings" in outcome.out
    (elsewhere,) = (tmp_path / "elsewhere").glob("*.json")
    for here, there in zip(reports.read(tmp_path / "m.pt.eval.json"), reports.read(elsewhere), strict=True):
        assert (here["correct"], here["parameters"]) == (there["correct"], there["parameters"])
    assert fresh.code == 0
    assert cli(*call, "--image-size", "16").code == 0
    assert not kept.parent.parent.exists()


def test_a_path_is_no_markup(tiny: Any, cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "[red]x[/red]" / "..[" / "italic]"
    folder.mkdir(parents=True)
    shutil.copy(tiny.teacher, folder / "[x]..[")
    outcome = cli(
        "eval", str(folder / "[x]..["), "--dataset", "folder", "--data", str(tiny.folder), "--attacks", "natural"
    )
    assert outcome.code == 0, outcome.err
    assert str(folder / "[x]..[") in outcome.out


def test_what_eval_cannot_look_up_is_one_line(cli: Any, tmp_path: Path) -> None:
    outcome = cli("eval", str(tmp_path / ("x" * 300)))
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert "File name too long" in line


def test_a_damaged_report_is_told_of_before_the_attacks(tiny: Any, cli: Any, tmp_path: Path) -> None:
    shutil.copy(tiny.teacher, tmp_path / "m.pt")
    (tmp_path / "m.pt.eval.json").write_text("{")
    outcome = cli("eval", str(tmp_path / "m.pt"), "--dataset", "folder", "--data", str(tiny.folder))
    assert outcome.code == 2
    assert "m.pt.eval.json is damaged: it is not valid JSON; move it away" in outcome.err
    assert {file.name for file in tmp_path.iterdir()} == {"m.pt", "m.pt.eval.json"}


def test_an_attack_that_few_classes_do_not_define_leaves_nothing(tiny: Any, cli: Any, tmp_path: Path) -> None:
    shutil.copy(tiny.teacher, tmp_path / "m.pt")
    outcome = cli(
        "eval",
        str(tmp_path / "m.pt"),
        "--dataset",
        "folder",
        "--data",
        str(tiny.folder),
        "--attacks",
        "natural,apgd-t",
    )
    assert outcome.code == 2
    assert "apgd-t: needs 4 classes, and the model has 3; defined: natural, fgsm," in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


def test_a_masked_network_gets_another_attack(tiny: Any, cli: Any, tmp_path: Path) -> None:
    state = load_model(tiny.teacher).module.state_dict()
    for name, factor in (("plain.pt", 1), ("large.pt", 1e9)):
        head = {key: value * factor for key, value in state.items() if key.startswith("linear")}
        torch.save(state | head, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("plain.pt", "large.pt")]
    outcome = cli("eval", *paths, "--dataset", "folder", "--data", str(tiny.folder), "--attacks", "natural,pgd20")
    assert outcome.code == 0, outcome.err
    plain, large = (
        {entry["attack"]: entry for entry in reports.read(Path(f"{path}.eval.json"))} for path in paths
    )
    assert list(plain) == ["natural", "pgd20"]
    assert list(large) == ["natural", "pgd20", "pgd20-dlr"]
    assert plain["pgd20"]["warnings"] == []
    assert large["pgd20"]["masked"] > 0
    assert f"{large['pgd20']['accuracy']:.2%}*" in outcome.out
    assert "* may be too high: see the warnings" in outcome.out
    assert "gradients were zero, so PGD-20 DLR is measured too" in outcome.out


def test_logits_that_are_not_finite_end_an_evaluation(tiny: Any, cli: Any, tmp_path: Path) -> None:
    state = load_model(tiny.teacher).module.state_dict()
    norms = {key: value * 1e25 for key, value in state.items() if value.ndim == 1 and key.endswith(".weight")}
    torch.save(state | norms, tmp_path / "m.pt")
    outcome = cli("eval", str(tmp_path / "m.pt"), "--dataset", "folder", "--data", str(tiny.folder))
    assert outcome.code == 1
    (line,) = outcome.err.strip().splitlines()
    assert "m.pt: natural: the logits of 18 of 18 images are NaN or infinite; no result" in line
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


def test_overrides_of_a_file(tiny: Any, cli: Any, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny.config(method="st", epochs=5)))
    run = tmp_path / "run"
    outcome = cli(
        "train", "--config", str(tmp_path / "mine.yaml"), "--epochs", "1", "--set", "seed=3", "--out", str(run)
    )
    assert outcome.code == 0, outcome.err
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert (resolved["epochs"], resolved["seed"], resolved["method"]) == (1, 3, "st")


def test_a_recipe_runs(tiny: Any, cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = tiny.flags(out=str(run), eval={"final": ["natural"]}, loss={"warmup": "60/200"})[1:]
    outcome = cli("train", "--config", "recipe:table9-iad1-gamma2", *sets)
    assert outcome.code == 0, outcome.err
    assert "selected on test" in outcome.out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows if row["event"] == "epoch"] == ["ard", "iad1"]


def test_the_paper_s_row_is_named(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults are CIFAR-10's and ResNet-18's; of other rows the paper has other settings."""
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path))
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]  # no data: the run ends there
    named = cli("train", "--method", "iad2", "--dataset", "cifar100", "--set", "teacher.method=trades", *where)
    assert "--config recipe:table2-cifar100-trades-iad2" in named.out
    assert "recipe" not in cli("train", "--method", "iad2", "--dataset", "svhn", *where).out


def test_the_teacher_of_a_recipe_is_named(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is trained on the way lacks components of its recipe, and a line tells which."""
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path))
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--set", "winograd=off"]
    told = " ".join(cli("train", "--config", "recipe:modern-rn18-iad1", *where).out.split())
    assert "--config recipe:modern-rn18-at: --teacher DIR" in told
    assert "without averaged weights, AWP, label smoothing." in told
    given = cli("train", "--config", "recipe:modern-rn18-iad1", "--teacher", "x.pt", *where)
    assert "modern-rn18-at" not in given.out
    assert "modern-rn18-at" not in cli("train", "--config", "recipe:modern-rn18-at", *where).out


def test_plain_lines_without_a_terminal(tiny: Any, cli: Any, tmp_path: Path) -> None:
    outcome = cli(*tiny.flags(method="at", out=str(tmp_path / "run")))
    lines = [line for line in outcome.out.splitlines() if line.startswith("student: epoch ")]
    assert [line.split(":")[1] for line in lines] == [" epoch 1/2", " epoch 2/2"]
    for word in ("loss", "natural", "PGD-10", "of 18 test images", "images/s"):
        assert all(word in line for line in lines)
    assert "\x1b" not in outcome.out


def test_a_progress_bar_on_a_terminal(tiny: Any, tmp_path: Path) -> None:
    """In a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "engine", *tiny.flags(method="at", epochs=3, out=str(tmp_path / "run"))]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=120) == 0
    text = shown.decode(errors="replace")
    for word in ("━", "18/18", "ETA", "images/s", "loss", "PGD-10", "epoch 3/3"):
        assert word in text


def test_engine_train_needs_no_reporter(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = lifecycle.train(tiny.config(method="st", epochs=1, out=str(tmp_path / "run")))
    assert result.summary["last"]["epoch"] == 1
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_flags_are_taken_as_they_are(tiny: Any, cli: Any, tmp_path: Path) -> None:
    """Not as YAML: a # or a colon is part of a path."""
    run = tmp_path / "a #b: 2024"
    outcome = cli(*tiny.flags(method="st", epochs=1), "--out", str(run))
    assert outcome.code == 0, outcome.err
    assert (run / "summary.json").exists()


def test_no_command_shows_the_help(cli: Any) -> None:
    outcome = cli()
    assert outcome.code == 2
    assert "Commands:" in outcome.out
    assert outcome.err == ""


def test_a_run_outlives_its_reader(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "engine", *tiny.flags(method="at", epochs=3, out=str(run))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert (run / "summary.json").exists()


def test_python_m_engine() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "engine", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("engine 0.")

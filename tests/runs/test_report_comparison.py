"""The report's comparison: seeds as one line, and no claim that the numbers do not carry."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from engine.config import recipes
from engine.runs.reporting import html_report
from engine.runs.reporting.comparison import comparison, headline
from engine.runs.reporting.curves import points_of
from engine.runs.reporting.lines import ComparedLine, lines_of, runs_of, teachers_of
from engine.runs.reporting.paper_rows import beside_paper, costs
from engine.runs.reporting.reading import RunFiles, eval_file
from engine.runs.reporting.tables import Number, Percent, ReportTable
from tests.runs.made_runs import entry, made_run, result, write_report


def lines(*paths: Path) -> list[ComparedLine]:
    runs = [RunFiles(path) for given in paths for path in runs_of(given)]
    teachers = [teacher for run in runs for teacher in teachers_of(run)]
    return lines_of([*runs, *teachers], [])


def accuracies(pgd20: float, n: int = 10_000, **others: float) -> dict[str, Any]:
    return {"natural": result(0.8, n), "pgd20": result(pgd20, n)} | {
        name: result(value, n) for name, value in others.items()
    }


def cells(table: ReportTable, column: str) -> list[Any]:
    return [row[list(table.head).index(column)] for row in table.rows]


PGD = "PGD-20\nn = 10,000\nL-inf epsilon 8/255"


def test_seeds_are_one_line_with_mean_and_deviation(tmp_path: Path) -> None:
    values = [0.51, 0.52, 0.545]
    for seed, value in enumerate(values):
        made_run(tmp_path / "group" / f"seed-{seed}", seed=seed, shift=seed / 100, tested=accuracies(value))
    made_run(tmp_path / "other", method="ard", tested=accuracies(0.5))
    group, _ = found = lines(tmp_path / "group", tmp_path / "other")
    assert group.path == tmp_path / "group"
    section = comparison(found)
    main, of_seeds = section.tables
    mean, single = cells(main, PGD)
    assert isinstance(mean, Percent)
    assert mean.value == pytest.approx(sum(values) / 3)
    deviation = math.sqrt(sum((value - sum(values) / 3) ** 2 for value in values) / 2)
    assert mean.deviation == pytest.approx(deviation)
    assert mean.seeds == 3
    assert single.deviation is None
    assert [cell.value for cell in cells(of_seeds, PGD)] == values
    assert "<details><summary>Each of the 3 seeds" in "".join(section.parts)
    rows = [run.epochs for run in group.runs]
    for index, (epoch, average, spread) in enumerate(points_of(group, "robust_accuracy")):
        of_epoch = [of_run[index]["robust_accuracy"] for of_run in rows]
        assert epoch == index + 1
        assert average == pytest.approx(statistics.mean(of_epoch))
        assert spread == pytest.approx(statistics.stdev(of_epoch))


@pytest.mark.parametrize(
    "keys",
    [{"epochs": 4}, {"lr": 0.05}, {"seed": 0}, {"attack": {"epsilon": 4 / 255}}],
    ids=["epochs", "learning rate", "the same seed", "epsilon"],
)
def test_other_runs_are_no_seeds(keys: dict[str, Any], tmp_path: Path) -> None:
    made_run(tmp_path / "a", seed=0, tested=accuracies(0.5))
    others: dict[str, Any] = {"seed": 1, "tested": accuracies(0.52)}
    made_run(tmp_path / "b", **(others | keys))
    found = lines(tmp_path / "a", tmp_path / "b")
    assert [line.is_group for line in found] == [False, False]
    assert len({line.label for line in found}) == 2


def test_a_seed_without_a_number_leaves_no_mean(tmp_path: Path) -> None:
    made_run(tmp_path / "seed-0", seed=0, tested=accuracies(0.5, aa=0.45))
    made_run(tmp_path / "seed-1", seed=1, tested=accuracies(0.52))
    (line,) = lines(tmp_path)
    main = comparison([line]).tables[0]
    assert cells(main, PGD.replace("PGD-20", "AA")) == ["in 1 of 2 seeds"]
    assert "51.00% ± 1.41" in headline([line])[0]


def test_without_test_results_the_images_that_chose_the_epoch_are_named(tmp_path: Path) -> None:
    made_run(tmp_path / "run", shift=0.05)  # 0.2 + 0.35 + 0.05
    (said,) = headline(lines(tmp_path / "run"))
    assert (
        "robust accuracy 60.00% (95% interval 55.6 to 64.2%), PGD-10 on cifar10 validation images, n = 500" in said
    )
    heads = comparison(lines(tmp_path / "run")).tables[0].head
    assert "PGD-10\nvalidation images\nn = 500\nL-inf epsilon 8/255" in heads


def test_what_is_not_finished_is_said(tmp_path: Path) -> None:
    made_run(tmp_path / "seed-0", seed=0, tested=accuracies(0.5))
    made_run(tmp_path / "seed-1", seed=1, finished=False)
    group = lines(tmp_path)
    (said,) = headline(group)
    assert said.endswith("1 of 2 seeds are not finished.")
    assert "Not finished: iad1, resnet8." in "".join(comparison(group).parts)
    (said,) = headline(lines(tmp_path / "seed-1"))
    assert said.endswith("it is not finished: 2 of 3 epochs so far.")


def test_the_headline_of_a_run(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tested=accuracies(0.52, aa=0.48))
    (said,) = headline(lines(tmp_path / "run"))
    # Wilson's interval of 4,800 of 10,000 by hand: (p + z^2/2n +- z sqrt(p q/n + z^2/4n^2)) / (1 + z^2/n)
    assert said.startswith(
        "iad1 trained resnet8 on cifar10 (3 epochs): robust accuracy 48.00% (95% interval 47.0 to 49.0%), AA on "
        "cifar10 test images, n = 10,000, L-inf epsilon 8/255; best epoch 3, selected on validation images."
    )


def test_of_equal_accuracies_the_stronger_attack_is_told(tmp_path: Path) -> None:
    of_run = {name: result(0.0, 100) for name in ("fgsm", "pgd10", "pgd20", "natural")}
    (said,) = headline(lines(made_run(tmp_path / "run", tested=of_run)))
    assert "0.00% (95% interval 0.0 to 3.7%), PGD-20 on" in said


def test_an_attack_on_few_images_is_said_beside_the_one_on_many(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", tested=accuracies(0.52))
    write_report(run / "best.pt.eval.json", entry("aa", 0.4, 20))
    (said,) = headline(lines(run))
    assert "robust accuracy 52.00%" in said
    assert "lower: 40.00% (95% interval 21.9 to 61.3%), AA on cifar10 test images, n = 20" in said


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (accuracies(0.50), "2.00 points less, and the intervals do not overlap"),
        (accuracies(0.515), "The intervals overlap: these numbers show no difference"),
        (accuracies(0.3, n=1000), "no attack was measured on all of them with the same data, n and epsilon"),
        (None, "no attack was measured on all of them"),
    ],
    ids=["apart", "near", "another n", "not tested"],
)
def test_a_difference_is_claimed_beyond_the_intervals_alone(
    other: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    made_run(tmp_path / "a", tested=accuracies(0.52))
    made_run(tmp_path / "b", method="ard", tested=other)
    said, *others = headline(lines(tmp_path / "b", tmp_path / "a"))
    assert words in said
    assert len(others) == 2 * ("no attack" in said)
    assert ("iad1, resnet8 has the highest" in said) == ("no attack" not in said)


@pytest.mark.parametrize("keys", [{"attack": {"epsilon": 4 / 255}}, {"dataset": "cifar100"}])
def test_what_differs_in_epsilon_or_data_is_not_compared(keys: dict[str, Any], tmp_path: Path) -> None:
    made_run(tmp_path / "a", tested=accuracies(0.52))
    made_run(tmp_path / "b", tested=accuracies(0.7), **keys)
    said, first, second = headline(lines(tmp_path / "a", tmp_path / "b"))
    assert "none is called the best" in said
    assert "52.00%" in first
    assert "70.00%" in second
    table = comparison(lines(tmp_path / "a", tmp_path / "b")).tables[0]
    filled = [[cell for cell in cells(table, head) if cell] for head in table.head if head.startswith("PGD-20")]
    assert [len(column) for column in filled] == [1, 1]  # no column holds both


def test_an_accuracy_that_was_measured_twice_is_the_lowest_and_no_mean(tmp_path: Path) -> None:
    file = write_report(tmp_path / "x.pt.eval.json", entry("pgd20", 0.5, 1000), entry("pgd20", 0.4, 1000))
    (said,) = headline(lines_of([], [eval_file(file)]))
    assert said.startswith(f"The checkpoint {tmp_path / 'x.pt'}: robust accuracy 40.00%")
    # Chosen on the test images under the attack of the end: the end's number, in full precision.
    made_run(tmp_path / "run", tested={"pgd10": result(0.5, 500)}, measured_on="test")
    (said,) = headline(lines(tmp_path / "run"))
    assert "robust accuracy 50.00%" in said
    assert said.endswith("selected on test images, so that it tends to be too high.")


def test_teachers_of_seeds_are_one_line(tmp_path: Path) -> None:
    for seed in (0, 1):
        path = made_run(tmp_path / "group" / f"seed-{seed}", seed=seed, tested=accuracies(0.5 + seed / 100))
        made_run(path / "teacher", method="at", seed=seed + 1, tested=accuracies(0.4 + seed / 50))
    student, teacher = lines(tmp_path / "group")
    assert (student.path, teacher.path) == (tmp_path / "group", tmp_path / "group")
    assert teacher.label == "at, resnet8, teacher of group"
    assert headline([student, teacher])[1].startswith("Its teacher: 41.00% ± 1.41 (mean and")


def test_student_and_teacher(tmp_path: Path) -> None:
    student = made_run(tmp_path / "run", tested=accuracies(0.52))
    made_run(student / "teacher", method="at", seed=1, tested=accuracies(0.5))
    found = lines(student)
    assert [line.label for line in found] == ["iad1, resnet8", "at, resnet8, teacher of run"]
    _, beside = headline(found)
    assert beside.startswith("Its teacher: 50.00% (95% interval 49.0 to 51.0%), PGD-20")
    assert "overlap" not in beside


def test_columns_are_of_one_n_and_one_epsilon(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", tested=accuracies(0.52))
    half = {"epsilon": 4 / 255, "threat_model": "Linf"}
    write_report(
        run / "best.pt.eval.json", entry("pgd20", 0.6, 10_000, parameters=half), entry("pgd20", 0.55, 1000),
        entry("pgd20", 0.5, 10_000, images={"samples": [1], "correct": "1"}),
        entry("pgd20", 0.1, 10_000, options={"weights": "averaged"}),
    )  # fmt: skip
    table = comparison(lines(run)).tables[0]
    shown = {head: cells(table, head)[0] for head in table.head if head.startswith("PGD")}
    assert {head.replace("\n", ", "): cell.text for head, cell in shown.items()} == {
        "PGD-20, n = 10,000, L-inf epsilon 8/255": "50.00%",  # the lowest of the two
        "PGD-20, n = 10,000, L-inf epsilon 4/255": "60.00%",
        "PGD-20, n = 1,000, L-inf epsilon 8/255": "55.00%",
    }


def test_results_of_an_earlier_checkpoint_are_compared_nowhere(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", tested=accuracies(0.52))
    (run / "best.pt").write_bytes(b"as it is now")
    now = hashlib.sha256(b"as it is now").hexdigest()
    file = write_report(
        run / "best.pt.eval.json",
        entry("aa", 0.2, 10_000, checkpoint={"sha256": "0" * 64}, started="2027"),
        entry("aa", 0.47, 10_000, checkpoint={"sha256": now}, started="2026"),
    )
    assert eval_file(file).earlier == {0}
    (cell,) = cells(comparison(lines(run)).tables[0], PGD.replace("PGD-20", "AA"))
    assert cell.text == "47.00%"


RECIPE = "table2-cifar10-at-iad1"


def test_a_run_of_a_recipe_stands_beside_the_paper(tmp_path: Path) -> None:
    recipe = recipes.get(RECIPE)
    keys = recipe.config | {"epochs": 200}
    run = made_run(tmp_path / "equal", tested=accuracies(0.53, fgsm=0.6), **keys)
    made_run(
        tmp_path / "shorter", tested=accuracies(0.4),
        command=("engine", "train", "--config", f"recipe:{RECIPE}", "--epochs", "5"), **(keys | {"epochs": 5}),
    )  # fmt: skip
    made_run(tmp_path / "other", tested=accuracies(0.4), method="ard")
    section = beside_paper(lines(run, tmp_path / "shorter", tmp_path / "other"))
    assert section is not None
    (table,) = section.tables
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    pgd = rows["iad1, resnet18, 200 epochs", "PGD-20, L-inf epsilon 8/255"]
    assert [cell.text if isinstance(cell, Percent | Number) else cell for cell in pgd] == [
        "53.00%", 10_000, "52.14%", "+0.86", f"{53 / 52.14:.3f}",
    ]  # fmt: skip
    assert rows["iad1, resnet18, 200 epochs", "AA"][0] == "not measured"
    assert {label for label, _ in rows} == {"iad1, resnet18, 200 epochs", "iad1, resnet18, 5 epochs"}
    text = "".join(section.parts)
    assert "epochs 5, there 200" in text
    assert text.count("no reproduction") == 1
    assert beside_paper(lines(tmp_path / "other")) is None


def test_an_aim_is_no_result_of_the_paper(tmp_path: Path) -> None:
    """A run of a recipe beyond the paper's rows stands beside nothing, whatever the recipe aims at."""
    recipe = recipes.modern_recipe("modern-rn18-iad1")
    run = made_run(
        tmp_path / "run", tested=accuracies(0.53),
        command=("engine", "train", "--config", f"recipe:{recipe.name}"), **recipe.run_keys(),
    )  # fmt: skip
    assert beside_paper(lines(run)) is None


def test_the_columns_of_table_14(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", shift=0.3, model="resnet18")
    section = costs(lines(run))
    assert section is not None
    (row,) = section.tables[0].rows
    assert [cell.text if isinstance(cell, Number) else cell for cell in row] == [
        "iad1, resnet18", "cpu", "2.30", "300", "process", 182.01, 3977,
    ]  # fmt: skip
    other = costs(lines(made_run(tmp_path / "other")))  # of a network that the paper's table has not
    assert other is not None
    assert not any("paper" in name for name in other.tables[0].head)


def test_groups_and_reports_by_the_command(tmp_path: Path, cli: Any) -> None:
    for seed in (0, 1):
        made_run(tmp_path / "group" / f"seed-{seed}", seed=seed, tested=accuracies(0.5 + seed / 100))
    report = write_report(tmp_path / "best.pt.eval.json", entry("aa", 0.5, 1000))
    out, folder = tmp_path / "report.html", tmp_path / "tables"
    outcome = cli(
        "report", str(tmp_path / "group"), str(tmp_path / "group" / "seed-0"), str(report),
        "--out", str(out), "--tables", str(folder),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    text = out.read_text()
    assert text.count("seed-0</summary>") == 1  # given twice, shown once
    assert len((folder / "runs-compared.csv").read_text().splitlines()) == 3
    assert f"Evaluations, {report}" in text
    names = {path.name for path in folder.iterdir()}
    assert {"runs-compared.csv", "runs-compared.tex", "time-and-memory.csv", "seeds-group.csv"} <= names
    assert "50.5" in (folder / "runs-compared.csv").read_text()
    (tmp_path / "file").write_text("")
    outcome = cli("report", str(report), "--out", str(out), "--tables", str(tmp_path / "file" / "tables"))
    assert (outcome.code, "--tables: cannot write" in outcome.err) == (2, True)


def test_many_epochs_are_folded(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", epochs=200, tested=accuracies(0.5))
    summary = json.loads((run / "summary.json").read_text())
    summary["best"] |= {"epoch": 173}
    (run / "summary.json").write_text(json.dumps(summary))
    html_report.write([run], tmp_path / "report.html")
    shown, _, folded = (tmp_path / "report.html").read_text().partition("<summary>All 200 epochs</summary>")
    epochs = shown.rpartition("<tbody>")[2]
    assert epochs.count("<tr>") == 12
    assert all(f'<td class="number">{epoch}</td>' in epochs for epoch in (1, 20, 173, 200))
    assert folded.partition("</table>")[0].count("<tr>") == 201

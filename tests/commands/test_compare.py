"""`engine compare`: reports of real evaluations, and written ones with known verdicts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from engine.evaluation import reports
from engine.evaluation.files.verdicts import matches, read_subject
from engine.evaluation.measure import evaluate
from engine.evaluation.statistics.intervals import holm
from engine.models.weights import load_model
from engine.pipelines import datasets
from engine.pipelines.splits import Request

N = 40


def entry(checkpoint: Path, correct: str, attack: str = "pgd20", **changes: Any) -> dict[str, Any]:
    """A result in a report, with those verdicts."""
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    parameters = {"attack": attack, "n": len(correct), "epsilon": 0.1, "seed": 0, "data": "d" * 64}
    parameters |= {"checkpoint": sha256, "weights": sha256, "model": "resnet8", "engine": "0.1.0", "torch": "2.14"}
    return {
        "attack": attack, "n": len(correct), "correct": correct.count("1"),
        "accuracy": correct.count("1") / len(correct), "description": "PGD as told", "warnings": [],
        "checkpoint": {"path": str(checkpoint), "sha256": sha256},
        "images": {"samples": list(range(len(correct))), "correct": correct}, "parameters": parameters | changes,
        "options": {"limit": 40, "epsilon": "8/255", "seed": 0, "normalize": [[0.5] * 3, [0.25] * 3]},
    }  # fmt: skip


def network(path: Path, *results: tuple[str, dict[str, Any]]) -> str:
    """A checkpoint with a report of such results beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())
    reports.add(reports.path_of(path, None), [entry(path, correct, **changes) for correct, changes in results])
    return str(path)


def group(path: Path, verdicts: Sequence[str], seeds: Sequence[int]) -> str:
    """A group of finished runs, each with a report."""
    for seed, correct in zip(seeds, verdicts, strict=True):
        run = path / f"seed-{seed}"
        network(run / "best.pt", (correct, {}))
        (run / "config.yaml").write_text("seed: 0\n")
        (run / "summary.json").write_text("{}")
    return str(path)


def compared(cli: Any, folder: Path, *names: str) -> tuple[dict[str, Any], str]:
    """JSON and output of a comparison."""
    outcome = cli("compare", *names, "--json", str(folder / "compared.json"))
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads((folder / "compared.json").read_text())
    return found, outcome.out


def bits(share: float, seed: int) -> str:
    hardness_N = np.random.default_rng(0).random(N) + 0.2 * np.random.default_rng(seed).standard_normal(N)
    return "".join("01"[int(hard < share)] for hard in hardness_N)


# ---------------------------------------------------------------- real evaluations


def test_reports_have_the_verdicts_and_two_networks_are_compared_by_them(
    tiny: Any, tmp_path: Path, cli: Any
) -> None:
    paths = []
    for name, checkpoint in (("a.pt", tiny.teacher), ("b.pt", tiny.teacher_st)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(checkpoint.read_bytes())
    data = ("--dataset", "folder", "--data", str(tiny.folder))
    outcome = cli("eval", *map(str, paths), *data, "--attacks", "natural,fgsm", "--limit", "15")
    assert outcome.code == 0, outcome.err
    found, printed = compared(cli, tmp_path, *map(str, paths))
    images = datasets.find("folder", str(tiny.folder), Request(limit_test=15, only_test=True)).test
    theirs = [evaluate(load_model(path).module, images, ["natural", "fgsm"]) for path in paths]
    p_values = []
    for row in found["comparisons"]:
        a, b = (results[row["attack"]].verdicts for results in theirs)
        (written,) = [
            each for each in reports.read(Path(f"{paths[0]}.eval.json")) if each["attack"] == row["attack"]
        ]
        assert written["images"]["samples"] == list(range(15))
        assert written["images"]["correct"] == "".join(map(str, a.int().tolist()))
        only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
        assert (row["only_a"], row["only_b"], row["n"]) == (only_a, only_b, 15)
        assert row["difference"] == pytest.approx((only_a - only_b) / 15)
        p_values.append(stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0)
        assert row["sentence"] in printed
    assert [row["attack"] for row in found["comparisons"]] == ["natural", "fgsm"]
    assert [row["p_value"] for row in found["comparisons"]] == pytest.approx(p_values)
    assert [row["p_value_holm"] for row in found["comparisons"]] == pytest.approx(holm(p_values))
    assert found["not_compared"] == []


# ---------------------------------------------------------------- sentences


def test_a_difference_is_told_in_a_sentence(tmp_path: Path, cli: Any) -> None:
    a = network(tmp_path / "a.pt", ("1" * 30 + "0" * 10, {}))
    b = network(tmp_path / "b.pt", ("1" * 15 + "0" * 25, {}))
    found, printed = compared(cli, tmp_path, b, a)
    (row,) = found["comparisons"]
    low, high = (-100 * bound for bound in reversed(row["interval"]))
    assert row["sentence"] == f"PGD-20: B is better than A by 37.50 points ({low:.2f} to {high:.2f}), n = 40"
    assert 20 < low < 37.5 < high < 55
    assert row["p_value"] == pytest.approx(2 * 0.5**15)
    assert "37.50" in printed
    assert "Warning: one network each: other seeds" in printed


def test_no_difference_is_told_with_the_one_that_would_be(tmp_path: Path, cli: Any) -> None:
    a = network(tmp_path / "a.pt", ("1100" * 10, {}))
    b = network(tmp_path / "b.pt", ("1100" * 9 + "1010", {}))
    found, _ = compared(cli, tmp_path, a, b)
    (row,) = found["comparisons"]
    assert row["sentence"].startswith(
        "PGD-20: no difference can be told (A - B = +0.00, -7.50 to +7.50, n = 40); one of"
    )
    assert f"one of {100 * row['resolvable']:.2f} points would be, with a probability of 80%" in row["sentence"]


def test_groups_of_the_same_seeds_are_paired_and_few_seeds_are_warned_of(tmp_path: Path, cli: Any) -> None:
    verdicts_a, verdicts_b = (
        [bits(share, first + seed) for seed in range(3)] for share, first in ((0.7, 1), (0.5, 5))
    )
    a, b = group(tmp_path / "a", verdicts_a, (0, 1, 10)), group(tmp_path / "b", verdicts_b, (0, 1, 10))
    found, printed = compared(cli, tmp_path, a, b)
    (row,) = found["comparisons"]
    accuracies = [[row.count("1") / N for row in rows] for rows in (verdicts_a, verdicts_b)]
    theirs = stats.ttest_rel(*accuracies)
    assert (row["test"], row["seeds_a"], row["seeds_b"]) == ("paired t", 3, 3)
    assert row["p_value"] == pytest.approx(theirs.pvalue)
    assert row["interval"] == pytest.approx([*theirs.confidence_interval()])
    assert found["networks"][0]["seeds"] == [0, 1, 10]
    assert "the spread of fewer than 3" not in printed
    (tmp_path / "compared.json").unlink()
    other = group(tmp_path / "other", verdicts_b[:2], (0, 1))
    found, printed = compared(cli, tmp_path, a, other)
    theirs = stats.ttest_ind(accuracies[0], accuracies[1][:2], equal_var=False)
    assert found["comparisons"][0]["test"] == "welch"
    assert found["comparisons"][0]["p_value"] == pytest.approx(theirs.pvalue)
    assert "Warning: B has 2 seeds: the spread of fewer than 3 is hardly known" in printed


def test_three_networks_make_three_pairs_adjusted_together(tmp_path: Path, cli: Any) -> None:
    names = [
        network(tmp_path / f"{name}.pt", (bits(share, 1), {}))
        for name, share in zip("abc", (0.8, 0.6, 0.3), strict=True)
    ]
    found, _ = compared(cli, tmp_path, *names)
    rows = found["comparisons"]
    assert [(row["a"], row["b"]) for row in rows] == [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[1], names[2]),
    ]
    assert [row["p_value_holm"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))


# ---------------------------------------------------------------- what is not compared


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epsilon": 0.2}, "pgd20: not compared: epsilon is 0.1 in A and 0.2 in B"),
        ({"seed": 1}, "pgd20: not compared: seed is 0 in A and 1 in B"),
        ({"data": "e" * 64}, "pgd20: not compared: data is dddddddddddd in A and eeeeeeeeeeee in B"),
        ({"threat_model": "L2"}, "pgd20: not compared: threat_model is not given in A and L2 in B"),
    ],
)
def test_other_conditions_are_named_and_not_compared(
    changes: dict[str, Any], told: str, tmp_path: Path, cli: Any
) -> None:
    a = network(tmp_path / "a.pt", (bits(0.5, 1), {}))
    b = network(tmp_path / "b.pt", (bits(0.5, 2), changes))
    outcome = cli("compare", a, b)
    assert outcome.code == 2
    assert told in outcome.out
    assert "no two of these were measured under the same attack on the same images" in outcome.err


def test_other_images_of_the_same_data_are_not_compared(tmp_path: Path) -> None:
    a, b = (network(tmp_path / name, ("1010", {})) for name in ("a.pt", "b.pt"))
    report = Path(f"{b}.eval.json")
    report.write_text(report.read_text().replace("[0, 1, 2, 3]", "[0, 1, 2, 9]"))
    found, told = matches(read_subject(a), read_subject(b))
    assert not found
    assert re.fullmatch(r"pgd20: not compared: samples is \w{12} in A and \w{12} in B", told[0])


def test_the_same_conditions_are_compared_and_the_others_named(tmp_path: Path, cli: Any) -> None:
    radii = [(bits(0.5, seed), {"epsilon": radius}) for seed, radius in enumerate((0.1, 0.2, 0.3))]
    a = network(tmp_path / "a.pt", *radii, (bits(0.9, 7), {"attack": "natural"}))
    b = network(tmp_path / "b.pt", *radii[:2], (bits(0.5, 8), {"attack": "fgsm", "torch": "2.11"}))
    found, _ = compared(cli, tmp_path, a, b)
    assert [row["title"] for row in found["comparisons"]] == ["PGD-20 (epsilon 0.1)", "PGD-20 (epsilon 0.2)"]
    assert [row["reason"] for row in found["not_compared"]] == [
        "pgd20: not compared: epsilon is 0.3 in A and 0.1 in B",
        "natural: not compared: only A has it (PGD as told)",
        "fgsm: not compared: only B has it (PGD as told)",
    ]


def test_versions_and_doubts_are_told(tmp_path: Path, cli: Any) -> None:
    a, b = (
        network(tmp_path / "a.pt", (bits(0.5, 1), {})),
        network(tmp_path / "b.pt", (bits(0.4, 1), {"torch": "2.11"})),
    )
    report = Path(f"{a}.eval.json")
    report.write_text(report.read_text().replace('"warnings": []', '"warnings": ["pgd20: masked"]'))
    _, printed = compared(cli, tmp_path, a, b)
    assert "Warning: PGD-20: measured with different values of torch: 2.11, 2.14" in printed
    assert "Warning: A: pgd20: masked" in printed


def test_a_seed_that_was_not_measured_so_leaves_the_attack_out(tmp_path: Path, cli: Any) -> None:
    a = group(tmp_path / "a", [bits(0.5, seed) for seed in range(2)], (0, 1))
    network(tmp_path / "a" / "seed-0" / "best.pt", (bits(0.5, 5), {"attack": "natural"}))
    b = group(tmp_path / "b", [bits(0.5, seed) for seed in range(2, 4)], (0, 1))
    found, _ = compared(cli, tmp_path, a, b)
    assert [row["attack"] for row in found["comparisons"]] == ["pgd20"]
    lacking = f"1 of 2 seeds of A were not measured so: {tmp_path}/a/seed-1/best.pt"
    assert [row["reason"] for row in found["not_compared"]] == [f"natural (PGD as told): not compared: {lacking}"]
    (tmp_path / "a" / "seed-1" / "summary.json").unlink()
    outcome = cli("compare", a, b)
    assert f"Note: {tmp_path}/a/seed-1/best.pt: the training is not finished" in outcome.out


def test_an_older_report_names_the_command_that_measures_again(tmp_path: Path, cli: Any) -> None:
    a, b = (network(tmp_path / name, (bits(0.5, 1), {})) for name in ("a.pt", "b.pt"))
    report = Path(f"{b}.eval.json")
    content = json.loads(report.read_text())
    del content["results"][0]["images"]
    report.write_text(json.dumps(content))
    outcome = cli("compare", a, b)
    assert outcome.code == 2
    assert outcome.err.strip().endswith(
        f"to measure again: engine eval {b} --attacks pgd20 --limit 40 --epsilon 8/255 "
        "--normalize-mean 0.5,0.5,0.5 --normalize-std 0.25,0.25,0.25"
    )
    reports.add(report, [entry(Path(b), bits(0.5, 3), attack="natural")])
    reports.add(Path(f"{a}.eval.json"), [entry(Path(a), bits(0.5, 4), attack="natural")])
    found, printed = compared(cli, tmp_path, a, b)
    assert [row["attack"] for row in found["comparisons"]] == ["natural"]
    assert f"pgd20: no verdicts of images in {report}" in printed


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"correct": 2', '"correct": 3', "is damaged: the verdicts of pgd20 do not fit its numbers"),
        ('"1010"', '"10x0"', "is damaged: the verdicts of pgd20 do not fit its numbers"),
        ("[0, 1, 2, 3]", "[0, 1, 2, 2]", "is damaged: the verdicts of pgd20 do not fit its numbers"),
        ("[0, 1, 2, 3]", "[0, 1, 2]", "is damaged: the verdicts of pgd20 do not fit its numbers"),
        ('"images": {', '"images": null, "was": {', "is damaged: the verdicts of pgd20 do not fit its numbers"),
        ('"format": 2', '"format": 7', "is no report of evaluations"),
    ],
)
def test_a_damaged_report_is_refused(before: str, after: str, complaint: str, tmp_path: Path, cli: Any) -> None:
    a, b = (network(tmp_path / name, ("1010", {})) for name in ("a.pt", "b.pt"))
    report = Path(f"{b}.eval.json")
    assert before in report.read_text()
    report.write_text(report.read_text().replace(before, after))
    outcome = cli("compare", a, b)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert complaint in outcome.err


def test_only_results_of_the_checkpoint_as_it_is_count(tmp_path: Path, cli: Any) -> None:
    a, b = (network(tmp_path / name, ("1010", {})) for name in ("a.pt", "b.pt"))
    Path(b).write_bytes(b"trained on")
    outcome = cli("compare", a, b)
    assert outcome.code == 2
    assert f"{b}.eval.json is of an earlier content of {b}; to measure again: engine eval {b}" in outcome.err
    reports.add(Path(f"{b}.eval.json"), [entry(Path(b), "0000")])
    found, _ = compared(cli, tmp_path, a, f"{b}.eval.json")
    assert found["comparisons"][0]["accuracy_b"] == 0
    Path(b).unlink()
    outcome = cli("compare", a, f"{b}.eval.json")
    assert "is of 2 contents of a checkpoint, which is not at" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.pt"], "two networks or more are expected, got 1"),
        (["a.pt", "a.pt"], "a.pt is given twice"),
        (["a.pt", "none.pt"], "none.pt.eval.json is not there; to measure: engine eval none.pt"),
        (["a.pt", "b.pt", "--json", "b.pt"], "--json: b.pt exists"),
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], complaint: str, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        network(Path(name), ("1010", {}))
    outcome = cli("compare", *arguments)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert complaint in outcome.err


def test_a_long_list_of_images_is_one_line_of_a_report(tmp_path: Path) -> None:
    path = Path(network(tmp_path / "a.pt", ("10" * 5000, {})))
    text = Path(f"{path}.eval.json").read_text()
    assert len(text.splitlines()) < 60
    assert len(text) < 80_000
    assert json.loads(text)["results"][0]["images"]["samples"] == list(range(10_000))
    assert torch.tensor(read_subject(str(path)).networks[0].measured.popitem()[1].verdicts).sum() == 5000  # type: ignore[attr-defined]

"""The leaderboard's entry, of stubbed reports: measured numbers, and nothing invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from engine.commands.evaluate import evaluate as command
from engine.evaluation import evaluate_checkpoint, reports, robustbench
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Report
from engine.evaluation.robustbench import BENCHMARKS, benchmark_of, model_info, parsed
from engine.pipelines import datasets
from engine.pipelines.splits import Split
from tests.conftest import write_checkpoint
from tests.runs.helpers import Listener

CIFAR10 = BENCHMARKS[0]
AA = {"threat_model": "Linf", "epsilon": 8 / 255, "version": "standard"}


def entry(attack: str, correct: int, n: int = 10_000, sha256: str = "a", **parameters: Any) -> dict[str, Any]:
    own = {**(AA if attack == "aa" else {}), "weights": "w", "model": "wrn28-10", "data": "d", **parameters}
    return {
        "attack": attack,
        "correct": correct,
        "n": n,
        "accuracy": correct / n,
        "model": "wrn28-10",
        "checkpoint": {"sha256": sha256},
        "warnings": [],
        "parameters": own,
    }


MEASURED = [entry("natural", 9244), entry("aa", 6731)]


def test_the_entry_is_that_of_the_leaderboard() -> None:
    """As published for Wang et al. (2023), of their numbers."""
    given = parsed(
        [
            "link=https://arxiv.org/abs/2302.04638",
            "name=Better Diffusion Models Further Improve Adversarial Training",
            "authors=Zekai Wang, Tianyu Pang",
            "additional_data=false",
            "venue=ICML 2023",
            "reported=67.31",
            "footnote=a = b",
        ]
    )
    info, missing = model_info(MEASURED, "a", CIFAR10, given)
    assert missing == []
    assert info == {
        "link": "https://arxiv.org/abs/2302.04638",
        "name": "Better Diffusion Models Further Improve Adversarial Training",
        "authors": "Zekai Wang, Tianyu Pang",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "ICML 2023",
        "architecture": "WideResNet-28-10",
        "eps": "8/255",
        "clean_acc": "92.44",
        "reported": "67.31",
        "autoattack_acc": "67.31",
        "footnote": "a = b",
        "unreliable": False,
    }


def test_nothing_is_invented() -> None:
    info, missing = model_info(MEASURED, "a", CIFAR10, {})
    assert missing == ["link", "name", "authors", "additional_data", "venue", "reported"]
    assert [info[key] for key in missing] == ["", "", "", None, "", ""]
    assert "footnote" not in info


def test_warnings_of_autoattack_make_it_unreliable() -> None:
    doubtful = [entry("natural", 9000), entry("aa", 6000) | {"warnings": ["aa: zero gradients"]}]
    assert model_info(doubtful, "a", CIFAR10, {})[0]["unreliable"] is True


def test_of_several_results_the_latest_of_one_network_counts() -> None:
    other = [entry("natural", 1, weights="averaged"), entry("aa", 2, weights="averaged")]
    info, _ = model_info([entry("natural", 5), *MEASURED, *other[:1]], "a", CIFAR10, {})
    assert (info["clean_acc"], info["autoattack_acc"]) == ("92.44", "67.31")
    info, _ = model_info([*MEASURED, *other], "a", CIFAR10, {})
    assert (info["clean_acc"], info["autoattack_acc"]) == ("0.01", "0.02")


@pytest.mark.parametrize(
    "entries",
    [
        [entry("natural", 9244)],
        [entry("aa", 6731)],
        [entry("natural", 9244), entry("pgd20", 7000)],
        [entry("natural", 9244), entry("aa", 671, 1000)],
        [entry("natural", 924, 1000), entry("aa", 6731)],
        [entry("natural", 9244, sha256="b"), entry("aa", 6731)],
        [entry("natural", 9244), entry("aa", 6731, sha256="b")],
        [entry("natural", 9244), entry("aa", 6731, epsilon=4 / 255)],
        [entry("natural", 9244), entry("aa", 6731, threat_model="L2")],
        [entry("natural", 9244), entry("aa", 6731, parts=["no attack", "apgd-ce"])],
        [entry("natural", 9244), entry("aa", 6731, data="e")],
        [entry("natural", 9244), entry("aa", 6731, weights="averaged")],
        [],
    ],
)
def test_what_was_not_measured_is_no_entry(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"^--robustbench-json: natural and aa must be measured on all 10,000"):
        model_info(entries, "a", CIFAR10, {})


@pytest.mark.parametrize(
    ("dataset", "ball", "epsilon"),
    [
        ("cifar10", (8 / 255, "Linf"), "8/255"),
        ("cifar10", (0.5, "L2"), "0.5"),
        ("cifar100", (8 / 255, "Linf"), "8/255"),
    ],
)
def test_leaderboards_are_known_by_data_and_ball(dataset: str, ball: tuple[float, str], epsilon: str) -> None:
    assert benchmark_of(dataset, ball, 10_000).epsilon == epsilon


@pytest.mark.parametrize(
    ("dataset", "ball", "images", "told"),
    [
        (
            "cifar10",
            (4 / 255, "Linf"),
            10_000,
            "there is no leaderboard of cifar10, Linf, epsilon 0.0156863; known: ",
        ),
        ("cifar100", (0.5, "L2"), 10_000, "there is no leaderboard of cifar100, L2"),
        ("svhn", (8 / 255, "Linf"), 26_032, "there is no leaderboard of svhn"),
        ("cifar10", (8 / 255, "Linf"), 9_999, "is of 10,000 test images, and 9,999 are evaluated"),
    ],
)
def test_other_data_have_none(dataset: str, ball: tuple[float, str], images: int, told: str) -> None:
    with pytest.raises(ValueError, match=r"^--robustbench-json: [^\n]+$") as error:
        benchmark_of(dataset, ball, images)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("authors", "key=value is expected, got 'authors'"),
        ("clean_acc=99", "'clean_acc' is not known"),
        ("autoattack_acc=99", "'autoattack_acc' is not known"),
        ("eps=1", "'eps' is not known"),
        ("autors=me", "did you mean 'authors'"),
        ("additional_data=maybe", "'maybe' is not known; known: false, true"),
        ("number_forward_passes=0", "a whole number from 1 on"),
        ("reported=best", "a percentage is expected"),
        ("reported=nan", "a percentage is expected"),
    ],
)
def test_what_is_given_is_checked(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"^--robustbench-info[^\n]+$") as error:
        parsed([given])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("wrn34-20", "WideResNet-34-20"),
        ("wrn70-16-silu", "WideResNet-70-16"),
        ("resnet18", "ResNet-18"),
        ("resnet50-cifar", "ResNet-50"),
        ("preactresnet18", "PreActResNet-18"),
        ("timm:convnext_tiny", "convnext_tiny"),
    ],
)
def test_architectures_are_called_as_on_the_leaderboard(name: str, published: str) -> None:
    entries = [entry("natural", 1), entry("aa", 0) | {"model": name}]
    assert model_info(entries, "a", CIFAR10, {})[0]["architecture"] == published


def test_other_data_are_refused_before_anything_is_measured(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_checkpoint, "evaluate", lambda *_, **__: pytest.fail("it was measured"))
    asked = EvaluationConfig(["natural"], device="cpu", data=str(tiny.folder), for_robustbench=True)
    with pytest.raises(ValueError, match="there is no leaderboard of folder"):
        evaluate_checkpoint.run(tiny.teacher, asked, Listener())


def test_the_command_writes_a_new_file_and_tells_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "net.pt", 0, 10), tmp_path / "entry.json"
    reports.add(reports.path_of(checkpoint, None), MEASURED)

    def run(path: Path, config: EvaluationConfig, *_: Any, **__: Any) -> Report:
        assert config.for_robustbench
        return Report("wrn28-10", {}, None, "a", CIFAR10)

    monkeypatch.setattr(evaluate_checkpoint, "run", run)
    asked = [
        str(checkpoint),
        "--device",
        "cpu",
        "--robustbench-json",
        str(out),
        "--robustbench-info",
        "venue=arXiv",
    ]
    done = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert json.loads(out.read_text()) == model_info(MEASURED, "a", CIFAR10, {"venue": "arXiv"})[0]
    assert (
        "Note: to be filled in, e.g. by --robustbench-info: link, name, authors, additional_data, reported"
        in done.output
    )
    written = out.read_bytes()
    for arguments, told in (
        (asked, f"--robustbench-json: {out} exists"),
        ([*asked[:3], "--robustbench-info", "venue=arXiv"], "--robustbench-json, which is not given"),
        (
            [str(checkpoint), *asked[:3], "--robustbench-json", str(tmp_path / "x")],
            "one checkpoint is expected, got 2",
        ),
        ([*asked[:3], "--robustbench-json", str(tmp_path / "x"), "--limit-aa", "9"], "drop --limit-aa"),
    ):
        with pytest.raises(ValueError, match=r"^--robustbench") as error:
            CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert told in str(error.value)
    assert out.read_bytes() == written
    with pytest.raises(ValueError, match="exists"):
        robustbench.Submission(out, {}).write(MEASURED, "a", CIFAR10)


def test_the_benchmark_s_data_set_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the evaluation itself, of 10,000 stubbed images."""
    names = tuple("0123456789")
    split = Split(torch.zeros(10_000, 2, 2, 3, dtype=torch.uint8), torch.arange(10_000) % 10, names)
    found = datasets.Dataset("cifar10", split.take(torch.arange(0)), split, names, True, "here")
    monkeypatch.setattr(datasets, "find", lambda *_: found)
    monkeypatch.setattr(evaluate_checkpoint, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(evaluate_checkpoint._Evaluation, "measure", lambda *_: {})
    config = EvaluationConfig(["natural"], device="cpu", dataset="cifar10", epsilon="8/255", for_robustbench=True)
    report = evaluate_checkpoint.run(write_checkpoint(tmp_path / "net.pt", 0, 10), config, Listener())
    assert report.benchmark == CIFAR10
    assert len(report.sha256) == 64

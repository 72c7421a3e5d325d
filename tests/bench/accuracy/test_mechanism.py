"""The paper's statements over seeds, on made-up logs whose estimates and intervals are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lib.accuracy import mechanism, protocol
from bench.lib.accuracy.cells import MeasuredCell, ResultFolder
from bench.lib.accuracy.collected import Collected
from bench.lib.accuracy.mechanism_chapter import mechanism_chapter
from bench.lib.accuracy.protocol import AccuracyProtocol
from engine.common.files import write_json
from engine.runs.reporting.tables import ReportTable

# Of Student's t, from printed tables: 95 %, two-sided, of 1 and of 2 degrees of freedom.
T1, T2 = 12.7062, 4.30265
EPOCHS = 5  # IAD-I: two of warm-up, then 3 to 5
PROTOCOL = """
title: made up
threads: 1
seeds: [0, 1, 2]
common: {dataset: digits, model: resnet8, epochs: 5, eval: {probe_size: 400, attack: pgd10, final: []}}
teachers:
  teacher: {method: at, seed: 100}
tables:
  all:
    title: all
    baseline: ard
    attacks: {natural: 10}
    rows:
      at: {method: at}
      ard: {method: ard}
      iad1: {method: iad1}
      iad1-warmup0: {method: iad1, loss: {warmup: 0}}
      iad1-beta1: {method: iad1, loss: {warmup: 0, beta: 1}}
"""
Rows = list[dict[str, Any]]
OfSeed = Callable[[int], Rows]


@pytest.fixture(name="made")
def _made(tmp_path: Path) -> tuple[AccuracyProtocol, ResultFolder]:
    path = tmp_path / "made.yaml"
    path.write_text(PROTOCOL)
    return protocol.read(str(path)), ResultFolder(tmp_path / "results")


def epoch(number: int, adversarial: float = 0.5, student: float = 0.3, **other: Any) -> dict[str, Any]:
    """Row of an epoch: the teacher is right on 0.8 of x, and on x~ only where it is right on x."""
    return {
        "event": "epoch", "epoch": number, "phase": "ard", "measured_on": "validation", "measured_n": 100,
        "robust_accuracy": 0.25, "probe_student_adversarial_accuracy": student,
        "probe_teacher_natural_accuracy": 0.8, "probe_teacher_adversarial_accuracy": adversarial,
        "probe_alpha": 0.9,
        "probe_cases": {
            "both_right": adversarial, "only_natural_right": 0.8 - adversarial, "both_wrong": 0.2,
            "only_adversarial_right": 0.0,
        },
    } | other  # fmt: skip


def course(*adversarial: float, **other: Any) -> Rows:
    """Rows of a training in which the teacher's accuracy on x~ takes these values."""
    return [epoch(number, value, **other) for number, value in enumerate(adversarial, 1)]


def keep(
    made: tuple[AccuracyProtocol, ResultFolder], row: str, seed: int | None, rows: Rows, **other: Any
) -> Path:
    """Write a cell, or a teacher for the seed None, and its log, which is returned."""
    wanted, results = made
    keys = wanted.teacher_config(row) if seed is None else wanted.config_of(row, seed)
    name = row if seed is None else f"{row}-seed{seed}"
    cell = MeasuredCell(
        **{
            "protocol": "made", "row": row, "seed": seed, "settings": "0", "keys": protocol.chosen_keys(keys),
            "teachers": {} if seed is None else {"teacher": "abc"}, "threads": 1, "data": "d",
            "facts": {}, "weights": "abc",
            "epoch": 2, "epochs": EPOCHS, "epoch_seconds": 1.0, "seconds": 5.0, "peak_memory": None,
            "accuracies": {},
        }
        | other
    )  # fmt: skip
    for path in (results.cell(name), results.log(name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(results.cell(name), cell.model_dump())
    log = results.log(name)
    log.write_text("".join(json.dumps(each) + "\n" for each in [{"event": "step", "loss": 2.0}, *rows]))
    return log


def keep_seeds(made: tuple[AccuracyProtocol, ResultFolder], row: str, rows_of: OfSeed, seeds: int = 3) -> None:
    for seed in range(seeds):
        keep(made, row, seed, rows_of(seed))


def found(made: tuple[AccuracyProtocol, ResultFolder], name: str, row: str = "ard") -> mechanism.ClaimResult:
    (only,) = [each for each in mechanism.claims(*made) if (each.claim.name, each.row) == (name, row)]
    return only


# ---------------------------------------------------------------- estimates and verdicts


def test_a_known_fall_agrees_with_the_interval_in_closed_form(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    """Falls of 0.10, 0.12 and 0.17: mean 0.13, variance 0.0013."""
    keep_seeds(made, "ard", lambda seed: course(0.6, 0.55, 0.54, 0.53, 0.6 - (0.10, 0.12, 0.17)[seed]))
    result = found(made, "teacher-falls")
    assert result.found is not None
    assert result.found.values == pytest.approx([-0.10, -0.12, -0.17])
    half = T2 * math.sqrt(0.0013 / 3)
    assert result.found.interval == pytest.approx((-0.13 - half, -0.13 + half), rel=1e-5)
    assert result.verdict == "agrees"
    errors = [math.sqrt((0.6 * 0.4 + p * (1 - p)) / 400) for p in (0.50, 0.48, 0.43)]
    assert result.found.image_error == pytest.approx(sum(errors) / 3)
    assert result.late is not None
    assert result.late.values == pytest.approx([-0.04, -0.06, -0.11])  # from epoch 3
    for name, sign in (("both-right-fewer", 1), ("only-natural-right-more", -1)):
        other = found(made, name)
        assert other.found is not None
        assert other.found.values == pytest.approx([sign * value for value in result.found.values])
        assert other.verdict == "agrees"


def test_a_known_rise_disagrees(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    keep_seeds(made, "ard", lambda seed: course(0.5, 0.5, 0.5, 0.5, 0.6 + 0.01 * seed))
    assert found(made, "teacher-falls").verdict == "disagrees"
    assert found(made, "only-natural-right-more").verdict == "disagrees"


def test_noise_is_not_resolved(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    keep_seeds(made, "ard", lambda seed: course(0.5, 0.5, 0.5, 0.5, (0.45, 0.52, 0.50)[seed]))
    result = found(made, "teacher-falls")
    assert result.found is not None
    assert result.found.interval is not None
    assert result.found.interval[0] < 0 < result.found.interval[1]
    assert result.verdict == "not resolved"


def test_two_seeds_have_one_degree_of_freedom_and_one_is_too_few(
    made: tuple[AccuracyProtocol, ResultFolder],
) -> None:
    keep(made, "ard", 0, course(0.6, 0.5, 0.5, 0.5, 0.5))
    assert found(made, "teacher-falls").verdict == "not measured"
    keep(made, "ard", 2, course(0.6, 0.5, 0.5, 0.5, 0.4))
    result = found(made, "teacher-falls")
    assert result.found is not None
    half = T1 * 0.05  # stdev / sqrt(2) of -0.1 and -0.2
    assert result.found.interval == pytest.approx((-0.15 - half, -0.15 + half), rel=1e-5)
    assert list(result.found.by_seed) == [0, 2]


def test_seeds_that_do_not_vary_tell_nothing_of_a_direction(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    keep_seeds(made, "ard", lambda seed: course(0.6, 0.5, 0.5, 0.5, 0.4))
    result = found(made, "teacher-falls")
    assert result.found is not None
    assert result.found.interval is None
    assert result.verdict == "not resolved"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((0.0, 0.0, 0.0), "agrees"),
        ((0.001, 0.002, 0.001), "agrees"),  # tells a change apart, which is within the margin
        ((0.05, 0.05, 0.05), "disagrees"),
        ((0.05, 0.052, 0.051), "disagrees"),
        ((-0.05, -0.052, -0.051), "disagrees"),
        ((-0.02, 0.03, 0.0), "not resolved"),
    ],
)
def test_what_stays_has_its_interval_within_the_margin(
    made: tuple[AccuracyProtocol, ResultFolder], changes: tuple[float, ...], verdict: str
) -> None:
    def rows_of(seed: int) -> Rows:
        rows, share = course(*[0.5] * EPOCHS), 0.2 + changes[seed]
        rows[-1] |= {"probe_teacher_natural_accuracy": 1 - share}
        rows[-1]["probe_cases"] |= {"both_wrong": share, "only_natural_right": 0.5 - share}
        return rows

    keep_seeds(made, "ard", rows_of)
    assert found(made, "both-wrong-constant").verdict == verdict
    assert found(made, "teacher-constant-on-natural").verdict == verdict
    assert found(made, "fourth-case-absent").verdict == "agrees"


def test_a_case_that_is_there_disagrees_with_its_absence(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    def rows_of(seed: int) -> Rows:
        share = 0.02 + 0.001 * seed
        cases = {"both_right": 0.5, "only_natural_right": 0.3, "both_wrong": 0.2 - share}
        return course(*[0.5 + share] * EPOCHS, probe_cases=cases | {"only_adversarial_right": share})

    keep_seeds(made, "ard", rows_of)
    result = found(made, "fourth-case-absent")
    assert result.found is not None
    assert result.found.mean == pytest.approx(0.021)
    assert result.verdict == "disagrees"


def test_a_change_begins_after_the_warm_up(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    """Alpha falls within the warm-up and rises after it."""

    def rows_of(seed: int) -> Rows:
        alphas = (0.99, 0.95, 0.80, 0.82, 0.90 + 0.001 * seed)
        return [
            epoch(number, probe_alpha=alpha, phase="ard" if number < 3 else "iad1")
            for number, alpha in enumerate(alphas, 1)
        ]

    keep_seeds(made, "iad1", rows_of)
    result = found(made, "trust-falls", "iad1")
    assert result.found is not None
    assert result.late is not None
    assert result.found.values == pytest.approx([0.100, 0.101, 0.102])
    assert result.late.values == pytest.approx([0.080, 0.081, 0.082])  # from epoch 4
    assert result.verdict == "disagrees"


def test_rows_are_compared_seed_by_seed(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    """Row less row, of the seeds that both have; images: those of the accuracy on held-out ones."""
    keep_seeds(made, "ard", lambda seed: course(*[0.5] * EPOCHS, robust_accuracy=(0.2, 0.3, 0.4)[seed]))
    keep_seeds(made, "iad1", lambda seed: course(*[0.5] * EPOCHS, robust_accuracy=(0.22, 0.33)[seed]), seeds=2)
    result = found(made, "introspection-helps", "iad1")
    assert result.found is not None
    assert result.found.values == pytest.approx([0.02, 0.03])
    errors = [math.sqrt((a * (1 - a) + b * (1 - b)) / 100) for a, b in ((0.2, 0.22), (0.3, 0.33))]
    assert result.found.image_error == pytest.approx(sum(errors) / 2)
    keep_seeds(made, "iad1-warmup0", lambda seed: course(*[0.5] * EPOCHS, probe_alpha=0.8))
    keep_seeds(made, "iad1-beta1", lambda seed: course(*[0.5] * EPOCHS, probe_alpha=0.3 + 0.01 * seed))
    result = found(made, "beta-lowers-trust", "iad1-beta1")
    assert result.found is not None
    assert result.found.values == pytest.approx([-0.50, -0.49, -0.48])
    assert result.verdict == "agrees"


def test_the_student_is_compared_with_the_teacher(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    def rows_of(seed: int) -> Rows:
        students = (0.1, 0.2, 0.3, 0.4, 0.5 + 0.01 * seed)
        return [epoch(number, 0.6, student) for number, student in enumerate(students, 1)]

    keep_seeds(made, "ard", rows_of)
    first, gains = found(made, "student-behind-at-first"), found(made, "student-gains-on-teacher")
    assert first.found is not None
    assert gains.found is not None
    assert first.found.values == pytest.approx([-0.5] * 3)
    assert gains.found.values == pytest.approx([0.40, 0.41, 0.42])
    error = [math.sqrt((2 * 0.24 + 0.09 + p * (1 - p)) / 400) for p in (0.50, 0.51, 0.52)]
    assert gains.found.image_error == pytest.approx(sum(error) / 3)


def test_the_teacher_is_compared_with_itself_at_the_epoch_of_its_weights(
    made: tuple[AccuracyProtocol, ResultFolder],
) -> None:
    keep_seeds(made, "ard", lambda seed: course(0.5, 0.5, 0.5, 0.5, 0.45 + 0.01 * seed))
    assert found(made, "worse-than-on-its-own").verdict == "not measured"
    own = [epoch(number, student=0.1 * number) for number in range(1, EPOCHS + 1)]
    taught = ("probe_teacher_natural_accuracy", "probe_teacher_adversarial_accuracy", "probe_alpha", "probe_cases")
    rows = [{key: value for key, value in row.items() if key not in taught} for row in own]
    keep(made, "teacher", None, rows)  # best epoch: 2
    result = found(made, "worse-than-on-its-own")
    assert result.found is not None
    assert result.found.values == pytest.approx([0.25, 0.26, 0.27])
    assert result.verdict == "disagrees"
    keep(made, "teacher", None, rows, weights="other")
    with pytest.raises(ValueError, match=r"teacher\.json is not of the teacher that the students had"):
        mechanism.claims(*made)


# ---------------------------------------------------------------- which rows, and logs that are refused


def test_a_row_without_a_teacher_or_in_no_table_is_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(
        PROTOCOL.replace("ard: {method: ard}", "ard: {method: trades}").replace("iad1-beta1:", "other:")
    )
    made = protocol.read(str(path)), ResultFolder(tmp_path / "results")
    keep_seeds(made, "ard", lambda seed: [{"event": "epoch", "epoch": 1}])  # would be refused if it were read
    asked = {(each.claim.name, each.row) for each in mechanism.claims(*made)}
    assert {row for _, row in asked} == {"iad1"}
    assert not {name for name, _ in asked} & {
        "introspection-helps",
        "beta-lowers-trust",
        "student-behind-at-first",
    }
    assert ("teacher-falls", "iad1") in asked
    assert {each.verdict for each in mechanism.claims(*made)} == {"not measured"}


def test_every_test_of_the_table_is_known_and_its_keys_are_of_a_row() -> None:
    row = epoch(1)
    for claim in mechanism.CLAIMS:
        assert claim.test in mechanism.CLAIM_TESTS
        assert (claim.test == "row") == (claim.against is not None)
        for key in claim.quantity:
            outer, _, case = key.partition(".")
            assert isinstance(row[outer][case] if case else row[outer], float)
    assert len({claim.name for claim in mechanism.CLAIMS}) == len(mechanism.CLAIMS)


def _without(key: str) -> Callable[[Rows], Any]:
    return lambda rows: [row.pop(key) for row in rows[2:3]]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_without("probe_alpha"), "line 4: probe_alpha: Field required"),
        (_without("robust_accuracy"), "line 4: robust_accuracy: Field required"),
        (lambda rows: rows[0].update(probe_alpha=math.nan), "line 2: probe_alpha: "),
        (lambda rows: rows[0].update(probe_alpha=1.5), "line 2: probe_alpha: "),
        (lambda rows: rows[0].update(probe_alpha="0.5"), "line 2: probe_alpha: "),
        (lambda rows: rows[0]["probe_cases"].pop("both_wrong"), "line 2: probe_cases.both_wrong: Field required"),
        (lambda rows: rows[0]["probe_cases"].update(both_wrong=0.4), "probe_cases and all images differ"),
        (lambda rows: rows[0].update(probe_teacher_adversarial_accuracy=0.4), "_adversarial_accuracy differ"),
        (lambda rows: rows.pop(1), r"epochs 1 to 5 are expected, got \[1, 3, 4, 5\]"),
        (lambda rows: rows.pop(), r"epochs 1 to 5 are expected, got \[1, 2, 3, 4\]"),
    ],
)
def test_damaged_rows_are_refused_with_one_line(
    made: tuple[AccuracyProtocol, ResultFolder], damage: Callable[[Rows], Any], told: str
) -> None:
    rows = course(*[0.5] * EPOCHS)
    damage(rows)
    keep(made, "ard", 1, rows)
    with pytest.raises(ValueError, match=rf"ard-seed1\.jsonl is damaged: .*{told}") as raised:
        mechanism.claims(*made)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]\n", '{"epoch": 1}\n', '{"event": "epo', "\x00\n"])
def test_lines_that_are_no_rows_are_refused(made: tuple[AccuracyProtocol, ResultFolder], text: str) -> None:
    keep(made, "ard", 0, []).write_text(text)
    with pytest.raises(ValueError, match="line 1 is no row"):
        mechanism.claims(*made)


def test_a_cell_without_its_log_or_of_other_settings_or_teachers_is_refused(
    made: tuple[AccuracyProtocol, ResultFolder],
) -> None:
    rows = course(*[0.5] * EPOCHS)
    keep(made, "ard", 0, rows).unlink()
    with pytest.raises(ValueError, match=r"cannot read .*ard-seed0\.jsonl"):
        mechanism.claims(*made)
    keep(made, "ard", 0, rows, keys=protocol.chosen_keys(made[0].config_of("ard", 1)))
    with pytest.raises(ValueError, match=r"ard-seed0\.json is of other settings"):
        mechanism.claims(*made)
    keep(made, "ard", 0, rows)
    keep(made, "iad1", 0, rows, teachers={"teacher": "other"})
    with pytest.raises(ValueError, match="ard-seed0 and iad1-seed0 had different teachers"):
        mechanism.claims(*made)


# ---------------------------------------------------------------- text and pictures


def test_the_table_tells_every_number(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    keep_seeds(made, "ard", lambda seed: course(0.6, 0.55, 0.54, 0.53, 0.6 - (0.10, 0.12, 0.17)[seed]))
    heading, rows = mechanism.table(mechanism.claims(*made))
    assert all(len(row) == len(heading) for row in rows)
    row = dict(zip(heading, rows[0], strict=True))
    assert row["From and to"] == "60.0 → 47.0"
    assert row["By seed"] == "-10.0, -12.0, -17.0"
    assert (row["Mean"], row["95 % interval"], row["Verdict"]) == ("-13.0", "-22.0 to -4.0", "agrees")
    assert row["Images' error"] == "3.5"
    assert row["Second half"].startswith("-7.0 (")
    unmeasured = dict(zip(heading, rows[1], strict=True))
    assert (unmeasured["Row"], unmeasured["Mean"], unmeasured["Verdict"]) == ("iad1", "", "not measured")


def test_the_chapter_tells_of_the_rows_that_are_there(made: tuple[AccuracyProtocol, ResultFolder]) -> None:
    protocol, results = made
    nothing = Collected(protocol, results, None, {}, {}, 0)
    assert mechanism_chapter(nothing) is None
    keep_seeds(made, "iad1", lambda seed: [*course(0.6, 0.5), *course(*[0.5] * 5, phase="iad1")[2:]])
    chapter = mechanism_chapter(nothing)
    assert chapter is not None
    (table,) = (part for part in chapter.parts if isinstance(part, ReportTable))
    found = mechanism.claims(protocol, results)
    assert [row[0] for row in table.rows] == [each.claim.words for each in found]
    assert [row[-1] for row in table.rows] == [each.verdict for each in found]
    assert [picture.name for picture in chapter.pictures] == list(mechanism.FIGURES_OVER_SEEDS)
    assert all(picture.png().startswith(b"\x89PNG") for picture in chapter.pictures)

"""bench.speedrun: its rules, what its clock and its operations count, its records, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bench import speedrun
from bench.lib.machine import Facts
from bench.lib.speedrun import cost, records, rules, running
from bench.lib.speedrun.records import DataFacts, Score, SeedFigures, SpeedRecord
from bench.lib.speedrun.rules import SpeedRecipe
from bench.lib.steps.variants import Flops
from engine import config
from engine.common.stopping import Interrupted
from engine.evaluation.measure import evaluate
from engine.runs.checkpoints import Saver
from engine.runs.run_directory import RunDir
from engine.training.learner import Learner
from tests.bench import speedrun_tables
from tests.bench.readme import README, documented

CPU = rules.TRACKS["cpu"]
TINY = dataclasses.replace(CPU.tiny(), keys={"limit_train": 40, "epochs": 2}, test_images=20, checked_images=10)
KEYS: dict[str, Any] = {
    "method": "at", "model": "resnet8", "epochs": 2, "batch_size": 32, "attack": {"num_steps": 1},
}  # fmt: skip
FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abcdef012", device="cpu", processor="P", cores=2, threads=1, python="3",
    torch="2", triton="",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer measures few images after an epoch."""
    monkeypatch.setitem(rules.SETTLED, "limit_test", 10)


# ---------------------------------------------------------------- rules and recipes


def test_the_readme_has_the_rules_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.SETTLED, "limit_test", 100)
    page = README.read_text(encoding="utf-8")
    assert page.count("<!-- end of rules -->") == 1
    assert speedrun_tables.written(page) == page
    assert f"| `cpu` | cpu | cifar10 | {100 * CPU.target:g} % | 10,000 | `aa`, 1,000 of them |" in page


def test_every_key_of_a_record_is_documented() -> None:
    assert documented("speedrun/TRACK/RECIPE-DATE.json") == [*SpeedRecord.model_fields]
    assert documented("Figures of a seed") == [*SeedFigures.model_fields]


@pytest.mark.parametrize("name", rules.known_recipes())
def test_a_recipe_of_the_project_keeps_the_rules(name: str) -> None:
    recipe = rules.find_recipe(name)
    run = speedrun.Attempt(recipe, "cpu", (0,), quick=False, place=torch.device("cpu")).complete()
    values = config.flat(run.tree())
    assert {key: values[key] for key in config.flat(rules.SETTLED)} == config.flat(rules.SETTLED)
    assert (run.dataset, run.limit_train, run.init) == ("cifar10", None, None)


def test_every_forbidden_key_is_one_and_is_refused() -> None:
    for name, why in rules.FORBIDDEN.items():
        assert name in config.KEYS
        with pytest.raises(ValueError, match=f"recipe r: {name}: ") as refusal:
            SpeedRecipe("r", config.nested(name, config.DEFAULTS[name])).on(CPU, "cpu")
        assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"averaging": {"kind": "swa"}}, "averaging.kind: 'swa' is not allowed"),
        ({"micro_batch": "auto"}, "micro_batch: 'auto' is not allowed"),
        ({"attack": {"num_step": 1}}, "unknown key 'attack.num_step'"),
    ],
)
def test_what_is_against_the_rules_is_refused_in_a_line(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        SpeedRecipe("r", keys).on(CPU, "cpu")
    assert "\n" not in str(refusal.value)


def invoke(*arguments: str) -> Result:
    found = CliRunner().invoke(speedrun.main, arguments)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_a_recipe_with_a_warm_up_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """1.0 is one epoch and not all of the run: its attack would be whole from the start."""
    path = tmp_path / "some.yaml"
    path.write_text("method: at\nepochs: 2\nattack: {epsilon_warmup: 1.0}\n")
    found = invoke(str(path))
    assert found.exit_code == 2
    assert "recipe some: attack.epsilon_warmup: 1 stands for 1 of 2 epochs, and changes nothing" in found.output


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("nothing",), "recipe: 'nothing' is not known"),
        (("missing.yaml",), "cannot read missing.yaml"),
        (("best", "--track", "tpu"), "--track: 'tpu' is not known"),
        (("best", "--seeds", "2..1"), "runs backwards"),
        (("best", "--list"), "give RECIPES"),
        ((), "known: baseline, best, fgsm, gpu"),
        (("--check", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_is_unknown_ends_with_exit_code_2(given: tuple[str, ...], told: str) -> None:
    done = invoke(*given)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


def test_a_track_runs_on_its_own_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.lib.machine.device", torch.device)
    assert rules.device_of(CPU, None) == torch.device("cpu")
    assert rules.device_of(rules.TRACKS["gpu"], "cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device: cuda is no device of this track, which runs on cpu"):
        rules.device_of(CPU, "cuda")


# ---------------------------------------------------------------- seconds and operations


def epoch(number: int, seconds: float, images: int = 40) -> dict[str, Any]:
    return {
        "event": "epoch", "epoch": number, "step": 5 * number, "seconds": seconds,
        "images_per_second": images / seconds,
    }  # fmt: skip


def test_rows_of_epochs_are_summed_and_others_are_not() -> None:
    rows = [
        {"event": "step", "seconds": 1.0},
        epoch(1, 2.5),
        {"event": "step", "seconds": 9.0},
        epoch(2, 0.25, 30),
    ]
    run = config.load(KEYS)
    found = cost.cost(run, rows, {"student": (7.0, 2.0)})
    assert (found.seconds, found.steps, found.images) == (2.75, 10, 70)
    assert found.flops == 70 * (1 * 2 * 7 + 3 * 7 - 2)


@pytest.mark.parametrize(
    "rows",
    [[], [epoch(1, 1.0)], [epoch(1, 1.0), epoch(1, 1.0), epoch(2, 1.0)], [epoch(2, 1.0), epoch(1, 1.0)]],
    ids=["none", "too few", "twice", "order"],
)
def test_a_log_without_each_epoch_once_is_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="has not each of 2 epochs once"):
        cost.cost(config.load(KEYS), rows, {"student": (7.0, 2.0)})


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0, None, "1"])
def test_seconds_that_are_no_time_are_refused(seconds: Any) -> None:
    rows = [epoch(1, 1.0), epoch(2, 1.0) | {"seconds": seconds}]
    with pytest.raises(ValueError, match="no seconds of epoch 2"):
        cost.cost(config.load(KEYS), rows, {"student": (7.0, 2.0)})


def race_of(keys: Mapping[str, Any], place: Path, images: int = 40) -> running.Race:
    track = dataclasses.replace(TINY, keys={"limit_train": images, "epochs": 2})
    return running.prepare(place, "r", track, SpeedRecipe("r", keys).on(track, "cpu"), lambda text: None)


def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations give one result at once."""
    half = {name: Score(correct=1, n=2) for name in ("natural", "pgd20", "checked", "checked_pgd20")}
    monkeypatch.setattr(running, "evaluated", lambda *arguments: (half, ()))


def beside(
    monkeypatch: pytest.MonkeyPatch, place: str, function: Callable[..., Any], after: Callable[[], Any]
) -> None:
    """A function calls another one each time that it has done its work."""

    def called(*arguments: Any, **keys: Any) -> Any:
        found = function(*arguments, **keys)
        after()
        return found

    monkeypatch.setattr(place, called)


def test_steps_count_and_evaluations_and_checkpoints_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock that a step moves by a second, an evaluation by a thousand, and a checkpoint by a million."""
    clock = SimpleNamespace(now=0.0)

    def passes(seconds: float) -> Callable[[], None]:
        return lambda: setattr(clock, "now", clock.now + seconds)

    monkeypatch.setattr("engine.training.telemetry.time", SimpleNamespace(perf_counter=lambda: clock.now))
    beside(monkeypatch, "engine.training.learner.Learner.learn", Learner.learn, passes(1))
    beside(monkeypatch, "engine.runs.trainer.evaluate", evaluate, passes(1000))
    beside(monkeypatch, "engine.runs.checkpoints.Saver.save", Saver.save, passes(1_000_000))
    scored(monkeypatch)
    keys = KEYS | {"method": "ard", "teacher": {"epochs": 1}, "averaging": {"kind": "ema"}}
    found = running.run_seed(race_of(keys, tmp_path), 0).costs
    steps = {"teacher": 2, "student": 4}  # 40 images in batches of 32
    assert {name: one.seconds for name, one in found.items()} == steps
    assert {name: one.steps for name, one in found.items()} == steps
    assert clock.now > 1_002_000


GROWING = {"num_steps": 3, "steps_warmup": 2, "epsilon_warmup": 2}


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "iad1", "semantics": "official", "loss": {"warmup": 1}, "attack": GROWING},
        {"method": "at", "awp": {"gamma": 0.01, "start": 1}},
        {"method": "saad", "attack": {"num_steps": 1}, "averaging": {"kind": "none", "start": None}},
        {"method": "adaad", "attack": GROWING},
    ],
    ids=lambda keys: keys["method"],
)
def test_operations_are_those_that_are_executed(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the steps of a run whose teacher is another network than its student."""
    counted: dict[str, int] = {}
    learn = Learner.learn

    def counting(self: Learner, *arguments: Any, **given: Any) -> None:
        network = "student" if self.networks.teachers or keys["method"] == "at" else "teacher"
        with Flops() as flops:
            learn(self, *arguments, **given)
        counted[network] = counted.get(network, 0) + flops.total

    monkeypatch.setattr(Learner, "learn", counting)
    scored(monkeypatch)
    teacher = {} if keys["method"] == "at" else {"teacher": {"model": "wrn10-1", "method": "at", "epochs": 1}}
    recipe = KEYS | {"batch_size": 10, "dtype": "float64"} | teacher | keys
    found = running.run_seed(race_of(recipe, tmp_path, images=10), 0).costs
    assert {name: one.flops for name, one in found.items()} == pytest.approx(counted, rel=1e-12)


def test_a_teacher_counts_with_its_training() -> None:
    costs = {"teacher": cost.TrainingCost(1.5, 7.0, 2, 40), "student": cost.TrainingCost(4.0, 9.0, 4, 80)}
    half = {name: Score(correct=1, n=2) for name in ("natural", "pgd20", "checked", "checked_pgd20")}
    found = speedrun.figures_of(3, running.SeedRun(costs, {}, half, ("note",)), "a.jsonl", "f")
    assert (found.seconds, found.teacher_seconds, found.flops, found.teacher_flops) == (5.5, 1.5, 16.0, 7.0)
    assert (found.seed, found.steps, found.images, found.notes) == (3, 4, 80, ["note"])


def test_compilation_is_what_the_first_epoch_has_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On as many full batches as it takes, and the odd one at the end; kept from the first process."""
    seen: list[tuple[str, int, int, int]] = []
    seconds = iter([9.0, 4.0, 5.0, 3.0, 1.0, 1.0, 1.0, 2.0])

    def train(run: config.RunConfig, *, teachers: dict[str, Any], out: str) -> Any:
        seen.append((run.method, run.limit_train or 0, run.epochs, len(teachers)))
        Path(out).mkdir()
        rows = [json.dumps({"event": "epoch", "seconds": next(seconds)}) for _ in range(2)]
        (Path(out) / "metrics.jsonl").write_text("\n".join([*rows, ""]))
        return SimpleNamespace(path=Path(out))

    monkeypatch.setattr(running, "train", train)
    race = race_of(KEYS | {"method": "ard", "batch_size": 7, "epochs": 9}, tmp_path)
    assert running.warm_up(race) == (9 - 4) + (5 - 3)
    assert seen == [("at", 33, 2, 0), ("ard", 33, 2, 1)]
    assert running.warm_up(race) == 7.0


def test_the_last_weights_are_the_average_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scored(monkeypatch)
    race = race_of(KEYS | {"averaging": {"kind": "ema", "decay": 0.5}}, tmp_path)
    running.run_seed(race, 0)
    (path,) = race.place.glob("seed-0/student/last.pt")
    saved = torch.load(path, weights_only=True)
    found = running.last_weights(RunDir(path.parent), race.dataset.class_names).state_dict()
    for name, value in found.items():
        assert torch.equal(value, saved["averaged"][f"module.{name}"])
    assert any(not torch.equal(value, saved["student"][name]) for name, value in found.items())


# ---------------------------------------------------------------- verdict


def figures(seed: int, pgd20: int = 3000, checked: tuple[int, int] = (280, 300), **more: Any) -> SeedFigures:
    given: dict[str, Any] = {
        "seed": seed, "seconds": 10.0 + seed, "teacher_seconds": 0.0, "flops": 2e12, "teacher_flops": 0.0,
        "steps": 10, "images": 100, "natural": Score(correct=5000, n=10_000),
        "pgd20": Score(correct=pgd20, n=10_000), "checked": Score(correct=checked[0], n=1000),
        "checked_pgd20": Score(correct=checked[1], n=1000), "log": "none", "log_sha256": "", "notes": [],
    }  # fmt: skip
    return SeedFigures(**given | more)


def judged(seeds: list[SeedFigures], checked_by: str = "aa", **given: Any) -> records.Verdict:
    usual: dict[str, Any] = {"quick": False, "version": rules.RULES_VERSION}
    return records.judge(dataclasses.replace(CPU, target=0.3), seeds, checked_by, **usual | given)


def test_a_mean_of_exactly_the_target_reaches_it() -> None:
    reached = judged([figures(0, 2900), figures(1, 3000), figures(2, 3100)])
    assert (reached.reached, reached.refused) == (True, [])
    assert reached.points == pytest.approx(0, abs=1e-9)
    below = judged([figures(0, 2900), figures(1, 3000), figures(2, 3099)])
    assert (below.reached, below.refused) == (False, [])
    assert below.points == pytest.approx(-100 / 30_000)


THREE = [figures(seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("seeds", "given", "told"),
    [
        (THREE[:2], {}, "2 seeds, and 3 different ones"),
        ([*THREE[:2], figures(1)], {}, "3 seeds, and 3 different ones"),
        (THREE, {"quick": True}, "--quick"),
        (THREE, {"version": rules.RULES_VERSION + 1}, "of rules"),
        (THREE, {"checked_by": "aa-fast"}, "checked by aa-fast, and not by aa"),
        ([*THREE[:2], figures(2, natural=Score(correct=5, n=9999))], {}, "not evaluated on 10,000 images"),
        (
            [*THREE[:2], figures(2, checked=(199, 300)), figures(3, checked=(120, 300))],
            {},
            "masked: aa finds 18.0",
        ),
    ],
)
def test_what_is_no_record(seeds: list[SeedFigures], given: dict[str, Any], told: str) -> None:
    (reason,) = judged(seeds, **given).refused
    assert told in reason


def test_autoattack_may_find_ten_points_more() -> None:
    assert judged([figures(seed, checked=(200, 300)) for seed in range(3)]).refused == []
    assert judged([figures(seed, checked=(199, 300)) for seed in range(3)]).refused


# ---------------------------------------------------------------- files


def written(folder: Path, name: str, seconds: float = 10.0, **more: Any) -> Path:
    """A record of three seeds that took so long, and its logs."""
    logs = {seed: [epoch(1, seconds), epoch(2, float(seed + 1))] for seed in range(3)}

    def make(files: Mapping[int, tuple[str, str]]) -> SpeedRecord:
        seeds = [
            figures(seed, seconds=seconds + seed + 1, log=log, log_sha256=digest)
            for seed, (log, digest) in files.items()
        ]
        content: dict[str, Any] = {
            "rules": rules.RULES_VERSION, "track": "cpu", "recipe": "r", "quick": False, "facts": dict(FACTS),
            "data": DataFacts(name="cifar10", images="as published", sha256="f"), "checked_by": "aa",
            "compile_s": 0.5, "keys": {}, "config": {"epochs": 2}, "summary": records.summarise(seeds),
            "verdict": judged(seeds), "seeds": seeds,
        }  # fmt: skip
        return SpeedRecord(**content | more)

    return records.write(folder / "cpu", name, logs, make)


def test_a_record_never_takes_the_place_of_another(tmp_path: Path) -> None:
    first = written(tmp_path, "r", 20.0)
    before = {path: path.read_bytes() for path in first.parent.iterdir()}
    second = written(tmp_path, "r", 30.0)
    (tmp_path / "cpu" / "r-3-seed1.jsonl").write_text("somebody's")
    third = written(tmp_path, "r", 40.0)
    assert [path.name for path in (first, second, third)] == ["r.json", "r-2.json", "r-4.json"]
    assert {path: path.read_bytes() for path in before} == before
    assert [records.read(path).summary.seconds for path in (first, second)] == [22.0, 32.0]


def test_means_and_deviations() -> None:
    found = records.summarise([figures(0, 2900), figures(1, 3000), figures(2, 3100)])
    assert (found.seconds, found.seconds_std, found.flops) == (11.0, 1.0, 2e12)
    assert (found.pgd20, found.pgd20_std) == pytest.approx((0.3, 0.01))
    assert records.summarise([figures(0)]).pgd20_std == 0


def test_the_fastest_comes_first_and_what_does_not_count_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.TRACKS, "cpu", dataclasses.replace(CPU, target=0.3))
    slow, fast = written(tmp_path, "slow", 50.0), written(tmp_path, "fast", 40.0)
    _, _, other, untrue, damaged = (
        written(tmp_path, name, 5.0) for name in ("gone", "changed", "other", "untrue", "damaged")
    )
    (tmp_path / "cpu" / "gone-seed1.jsonl").unlink()
    with (tmp_path / "cpu" / "changed-seed2.jsonl").open("a") as file:
        file.write("\n")
    log = tmp_path / "cpu" / "other-seed0.jsonl"
    log.write_text(json.dumps(epoch(1, 99.0)) + "\n")
    digest = hashlib.sha256(log.read_bytes()).hexdigest()

    def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    edit(other, lambda content: content["seeds"][0].update(log_sha256=digest))
    edit(untrue, lambda content: content["summary"].update(seconds=1.0))
    edit(damaged, lambda content: content["seeds"][0]["pgd20"].update(correct=10_001))
    not_finite, outside = written(tmp_path, "nan", 5.0), written(tmp_path, "outside", 5.0)
    edit(not_finite, lambda content: content.update(compile_s=float("nan")))
    edit(outside, lambda content: content["seeds"][0].update(log="../secret"))
    written(tmp_path, "gpus", 5.0, facts=dict(FACTS) | {"device": "H100"})
    written(tmp_path, "jpeg", 5.0, data=DataFacts(name="digits", images="as published", sha256="f"))
    valid, others = records.leaderboard(tmp_path / "cpu", rules.TRACKS["cpu"])
    assert [path for path, _ in valid] == [fast, slow]
    assert {path.stem: reason for path, reason in others}.keys() == {
        "gone", "changed", "other", "untrue", "damaged", "nan", "outside", "gpus", "jpeg",
    }  # fmt: skip
    told = {path.stem: reason for path, reason in others}
    for name, words in {
        "gone": "gone-seed1.jsonl: No such file", "changed": "changed-seed2.jsonl was changed",
        "other": "has 99.000 s, and the record 6.000 s", "untrue": "its summary is not that of its seeds",
        "damaged": "10001 of 10000 images", "nan": "compile_s", "outside": "seeds.0.log", "gpus": "made on H100",
        "jpeg": "of digits, and not of cifar10",
    }.items():  # fmt: skip
        assert words in told[name], (name, told[name])
    shown = " ".join(invoke("--list", "--out", str(tmp_path)).output.split())
    assert shown.index("42.0 +- 1.0") < shown.index("52.0 +- 1.0") < shown.index("no record: changed.json")


def test_a_lower_target_of_now_decides_and_not_the_verdict_of_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "r")
    for target, count in ((0.3, 1), (0.31, 0)):
        track = dataclasses.replace(CPU, target=target)
        monkeypatch.setitem(rules.TRACKS, "cpu", track)
        valid, others = records.leaderboard(tmp_path / "cpu", track)
        assert len(valid) == count
    assert others == [(path, "1.00 points below the target")]


# ---------------------------------------------------------------- --check


def test_what_agrees_is_told(tmp_path: Path) -> None:
    before = records.read(written(tmp_path, "r"))
    lines: list[str] = []
    assert speedrun.agrees(before, before, lines.append)
    assert [line.partition(":")[2].strip() for line in lines[:5]] == ["agrees"] * 5
    assert lines[5] == "seed 0: every score is the same to the image"

    def differs(name: str, **changed: Any) -> None:
        lines.clear()
        after = before.model_copy(update=changed)
        assert not speedrun.agrees(before, after, lines.append)
        assert [line.partition(":")[0] for line in lines if "DIFFERS" in line] == [name]

    differs("rules", rules=before.rules + 1)
    differs("configuration", config={"epochs": 3})
    differs("images", data=before.data.model_copy(update={"sha256": "e"}))
    differs("operations", summary=before.summary.model_copy(update={"flops": 2.1e12}))
    differs("verdict", verdict=before.verdict.model_copy(update={"reached": False}))
    lines.clear()
    slower = before.model_copy(update={"seeds": [figures(0, 2999), *before.seeds[1:]]})
    assert speedrun.agrees(before, slower, lines.append)
    assert "seed 0: pgd20 3,000, now 2,999 of 10,000" in lines


# ---------------------------------------------------------------- the command


def test_a_recipe_is_run_goes_on_after_a_stop_and_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two seeds, stopped in the second one: what was trained is not trained again; another run measures anew."""
    monkeypatch.setattr(speedrun, "WORK", tmp_path / "work")
    monkeypatch.setattr(rules.Track, "tiny", lambda self: TINY)
    monkeypatch.setattr(running, "warm_up", lambda race: 0.25)
    measured = running.evaluated
    stops = iter([False, True, False, False, False, False, False])

    def evaluated(*arguments: Any) -> Any:
        if next(stops):
            raise Interrupted
        return measured(*arguments)

    monkeypatch.setattr(running, "evaluated", evaluated)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: at\nmodel: resnet8\nbatch_size: 32\nattack: {num_steps: 1}\n")
    given = (str(recipe), "--quick", "--seeds", "3,5", "--out", str(tmp_path / "out"))
    stopped = invoke(*given)
    assert (stopped.exit_code, stopped.output.count("epoch 2/2: ")) == (1, 2)
    assert "the same command goes on" in stopped.output
    assert not (tmp_path / "out").exists()
    done = invoke(*given)
    assert (done.exit_code, done.output.count("epoch 2/2: ")) == (0, 0), done.output
    assert "refused as a record: made with --quick" in done.output
    (path,) = (tmp_path / "out" / "cpu").glob("*.json")
    record = records.read(path)
    assert [one.seed for one in record.seeds] == [3, 5]
    assert (record.compile_s, record.quick, record.recipe, record.data.name) == (0.25, True, "r", "digits")
    assert (record.keys, record.config["attack"]["num_steps"]) == (config.read_file(recipe), 1)
    assert str(tmp_path) not in path.read_text()
    for one in record.seeds:
        rows = [json.loads(line) for line in (path.parent / one.log).read_text().splitlines()]
        assert {row["network"] for row in rows} == {"student"}
        assert one.seconds == sum(row["seconds"] for row in rows if row["event"] == "epoch")
        assert (one.images, one.pgd20.n, one.checked.n) == (80, 20, 10)
    _, ((_, reason),) = records.leaderboard(path.parent, CPU)
    assert "made with --quick" in reason
    checked = invoke("--check", str(path))
    assert (checked.exit_code, checked.output.count("epoch 2/2: ")) == (0, 2), checked.output
    assert checked.output.count("every score is the same to the image") == 2
    assert not any((tmp_path / "work" / "check").iterdir())

"""Runs of the speedrun: warm-up, teachers and student of a seed, their evaluation; all go on after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from bench.lib.speedrun import cost, rules
from bench.lib.speedrun.cost import Forward, Rows, TrainingCost
from bench.lib.speedrun.records import Score
from bench.lib.speedrun.rules import Track
from engine import config, models
from engine.common.console import Reporter
from engine.common.files import code_hash, write_json
from engine.common.tensor_files import read_tensors
from engine.config import RunConfig
from engine.evaluation.measure import Result, evaluate
from engine.models.weights import load_model
from engine.objectives import STUDENT
from engine.pipelines import datasets
from engine.pipelines.datasets import AnyDataset, AnySplit
from engine.pipelines.splits import Request
from engine.runs import assemble, teachers
from engine.runs.lifecycle import train
from engine.runs.run_directory import RunDir

Say = Callable[[str], None]
_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Race:
    """A recipe on a track. complete: its configuration, of no place; place: the folder in which it is run."""

    track: Track
    complete: RunConfig
    place: Path
    dataset: AnyDataset
    say: Say

    def student(self, seed: int) -> RunConfig:
        """The student's configuration, without its teachers' checkpoints."""
        return config.load(self.complete.tree(), {"seed": seed})

    def teachers(self, seed: int) -> dict[str, RunConfig]:
        """Configurations of the teachers that the student needs, by their sections."""
        student = self.student(seed)
        return {
            section: config.load(
                teachers.run_config(student, section).tree(), rules.SETTLED, {"validation": student.validation}
            )
            for section in assemble.teacher_sections(student)
        }


@dataclass(frozen=True)
class TrainedSeed:
    """Trainings of a seed. costs, rows: by network, the student and sections of teachers. run: the student's."""

    costs: Mapping[str, TrainingCost]
    rows: Mapping[str, Rows]
    run: RunDir


@dataclass(frozen=True)
class SeedRun:
    """Result of a seed: costs and rows as of `TrainedSeed`, scores by the rules, and warnings."""

    costs: Mapping[str, TrainingCost]
    rows: Mapping[str, Rows]
    scores: Mapping[str, Score]
    notes: tuple[str, ...]

    def log(self) -> Rows:
        """The rows of all networks, each with the network's name."""
        return [{"network": network, **row} for network, rows in self.rows.items() for row in rows]


def prepare(root: Path, name: str, track: Track, complete: RunConfig, say: Say) -> Race:
    """The race of a recipe, in a folder below root that is of these keys, rules, images and sources alone.

    Raises ValueError where the data set is not there.
    """
    dataset = datasets.find(track.dataset, complete.data, Request(limit_train=complete.limit_train))
    evaluated = [rules.RULES_VERSION, track.test_images, track.checked_by, track.checked_images]
    named = [*evaluated, dataset.sha256, code_hash(), placeless(complete)]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return Race(track, complete, root / f"{name}-{digest[:12]}", dataset, say)


def placeless(run: RunConfig) -> config.Tree:
    """The tree of a configuration without the place of its data, which another machine has elsewhere."""
    return run.tree() | {"data": None, "out": None}


# ---------------------------------------------------------------- training


def warm_up(race: Race) -> float:
    """Seconds of compilation and other first work of each network, on throw-away weights.

    A few batches are trained on twice: the seconds of the first time less those of the second. Those of the first
    process are kept, and given again by one that goes on.
    """
    first = [_first_work(race, run, {}) for run in race.teachers(0).values()]
    drawn = {
        section: models.build(
            run.model, len(race.dataset.class_names), normalize=run.normalize, dataset=run.dataset
        )
        for section, run in race.teachers(0).items()
    }
    seconds = sum([*first, _first_work(race, race.student(0), drawn)])
    kept = race.place / "compile.json"
    if not kept.exists():
        race.place.mkdir(parents=True, exist_ok=True)
        write_json(kept, seconds)
    return float(json.loads(kept.read_text(encoding="utf-8")))


def _first_work(race: Race, run: RunConfig, drawn: Mapping[str, nn.Module]) -> float:
    """Seconds of a network's first work. drawn: its teachers, of random weights."""
    images, size = len(race.dataset.train), run.batch_size
    few = {
        "limit_train": min(images, _WARM_UP_STEPS * size + images % size),  # with the odd batch at the end
        "epochs": 2,
        "loss": {"warmup": 0},
        "attack": {"epsilon_warmup": 0, "steps_warmup": 0},
    }
    with TemporaryDirectory() as folder:
        path = train(config.load(run.tree(), few), teachers=drawn, out=str(Path(folder) / "run")).path
        first, second = (row["seconds"] for row in RunDir(path).rows() if row["event"] == "epoch")
    return max(0.0, float(first - second))


def run_seed(race: Race, seed: int) -> SeedRun:
    """Train teachers and student of a seed, and evaluate; nothing that is finished is done again."""
    trained = train_seed(race, seed)
    scores, notes = evaluated(race, trained.run, race.place / f"seed-{seed}" / "evaluation.json")
    return SeedRun(trained.costs, trained.rows, scores, notes)


def train_seed(race: Race, seed: int) -> TrainedSeed:
    """Train teachers and student of a seed; what is finished is not trained again."""
    place = race.place / f"seed-{seed}"
    ready = {name: _trained(race, run, place / name) for name, run in race.teachers(seed).items()}
    taught_by = {name: {"checkpoint": str(run.last.absolute())} for name, run in ready.items()}
    student = config.load(race.student(seed).tree(), taught_by)
    ready[STUDENT] = _trained(race, student, place / STUDENT)
    runs = {**race.teachers(seed), STUDENT: race.student(seed)}
    forwards = {name: _forward(race, run) for name, run in runs.items()}
    rows = {name: list(run.rows()) for name, run in ready.items()}
    costs = {
        name: cost.cost(run, rows[name], forwards if name == STUDENT else {STUDENT: forwards[name]})
        for name, run in runs.items()
    }
    return TrainedSeed(costs, rows, ready[STUDENT])


def _forward(race: Race, run: RunConfig) -> Forward:
    side = run.image_size
    height, width = race.dataset.train.shape if side is None else (side, side)
    return assemble.student_flops(run, race.dataset, (3, height, width))


def _trained(race: Race, run: RunConfig, place: Path) -> RunDir:
    """The run directory of a training that was finished before, or now."""

    class Told(Reporter):
        def epoch(self, row: Any, epochs: int, measured: str) -> None:
            race.say(
                f"{place.name}, epoch {row['epoch']}/{epochs}: {row['seconds']:.1f} s, loss {row['loss']:.3f}"
            )

    return RunDir(train(run, Told(), again=True, out=str(place)).path)


# ---------------------------------------------------------------- evaluation


def last_weights(run: RunDir, class_names: tuple[str, ...]) -> nn.Module:
    """The network after the last step: the average of the weights where one is taken, in float32."""
    network = load_model(run.last, class_names=class_names).module
    averaged = read_tensors(run.last).value.get("averaged")
    if averaged is not None and int(averaged["n_averaged"]) > 0:
        own = {name.removeprefix("module."): value for name, value in averaged.items() if name != "n_averaged"}
        network.load_state_dict(own)
    return network.float()


def measured(
    race: Race, network: nn.Module, images: AnySplit, attacks: list[str], limit: int
) -> dict[str, Result]:
    """Results of a network by the ball and the seed of the rules, on so many images."""
    epsilon, threat_model = rules.BALL
    race.say(f"evaluating {limit:,} images: {', '.join(attacks)}")
    return evaluate(
        network,
        images,
        attacks,
        epsilon=epsilon,
        threat_model=threat_model,
        limit=limit,
        seed=rules.EVALUATION_SEED,
        device=race.complete.device,
    )


def evaluated(race: Race, run: RunDir, kept: Path) -> tuple[dict[str, Score], tuple[str, ...]]:
    """Scores of a finished run by the rules, and warnings. kept: file of them, which is read where it is there."""
    track = race.track
    if not kept.exists():
        network = last_weights(run, race.dataset.class_names)
        images = race.dataset.test
        whole = measured(race, network, images, ["natural", rules.ATTACKED_BY], track.test_images)
        part = measured(race, network, images, [rules.ATTACKED_BY, track.checked_by], track.checked_images)
        results = {
            "natural": whole["natural"],
            "pgd20": whole[rules.ATTACKED_BY],
            "checked": part[track.checked_by],
            "checked_pgd20": part[rules.ATTACKED_BY],
        }
        found = {name: {"correct": result.correct, "n": result.n} for name, result in results.items()}
        notes = list(dict.fromkeys(note for result in results.values() for note in result.warnings))
        write_json(kept, {"scores": found, "notes": notes})
    content = json.loads(kept.read_text(encoding="utf-8"))
    scores = {name: Score(**numbers) for name, numbers in content["scores"].items()}
    return scores, tuple(content["notes"])

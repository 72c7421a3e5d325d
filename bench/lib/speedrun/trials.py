"""Trials: a recipe and variants of it on held-out training images, so that none is chosen by the test images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, ValidationError

from bench.lib.machine import Facts
from bench.lib.output.csv_rows import TrialRow
from bench.lib.speedrun import rules, running
from bench.lib.speedrun.records import Name, RecordPart
from bench.lib.speedrun.rules import SpeedRecipe
from bench.lib.speedrun.running import Race
from engine import config
from engine.common.files import write_json
from engine.config import RunConfig
from engine.runs import assemble
from engine.runs.run_directory import first_fault

HELD_OUT = 0.1
"""Fraction of the training images that no trial is trained on; all are evaluated on them."""
BASE = "base"


class Variants(RecordPart):
    """Content of a file of trials. base: a recipe; variants: by name, the keys that differ from it."""

    base: Name
    variants: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Trial:
    """A recipe to try. changed: its keys that are not the base's; empty for the base."""

    recipe: SpeedRecipe
    changed: Mapping[str, Any]


def read(path: Path) -> list[Trial]:
    """The base and its variants. Raises ValueError, one line, for a file that is none of them."""
    try:
        found = Variants.model_validate(config.read_file(path, "--trials"))
    except ValidationError as error:
        raise ValueError(f"{path} is no file of trials: {first_fault(error)}") from None
    if BASE in found.variants:
        raise ValueError(f"{path}: {BASE!r} is the recipe {found.base}, and no name of a variant")
    base = rules.find_recipe(found.base)
    changes = {BASE: {}, **found.variants}
    return [Trial(SpeedRecipe(name, config.merge(base.keys, keys)), keys) for name, keys in changes.items()]


def held_out(complete: RunConfig) -> RunConfig:
    """The configuration of a trial: that of a record, but for the images that are held out."""
    return config.load(complete.tree(), {"validation": HELD_OUT})


def run(race: Race, trial: Trial, seed: int, *, file: str, facts: Facts) -> TrialRow:
    """Train a trial with a seed, and evaluate it on the held-out images; nothing that is finished is done again.

    file: name of the file of trials. Raises RunFailed and FloatingPointError as training and evaluation do.
    """
    trained = running.train_seed(race, seed)
    kept = race.place / f"seed-{seed}" / "held-out.json"
    if not kept.exists():
        _, images, _ = assemble.hold_out(race.dataset, HELD_OUT)
        network = running.last_weights(trained.run, race.dataset.class_names)
        results = running.measured(race, network, images, ["natural", rules.ATTACKED_BY], len(images))
        write_json(kept, {name: [result.correct, result.n] for name, result in results.items()})
    scores = json.loads(kept.read_text(encoding="utf-8"))
    return TrialRow(
        **facts,
        trials=file,
        variant=trial.recipe.name,
        keys=json.dumps(trial.changed) if trial.changed else "",
        seed=seed,
        seconds=math.fsum(cost.seconds for cost in trained.costs.values()),
        flops=math.fsum(cost.flops for cost in trained.costs.values()),
        data_sha256=race.dataset.sha256,
        held_out=scores["natural"][1],
        natural=scores["natural"][0] / scores["natural"][1],
        pgd20=scores[rules.ATTACKED_BY][0] / scores[rules.ATTACKED_BY][1],
    )


@dataclass(frozen=True)
class TrialMeans:
    """Means of a variant's seeds; minus_base: of its accuracies less the base's with the same seed."""

    variant: str
    keys: str
    seeds: int
    seconds: float
    flops: float
    natural: float
    pgd20: float
    natural_minus_base: float
    pgd20_minus_base: float


def means(rows: Sequence[TrialRow]) -> Iterator[TrialMeans]:
    """Every variant in its order, over the seeds that it has in common with the base."""
    base = {row.seed: row for row in rows if row.variant == BASE}
    for variant in dict.fromkeys(row.variant for row in rows):
        pairs = [(row, base[row.seed]) for row in rows if row.variant == variant and row.seed in base]
        if pairs:
            own = [row for row, _ in pairs]
            yield TrialMeans(
                variant,
                own[0].keys,
                len(own),
                fmean(row.seconds for row in own),
                fmean(row.flops for row in own),
                fmean(row.natural for row in own),
                fmean(row.pgd20 for row in own),
                fmean(row.natural - other.natural for row, other in pairs),
                fmean(row.pgd20 - other.pgd20 for row, other in pairs),
            )

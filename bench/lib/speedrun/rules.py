"""Rules of the speedrun as a table: tracks, targets, the evaluation, and the keys that no recipe decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.gate import CHECKOUT
from bench.lib import machine
from engine import config
from engine.common.lookup import check_known, look_up
from engine.config import RunConfig

RULES_VERSION = 1
"""Grows with every change that makes earlier records incomparable."""
LEAST_SEEDS = 3
"""Seeds that a record is the mean of, at least."""
LARGEST_AA_GAP = 0.1
"""Accuracy under PGD-20 less that under the attack beside it, on the same images, above which PGD was deceived.

Of 24 networks of this size, by all methods of bench/results/accuracy/cpu, it is 0.037 to 0.058.
"""
BALL = (8 / 255, "Linf")
EVALUATION_SEED = 2022
ATTACKED_BY = "pgd20"
RECIPES = CHECKOUT / "bench" / "speedruns"


@dataclass(frozen=True)
class Track:
    """Goal and conditions of a race.

    device: kind of device. target: mean accuracy under PGD-20 that a record reaches, in [0, 1], on `test_images`.
    checked_by: the attack beside it, on `checked_images` of them. keys: further ones that hold for every recipe.
    """

    device: str
    dataset: str
    target: float
    test_images: int = 10_000
    checked_by: str = "aa"
    checked_images: int = 1_000
    keys: Mapping[str, Any] = field(default_factory=dict)

    def tiny(self) -> Track:
        """The same for `--quick`: it shows that everything works, and no record comes of it."""
        few = {"limit_train": 80, "epochs": 2}
        return replace(self, dataset="digits", test_images=40, checked_by="aa-fast", checked_images=10, keys=few)


TRACKS = {
    "cpu": Track("cpu", "cifar10", target=0.30),
    "gpu": Track("cuda", "cifar10", target=0.50),
}

SETTLED: dict[str, Any] = {
    "validation": 0,
    "limit_test": 100,
    "eval": {"attack": "fgsm", "final": [], "probe_size": 10},
    "overfitting_guard": "off",
    "masking_guard": "off",
    "checkpoint_every": 0,
    "snapshot_every": 0,
    "loggers": [],
}
"""Keys of every run: it trains on all training images, and measures after each epoch as little as it can."""

_SETTLED = "it is settled by the rules"
_OF_THE_COMMAND = "it is given on the command line, or by the track"
_PRETRAINED = "weights are random at the start, and a teacher counts with its own training"
_EXTRA = "no other images than those of the data set"
FORBIDDEN: dict[str, str] = {
    **dict.fromkeys(config.flat(SETTLED), _SETTLED),
    **dict.fromkeys(("seed", "out", "data", "device", "dataset"), _OF_THE_COMMAND),
    **dict.fromkeys(
        (
            "init", "teacher.checkpoint", "teacher.weights", "teacher.normalize", "teacher_st.checkpoint",
            "teacher_st.weights", "teacher_st.normalize",
        ),
        _PRETRAINED,
    ),
    **dict.fromkeys(("extra_data", "extra_fraction", "extra_labels"), _EXTRA),
    **dict.fromkeys(("teacher.seed", "teacher_st.seed"), "each seed has teachers of its own"),
    "imports": "a recipe is keys, and no code",
}  # fmt: skip
"""Keys that no recipe may state, and why."""
UNTIMED = {
    "averaging.kind": ("swa", "its pass over the images after an epoch is in no row's seconds"),
    "micro_batch": ("auto", "the steps of its search are counted nowhere"),
}
"""Values that no recipe may have, and why."""


@dataclass(frozen=True)
class SpeedRecipe:
    """Keys of a configuration, as its author wrote them."""

    name: str
    keys: Mapping[str, Any]

    def on(self, track: Track, device: str, data: str | None = None) -> RunConfig:
        """The complete configuration on a track, of seed 0 and without a place.

        Raises ValueError, one line, for keys that are against the rules, or make no configuration.
        """
        given = {"dataset": track.dataset, "device": device, "data": data}
        try:
            complete = config.load(self.keys, SETTLED, given, track.keys)
        except ValueError as error:
            raise ValueError(f"recipe {self.name}: {error}") from None
        stated = config.flat(self.keys)
        for name, why in FORBIDDEN.items():
            if name in stated:
                raise ValueError(f"recipe {self.name}: {name}: {why}")
        values = config.flat(complete.tree())
        for name, (value, why) in UNTIMED.items():
            if values[name] == value:
                raise ValueError(f"recipe {self.name}: {name}: {value!r} is not allowed: {why}")
        return complete


def find_track(name: str) -> Track:
    """The track of that name. Raises ValueError, with the known ones."""
    return look_up("--track", name, TRACKS)


def find_recipe(name: str) -> SpeedRecipe:
    """The recipe of that name in bench/speedruns, or of a path that ends in .yaml.

    Raises ValueError for one that is not there, or whose file holds no keys.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        check_known("recipe", name, known_recipes())
        path = RECIPES / f"{name}.yaml"
    return SpeedRecipe(path.stem, config.read_file(path, "recipe"))


def known_recipes() -> list[str]:
    """Names of the recipes in bench/speedruns."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def device_of(track: Track, name: str | None) -> torch.device:
    """The device of a track's runs. Raises ValueError where it is not there, or of another kind."""
    found = machine.device(name or track.device)
    if found.type != track.device:
        raise ValueError(f"--device: {name} is no device of this track, which runs on {track.device}")
    return found


def tables() -> list[str]:
    """Lines of the tables of rules in bench/README.md."""
    epsilon, threat_model = BALL
    values = {
        "version of the rules": RULES_VERSION,
        "seeds of a record, at least": LEAST_SEEDS,
        "ball of the evaluation": f"{round(255 * epsilon)}/255, {threat_model}",
        "attack that the target is of": f"`{ATTACKED_BY}`, seed {EVALUATION_SEED}",
        "refused where the attack beside it finds more, on the same images": f"{100 * LARGEST_AA_GAP:g} points",
        "settled keys": ", ".join(f"`{name}: {_written(value)}`" for name, value in config.flat(SETTLED).items()),
        "keys that no recipe states": ", ".join(
            f"`{name}`" for name in FORBIDDEN if name not in config.flat(SETTLED)
        ),
        "values that no recipe has": ", ".join(f"`{name}: {value}`" for name, (value, _) in UNTIMED.items()),
    }
    return [
        "| track | device | data set | target | test images | beside it |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{name}` | {track.device} | {track.dataset} | {100 * track.target:g} % | {track.test_images:,} "
            f"| `{track.checked_by}`, {track.checked_images:,} of them |"
            for name, track in TRACKS.items()
        ),
        "",
        "| rule | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in values.items()),
    ]


def _written(value: object) -> str:
    return json.dumps(value).replace('"', "")

"""Seconds of a training step of each row of a protocol, in turn: cells may be trained beside other work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from bench.lib import machine
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import ResultFolder, read_file
from bench.lib.accuracy.protocol import AccuracyProtocol
from bench.lib.steps.engine_step import EngineStep
from bench.lib.timing import SynchronisedClock, no_garbage_collection, rotated
from bench.step import WARM_UP
from engine import config
from engine.common.files import write_json
from engine.config import Tree
from engine.pipelines import datasets
from engine.system import precision

ROUNDS_OF_SIZE = {"full": 9, "quick": 2}
STEPS_OF_A_ROUND = 2
MOST_IMAGES = 1024
"""Training images that the steps take their batches from, at most."""

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StepCosts(BaseModel):
    """Seconds of a step of one row, the mean of each round. keys: of its training. steps: of an epoch."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    keys: dict[str, Any]
    steps: int = Field(ge=1)
    seconds: list[_Seconds] = Field(min_length=1)

    @property
    def epoch_seconds(self) -> float:
        """Seconds of the steps of an epoch, by the median round."""
        return self.steps * statistics.median(self.seconds)

    def relative_to(self, baseline: StepCosts) -> float:
        """The median over the rounds of a step's seconds by the baseline's, times the steps by its."""
        ratios = [own / other for own, other in zip(self.seconds, baseline.seconds, strict=True)]
        return statistics.median(ratios) * self.steps / baseline.steps


class ProtocolCosts(BaseModel):
    """Steps of all rows that took turns on one machine. facts: hardware, versions, date and commit."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    facts: dict[str, Any]
    rows: dict[str, StepCosts]

    def check(self, protocol: AccuracyProtocol, place: str) -> None:
        """Raise ValueError for rows of the protocol that are not there, or have other keys."""
        for row in protocol.rows():
            found = self.rows.get(row)
            if found is None or protocols.completed_keys(found.keys) != _keys(protocol, row):
                raise ValueError(f"{place}: row {row!r} is not there, or of other settings; time the rows anew")


def _keys(protocol: AccuracyProtocol, row: str) -> Tree:
    return protocols.chosen_keys(protocol.config_of(row, protocol.seeds[0]))


def measure(
    protocol: AccuracyProtocol,
    results: ResultFolder,
    device: torch.device,
    rounds: int,
    say: Callable[[str], None],
) -> ProtocolCosts:
    """Time the rows, each by its method after the warm-up, and write the file."""
    if device.type == "cpu":
        torch.set_num_threads(protocol.threads)
    wanted = {row: protocol.config_of(row, protocol.seeds[0]) for row in protocol.rows()}
    settled = {"loss": {"warmup": 0}, "device": str(device)}
    some = next(iter(wanted.values()))
    tests = some.limit_test or MOST_IMAGES
    whole = len(datasets.load(some.dataset, limit_train=some.limit_train, limit_test=tests).train)
    images = datasets.load(some.dataset, limit_train=min(whole, MOST_IMAGES), limit_test=tests).train
    steps = {row: EngineStep(config.load(keys.tree(), settled), images) for row, keys in wanted.items()}
    clock = SynchronisedClock(device)
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    with precision.deterministic(amp=some.amp), no_garbage_collection():
        for step in steps.values():
            for _ in range(WARM_UP[device.type]):
                step()
        for turn in range(rounds):
            for row in rotated(list(steps), turn):
                seconds[row].append(clock.seconds(steps[row], STEPS_OF_A_ROUND))
            say(f"round {turn + 1} of {rounds}")
    found = ProtocolCosts(
        facts=dict(machine.facts(device)),
        rows={
            row: StepCosts(
                keys=_keys(protocol, row),
                steps=math.ceil(whole * (1 - keys.validation) / keys.batch_size),
                seconds=seconds[row],
            )
            for row, keys in wanted.items()
        },
    )
    results.costs.parent.mkdir(parents=True, exist_ok=True)
    write_json(results.costs, found.model_dump())
    return found


def read(protocol: AccuracyProtocol, results: ResultFolder) -> ProtocolCosts | None:
    """Costs that were measured; None where none were. Raises ValueError for a damaged file, and other settings."""
    found = read_file(results.costs, ProtocolCosts)
    if found is not None:
        found.check(protocol, str(results.costs))
    return found

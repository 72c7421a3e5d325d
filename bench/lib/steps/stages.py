"""Stages of a training on photographs, each timed alone by several processes: loading, attack, step, evaluation.

`python -m bench.lib.steps.stages KEYS STEPS ANSWER`, by the engine's launcher: the configuration's KEYS in JSON, a
file for the stages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.lib.memory import Meter
from engine.common.console import Reporter
from engine.config import RunConfig, load
from engine.evaluation.measure import evaluate
from engine.pipelines.base import Batch
from engine.runs import assemble
from engine.system import distributed, launcher, precision
from engine.system.distributed import World


class TimedStage(NamedTuple):
    """images: of all processes. seconds: of the slowest process. peak: MiB of the process that needed most."""

    name: str
    images: int
    seconds: float
    peak: float


def timed(processes: int, keys: Mapping[str, Any], steps: int) -> list[TimedStage]:
    """Stages by so many processes, started together. Raises RuntimeError where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "stages.json"
        command = [sys.executable, "-m", __name__, json.dumps(dict(keys)), str(steps), str(answer)]
        if launcher.launch(processes, command, None, max_restarts=0):
            raise RuntimeError(f"{processes} processes of the benchmark failed")
        return [TimedStage(*stage) for stage in json.loads(answer.read_text())]


def run(world: World, config: RunConfig, steps: int) -> list[TimedStage]:
    """The stages of this process, with all others. steps: batches of the attack and of the training step."""
    place = precision.choose(config, world.local_rank)
    meter = Meter(place.device)

    def stage(name: str, images: int, work: Callable[[], object]) -> TimedStage:
        world.barrier()
        meter.forget()
        begin = time.perf_counter()
        work()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        mine = torch.tensor([time.perf_counter() - begin, meter.peak()], dtype=torch.float64)
        seconds, peak = world.gather(mine).amax(0).tolist()
        return TimedStage(name, images, seconds, peak)

    dataset = assemble.load_data(config, Reporter(), config.pipeline)
    sampling = assemble.build_sampling(config, len(dataset.train), shard=world.shard)
    pipeline = assemble.build_pipeline(config, dataset.train, place, sampling=sampling, flips=dataset.flip)
    batches: list[Batch] = []

    def read() -> None:
        for batch in pipeline.epoch(0):
            if len(batches) < steps:
                batches.append(batch)

    found = [stage("loading", sampling.epoch_size, read)]
    pipeline.close()
    learner = assemble.build_learner(
        config, assemble.build_student(config, dataset, place).train(), {}, place, world=world
    )
    method, adversary = assemble.method_of(config), learner.networks.adversary
    assert adversary is not None, config.method

    def learn(chosen: list[Batch]) -> None:
        for number, batch in enumerate(chosen):
            learner.learn(batch, method, config.lr, global_batch_size=sampling.size_of(number))

    learn(batches[:1])  # not counted: the replicas arrange their buckets, and memory is taken
    images = sum(sampling.size_of(number) for number in range(len(batches)))
    found.append(stage("attack", images, lambda: [adversary(batch, 0) for batch in batches]))
    found.append(stage("training step", images, lambda: learn(batches)))

    def measure() -> None:
        attacks, size = ("natural", config.eval.attack), config.eval.batch_size
        evaluate(learner.evaluated, dataset.test, attacks, batch_size=size, device=place.device, world=world)

    return [*found, stage("evaluation", len(dataset.test), measure)]


def main(keys: str, steps: str, answer: str) -> None:
    """Write the stages; the main process does."""
    config = load(json.loads(keys))
    with distributed.joined(config) as world:
        found = run(world, config, int(steps))
        if world.is_main:
            Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

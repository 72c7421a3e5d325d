"""Steps of one global batch by several processes, which share the cores of this machine.

`python -m bench.lib.steps.several_processes KEYS DATASET STEPS ANSWER`, by torchrun: the configuration's KEYS in
JSON, a file for `Taken`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.lib.steps.engine_step import EngineStep
from bench.lib.steps.variants import images_of
from engine.config import RunConfig, load
from engine.runs import checkpoints
from engine.system import distributed, launcher
from engine.system.distributed import World
from engine.training.learner import Learner

WARMUP = 2
"""Steps that are not counted: the replicas arrange their buckets in the first."""


class Taken(NamedTuple):
    """Seconds of each step, bytes sent in one; seconds that saving stalls the training, and takes."""

    steps: list[float]
    sent: float | None
    stall: float
    writing: float


def timed(processes: int, keys: Mapping[str, Any], dataset: str, steps: int) -> Taken:
    """Measurements of so many processes, started together. Raises RuntimeError where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "taken.json"
        command = [sys.executable, "-m", __name__, json.dumps(dict(keys)), dataset, str(steps), str(answer)]
        if launcher.launch(processes, command, None, max_restarts=0):
            raise RuntimeError(f"{processes} processes of the benchmark failed")
        return Taken(*json.loads(answer.read_text()))


def run(world: World, config: RunConfig, dataset: str, steps: int) -> Taken:
    """Steps of this process, with all others."""
    step = EngineStep(config, images_of(dataset, config.batch_size), world)
    for _ in range(WARMUP):
        step()
    world.barrier()
    before = loopback_bytes()
    seconds = [_seconds(step) for _ in range(steps)]
    world.barrier()
    sent = loopback_bytes() - before
    # The slowest process decides, and all others wait for it.
    slowest = world.gather(torch.tensor(seconds, dtype=torch.float64)).amax(0).tolist()
    stall, writing = _saving(step.learner) if world.is_main else (0.0, 0.0)
    on_wire = None if step.precision.device.type == "cuda" or world.size == 1 else sent / steps
    return Taken(slowest, on_wire, stall, writing)


def _seconds(step: EngineStep) -> float:
    """Seconds of one step, when the device has done it."""
    _wait(step.precision.device)
    begin = time.perf_counter()
    step()
    _wait(step.precision.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _saving(learner: Learner) -> tuple[float, float]:
    """Seconds for which saving holds up the training, and until all is written."""
    with tempfile.TemporaryDirectory() as folder, checkpoints.Saver() as saver:
        content = learner.state_dict() | {"student": learner.student.state_dict()}
        begin = time.perf_counter()
        saver.save((Path(folder) / "last.pt", content))
        stall = time.perf_counter() - begin
        saver.wait()
        return stall, time.perf_counter() - begin


def loopback_bytes() -> int:
    """Bytes that this machine sent to itself since it was started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def main(keys: str, dataset: str, steps: str, answer: str) -> None:
    """Write what the processes took; the main one does."""
    config = load(json.loads(keys))
    with distributed.joined(config) as world:
        taken = run(world, config, dataset, int(steps))
        if world.is_main:
            Path(answer).write_text(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])

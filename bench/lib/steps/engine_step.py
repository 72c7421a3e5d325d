"""Training step of the engine, its parts put together from a configuration as a run's are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from engine.common.lookup import is_on
from engine.config import RunConfig
from engine.models.sync_batch_norm import synchronise
from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.splits import Split
from engine.runs import assemble, format_probe
from engine.system import precision
from engine.system.distributed import World
from engine.training.step import OnDevice, StepOutput


class EngineStep:
    """One update on the next batch of the images, with telemetry; teachers have random weights.

    world: processes that share each batch. Raises ValueError for a configuration that cannot be run.
    """

    def __init__(self, config: RunConfig, images: Split, world: World | None = None) -> None:
        world, config = world or World(), format_probe.resolve(config)
        self._config, self._method = config, assemble.method_of(config)
        self.precision = precision.choose(config, world.local_rank)
        student = assemble.build_student(config, images, self.precision)
        if is_on("sync_bn", config.sync_bn) and world.size > 1:
            student = synchronise(student, self.precision.device)
        teachers = {
            section: assemble.build_student(config.model_copy(update={"seed": seed}), images, self.precision)
            for seed, section in enumerate(assemble.teacher_sections(config), config.seed + 1)
        }
        for teacher in teachers.values():
            teacher.eval().requires_grad_(False)
        height, width, channels = images.images.shape[1:]
        self._telemetry = assemble.build_telemetry(config, (channels, height, width), self.precision, world)
        self.learner = assemble.build_learner(
            config, student.train(), teachers, self.precision, world=world, counts=self._telemetry.attack_counts
        )
        self._sampling = assemble.build_sampling(config, len(images), shard=world.shard)
        pipeline = assemble.build_pipeline(config, images, self.precision, kind="tensor", sampling=self._sampling)
        self._batches = self.learner.batches(epochs_of(pipeline))
        self._done = 0

    def __call__(self) -> None:
        """Train on the next batch; the sums of the telemetry are read as often as in a run."""
        batch, size = next(self._batches), self._sampling.size_of(self._done % self._sampling.steps_per_epoch)
        self._done += 1
        self.learner.learn(
            batch,
            self._method,
            self._config.lr,
            step=self._done,
            global_batch_size=size,
            on_output=OnDevice(self._note),
        )
        if self._done % self._config.log_every == 0:
            self._telemetry.read()

    def _note(self, output: StepOutput, labels: Tensor) -> None:
        self._telemetry.update(output, labels, self.learner.numbers.step)


def epochs_of(pipeline: Pipeline) -> Iterator[Batch]:
    """Batches of one epoch after the other, without end."""
    for epoch in itertools.count():
        yield from pipeline.epoch(epoch)

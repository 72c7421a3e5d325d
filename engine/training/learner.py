"""A student in training: what turns batches into its new weights, and what of it a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from engine.common.lookup import is_on
from engine.config import AttackSpec, RunConfig
from engine.methods import Method
from engine.models.sync_batch_norm import is_synchronised
from engine.pipelines.base import Batch
from engine.system.data_parallel import OneMessage, RunningStatistics, replicate
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import plan, schedule, step_networks
from engine.training.capture.captured_step import CapturedStep
from engine.training.capture.step_numbers import StepNumbers
from engine.training.factors import Factors
from engine.training.micro_batch import MicroBatches
from engine.training.step import OnDevice, OnOutput, TrainingStep
from engine.training.weights import averaging, half_weights, optimizer

_NOTHING = OnDevice(lambda output, labels: None)


class Learner:
    """A student with its teachers, its optimizer, and its replicas in the other processes.

    teachers: by section of the configuration. method: the row that is trained after the warm-up.
    counts: see `Adversary`.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        method: Method,
        config: RunConfig,
        precision: Precision,
        world: World | None = None,
        counts: Tensor | None = None,
    ) -> None:
        world = world or World()
        self.student, self.method = student, method
        is_captured = _is_captured(student, method, config, precision, world)
        message = OneMessage(student, world) if is_captured and world.size > 1 else None
        apart = World() if message is not None else world  # who averages by a message needs no replica
        self.halves = half_weights.build(student, config, precision, apart.size)
        self.optimizer = optimizer.build(student, config, self.halves)
        self.numbers = StepNumbers(self.optimizer, precision.device, schedule.peak(config))
        self.scaler = precision.scaler()
        if self.scaler.is_enabled():
            optimizer.begin_momentum(self.optimizer)
        self.average = averaging.build(student, config)
        self.factors = Factors(config, world, precision.device)
        self.lanes = Lanes(precision.device, wanted=is_on("lanes", config.lanes))
        self.micro_batches = MicroBatches(config, world)
        one_backward = config.micro_batch is None and not config.awp.gamma
        replica = replicate(student, apart, precision.device, every_backward=one_backward)
        self.networks = step_networks.build(
            student, teachers, method, config, precision, counts, replica, self.micro_batches.is_frequent
        )
        if self.halves is not None and self.networks.adversary is not None:
            self.networks.adversary.twin.share(self.halves.of)
        self.step = TrainingStep(
            networks=self.networks,
            student=student,
            halves=self.halves,
            replica=replica,
            statistics=RunningStatistics(student, apart),
            message=message,
            optimizer=self.optimizer,
            scaler=self.scaler,
            method=method,
            factors=self.factors,
            numbers=self.numbers,
            config=config,
            precision=precision,
            lanes=self.lanes,
            world=world,
        )
        self._run = CapturedStep(self.step) if is_captured else self.step

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and kept as the best: the average, once there is one."""
        return self.average.module if self.average is not None and self.average.has_begun else self.student

    @property
    def keeps_factors(self) -> bool:
        """True if factors of the method's terms follow the training, so that a checkpoint keeps them."""
        return bool(plan.followed_factors(self.method))

    def learn(
        self,
        batch: Batch,
        method: Method,
        lr: float,
        *,
        epoch: int = 0,
        step: int = 0,
        global_batch_size: int | None = None,
        on_output: OnOutput = _NOTHING,
    ) -> None:
        """One update. method: the row to train with now, after the warm-up `self.method`.

        batch: this process's part of one of `global_batch_size` images, by default all of it. epoch: counts the
        random starts. step: for `numbers`. on_output: called with the output of each part of the batch, and its
        labels; unless it is an `OnDevice` the step is not captured as a CUDA graph.
        """
        global_batch_size = len(batch.labels) if global_batch_size is None else global_batch_size
        self.numbers.set(lr, epoch, step)
        if self.halves is not None:
            self.halves.follow()
        parts = self.micro_batches.split(batch, global_batch_size)
        self._run(parts, method, epoch=epoch, global_batch_size=global_batch_size, on_output=on_output)
        if self.average is not None:
            self.average.after_step(epoch)

    def release(self) -> None:
        """Let go of captured graphs and their memory; others may be captured later."""
        if isinstance(self._run, CapturedStep):
            self._run.release()
        if self.networks.adversary is not None:
            self.networks.adversary.release()

    def attack_with(self, spec: AttackSpec) -> None:
        """Craft adversarial images with other numbers from now on."""
        if self.networks.adversary is not None:
            self.networks.adversary.use(spec)

    @property
    def seeks_micro_batch(self) -> bool:
        """True if the size of micro-batches is still to be found."""
        return self.micro_batches.is_unknown

    def find_micro_batch(self, batch: Batch, method: Method, *, epoch: int, global_batch_size: int) -> int:
        """The largest micro-batch, by halves, that fits into the memory. Raises RunFailed where none does."""
        self.numbers.set(0.0, epoch, 0)
        return self.micro_batches.find(self.step, batch, method, epoch=epoch, global_batch_size=global_batch_size)

    def batches(self, epoch: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch, the next one under way."""
        return self.lanes.prefetched(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that the training changed but the student itself, for a checkpoint."""
        state = {
            "optimizer": optimizer.state_dict(self.optimizer, self.numbers.rates),
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batches.size,
        }
        if self.keeps_factors:
            state["factors"] = self.factors.state_dict()
        if self.average is not None:
            state["averaged"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.release()  # a graph would go on with the tensors of before
        saved = state["optimizer"]
        groups = self.optimizer.state_dict()["param_groups"]  # as the configuration says, but for the rates
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.numbers.give_rates([group["lr"] for group in saved["param_groups"]])
        if state["scaler"]:  # empty where the run had no float16 before
            self.scaler.load_state_dict(state["scaler"])
        if self.keeps_factors:
            self.factors.load_state_dict(state["factors"])
        self.micro_batches.size = state["micro_batch"]  # what "auto" found holds for the whole run
        if self.average is not None:
            self.average.load_state_dict(state["averaged"])


def _is_captured(
    student: nn.Module, method: Method, config: RunConfig, precision: Precision, world: World
) -> bool:
    """True if a step is captured as a whole: not where processes tell each other something in the midst of it."""
    has_factors = any(weight.factor for phase in method.phases for weight in phase.weights.values())
    talks = world.size > 1 and (is_synchronised(student) or has_factors)
    return step_networks.captures(config, precision.device).step and not talks

"""A student in training: what turns batches into its new weights, and what of it a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from engine.common.lookup import is_on
from engine.config import AttackSpec, RunConfig
from engine.methods import Method
from engine.pipelines.base import Batch
from engine.system.data_parallel import RunningStatistics, replicate
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import averaging, optimizer, plan, step_networks
from engine.training.factors import Factors
from engine.training.micro_batch import MicroBatches
from engine.training.step import OnOutput, TrainingStep


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
        self.optimizer = optimizer.build(student, config)
        self.scaler = precision.scaler()
        if self.scaler.is_enabled():
            optimizer.begin_momentum(self.optimizer)
        self.average = averaging.build(student, config)
        self.factors = Factors(config, world, precision.device)
        self.lanes = Lanes(precision.device, wanted=is_on("lanes", config.lanes))
        self.micro_batches = MicroBatches(config, world)
        one_backward = config.micro_batch is None and not config.awp.gamma
        replica = replicate(student, world, precision.device, every_backward=one_backward)
        self.networks = step_networks.build(
            student, teachers, method, config, precision, counts, replica, self.micro_batches.is_frequent
        )
        self.step = TrainingStep(
            networks=self.networks,
            student=student,
            replica=replica,
            statistics=RunningStatistics(student, world),
            optimizer=self.optimizer,
            scaler=self.scaler,
            method=method,
            factors=self.factors,
            config=config,
            precision=precision,
            lanes=self.lanes,
            world=world,
        )

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
        global_batch_size: int | None = None,
        on_output: OnOutput = lambda output, labels: None,
    ) -> None:
        """One update. method: the row to train with now, after the warm-up `self.method`.

        batch: this process's part of one of `global_batch_size` images, by default all of it. epoch: counts the
        random starts. on_output: called with the output of each part of the batch, and its labels.
        """
        global_batch_size = len(batch.labels) if global_batch_size is None else global_batch_size
        optimizer.set_rate(self.optimizer, lr)
        parts = self.micro_batches.split(batch, global_batch_size)
        self.step(parts, method, epoch=epoch, global_batch_size=global_batch_size, on_output=on_output)
        if self.average is not None:
            self.average.after_step(epoch)

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
        return self.micro_batches.find(self.step, batch, method, epoch=epoch, global_batch_size=global_batch_size)

    def batches(self, epoch: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch, the next one under way."""
        return self.lanes.prefetched(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that the training changed but the student itself, for a checkpoint."""
        state = {
            "optimizer": self.optimizer.state_dict(),
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
        saved, groups = state["optimizer"], self.optimizer.state_dict()["param_groups"]
        for group, before in zip(groups, saved["param_groups"], strict=True):
            group["lr"] = before["lr"]  # all else is as the configuration says
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        if state["scaler"]:  # empty where the run had no float16 before
            self.scaler.load_state_dict(state["scaler"])
        if self.keeps_factors:
            self.factors.load_state_dict(state["factors"])
        self.micro_batches.size = state["micro_batch"]  # what "auto" found holds for the whole run
        if self.average is not None:
            self.average.load_state_dict(state["averaged"])

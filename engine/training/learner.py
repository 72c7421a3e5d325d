"""What turns a batch into new weights: passes, backward, update; in parts where the memory asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine.common.lookup import check_known, is_on
from engine.common.stopping import RunFailed
from engine.config import ForwardsConfig, RunConfig, epochs_of
from engine.methods import Method
from engine.models.layers import running_statistics_stay
from engine.pipelines.base import Batch
from engine.system.distributed import Statistics, World, without_reduction
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import averaging, awp, networks, optimizer
from engine.training.step import StepOutput, TeacherOutputs, attack_and_teach, student_loss, update

OnOutput = Callable[[StepOutput, Tensor], None]
"""Is told the output of each part of a batch, and its labels."""


class Learner:
    """A student with its teachers, its optimizer, and its likes in the other processes.

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
        self.student, self.config, self.precision = student, config, precision
        self.world = world or World()
        self.method = method
        self.optimizer = optimizer.sgd(student.parameters(), config)
        self.scaler = precision.scaler()
        self.average = averaging.build(student, config)
        self.lanes = Lanes(precision.device, wanted=is_on("lanes", config.lanes))
        if isinstance(config.micro_batch, str):
            check_known("micro_batch", config.micro_batch, ("auto",))
        self.micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else None
        self._counts = counts
        in_parts = config.micro_batch is not None or config.awp.gamma > 0
        self._replica = self.world.replicate(student, precision.device, every_backward=not in_parts)
        self._statistics = Statistics(student, self.world)
        self.networks = networks.build(
            student, teachers, method, config, precision, counts, self._replica, self._is_usual
        )

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and kept as the best: the average, once there is one."""
        return self.average.module if self.average is not None and self.average.has_begun else self.student

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
        random starts. on_output: is told the output of each part of the batch, and its labels.
        """
        global_batch_size = len(batch.labels) if global_batch_size is None else global_batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = self._parts(batch, global_batch_size)
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with nullcontext() if last else without_reduction(self._replica):
                given = attack_and_teach(self.networks, part, method, self.lanes, epoch=epoch)
                # Gradients are averaged over processes: a part counts by its images, and not as a process.
                weight = len(part.labels) * self.world.size / global_batch_size
                with self._perturbed(part, given, method, weight, epoch):
                    output = self._loss(part, given, method, self.config.forwards)
                    with (
                        self._statistics.averaged(len(batch.labels) / global_batch_size) if last else nullcontext()
                    ):
                        self._backward(output.loss.loss, weight)
            on_output(output, part.labels)
        update(self.optimizer, self.scaler, self.config.optim.clip_norm)
        if self.average is not None:
            self.average.after_step(epoch)

    @property
    def seeks_micro_batch(self) -> bool:
        """Whether the size of micro-batches is still to be found."""
        return self.config.micro_batch == "auto" and self.micro_batch is None

    def find_micro_batch(self, batch: Batch, method: Method, *, epoch: int, global_batch_size: int) -> int:
        """Halve the micro-batch until a step fits into the memory of every process; the step leaves no trace.

        Raises RunFailed where not even one image fits.
        """
        size = -(-global_batch_size // self.world.size)
        while not self.world.gather(torch.tensor(self._fits(batch, size, method, epoch))).all():
            if size == 1:
                raise RunFailed("the memory does not hold the networks and one image")
            size = -(-size // 2)
        self.micro_batch = size
        return size

    def _fits(self, batch: Batch, size: int, method: Method, epoch: int) -> bool:
        kept = [*self.student.buffers(), *([] if self._counts is None else [self._counts])]
        before = [value.clone() for value in kept]
        part = Batch(batch.x_nat[:size], batch.labels[:size], batch.sample[:size])
        # What an update needs beside: the optimizer's momentum, and the weights as they were before their attack.
        copies = int(not self.optimizer.state) + int(self.config.awp.gamma > 0)
        beside = [torch.empty_like(value) for value in self.student.parameters() for _ in range(copies)]
        on_gpu = self.precision.device.type == "cuda"
        try:
            with without_reduction(self._replica):
                for _ in range(2 if on_gpu else 1):  # the second captures a graph, which has memory of its own
                    given = attack_and_teach(self.networks, part, method, self.lanes, epoch=epoch)
                    self._backward(self._loss(part, given, method, self.config.forwards).loss.loss, 1.0)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
            if self.networks.adversary is not None:
                self.networks.adversary.release()
        del beside
        self.optimizer.zero_grad()
        for value, was in zip(kept, before, strict=True):
            value.copy_(was)
        if on_gpu:
            torch.cuda.empty_cache()
        return fits

    def _parts(self, batch: Batch, global_batch_size: int) -> list[Batch]:
        """As many on every process, since some of the work in a part may be common."""
        count = self._count_parts(global_batch_size)
        split = (tensor.tensor_split(count) for tensor in (batch.x_nat, batch.labels, batch.sample))
        return [Batch(*tensors) for tensors in zip(*split, strict=True)]

    def _count_parts(self, global_batch_size: int) -> int:
        if self.micro_batch is None:
            return 1
        largest = -(-global_batch_size // self.world.size)
        return max(1, -(-largest // self.micro_batch))

    def _is_usual(self, images: int) -> bool:
        """Whether a part of a full batch has so many images: as many on every process, give or take one."""
        if self.seeks_micro_batch:
            return False
        full = self.config.batch_size
        count = self._count_parts(full)
        share = full // self.world.size
        return images in (share // count, -(-share // count))

    def _loss(self, batch: Batch, given: TeacherOutputs, method: Method, forwards: ForwardsConfig) -> StepOutput:
        return student_loss(
            self.networks, batch, given, method, forwards, self.precision, self.lanes,
            in_warmup=method is not self.method,
        )  # fmt: skip

    def _backward(self, loss: Tensor, weight: float) -> None:
        with record_function("backward"):
            self.scaler.scale(loss if weight == 1 else loss * weight).backward()

    @contextmanager
    def _perturbed(
        self, batch: Batch, given: TeacherOutputs, method: Method, weight: float, epoch: int
    ) -> Iterator[None]:
        """The weights' own attack, where it is on; it leaves no trace on the running statistics."""
        gamma = self.config.awp.gamma
        if not gamma or epoch < epochs_of(self.config.awp.start, self.config.epochs):
            yield
            return
        with ExitStack() as perturbed:
            stay = running_statistics_stay(self.student)
            with record_function("weight attack"), without_reduction(self._replica), stay:
                output = self._loss(batch, given, method, ForwardsConfig())
                loss = self.scaler.scale(output.loss.loss * weight)
                perturbed.enter_context(awp.perturbed(self.student, loss, gamma, self.world))
            yield

    def batches(self, epoch: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch, the next one under way."""
        return self.lanes.ahead(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that the training changed but the student itself, for a checkpoint."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batch,
        }
        if self.average is not None:
            state["averaged"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        saved, groups = state["optimizer"], self.optimizer.state_dict()["param_groups"]
        for group in groups:  # all else is as the configuration says
            group["lr"] = saved["param_groups"][0]["lr"]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        if state["scaler"]:  # empty where the run had no float16 before
            self.scaler.load_state_dict(state["scaler"])
        self.micro_batch = state["micro_batch"]  # what "auto" found holds for the whole run
        if self.average is not None:
            self.average.load_state_dict(state["averaged"])

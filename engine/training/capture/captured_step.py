"""The whole training step as one CUDA graph: attack, teachers, student, loss, backward, update and telemetry."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import AttackSpec
from engine.methods import Method
from engine.pipelines.base import Batch, Mixture
from engine.system.graphs import CapturedCall, waits_noted
from engine.training.step import OnDevice, OnOutput, TrainingStep

CAPTURED_AT = 3
"""The batch of a shape in a row at which a step is captured, from 1."""


class _Phase(NamedTuple):
    """All that is fixed in a captured step beside its batch."""

    method: Method
    epoch: int | None  # of a method whose terms grow
    attack: AttackSpec | None
    on_output: OnOutput


class _Shape(NamedTuple):
    images: torch.Size
    num_classes: int | None  # of mixed images
    global_batch_size: int


class CapturedStep:
    """A `TrainingStep` that is captured at the third batch of a shape in a row, and replayed for every such batch.

    The first two are trained on op by op: what compiles, allocates or chooses an algorithm does so in the first;
    and where the host waits for the GPU in the second, as for a loss that looks at its values, or the capture
    fails, the attack alone is captured from then on. Where the memory is too small for a graph, nothing is. Each
    is told in a warning. A batch of another shape, as an odd last one, is trained on op by op. When the method or
    its attack changes, the graph and its memory go, and the step is captured again.

    Several processes have two graphs, between which their one message is sent.
    step: on whole batches, without an attack on the weights.
    """

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._is_possible = self._attack_is_possible = True
        self.release()

    def __call__(
        self, parts: Sequence[Batch], method: Method, *, epoch: int, global_batch_size: int, on_output: OnOutput
    ) -> None:
        """As `TrainingStep`'s. on_output: unless it is an `OnDevice` the attack alone is captured."""
        numbers = {"epoch": epoch, "global_batch_size": global_batch_size}

        def op_by_op(batch: Batch) -> None:
            self._step([batch], method, **numbers, on_output=on_output)

        def differentiate(batch: Batch) -> None:
            self._step.differentiate([batch], method, **numbers, on_output=on_output)

        (batch,) = parts
        whole = self._is_possible and isinstance(on_output, OnDevice)
        if adversary := self._step.networks.adversary:
            adversary.capture = self._attack_is_possible and not whole
        if not whole:
            op_by_op(batch)
            return
        shape = self._count(self._phase_of(method, epoch, on_output), batch, global_batch_size)
        if self._graph is None and self._in_a_row == CAPTURED_AT:
            self._capture(differentiate, batch, shape)
        if self._graph is not None and shape == self._shape:
            self._replay(batch)
        elif self._graph is None and self._in_a_row == CAPTURED_AT - 1:
            self._watch(op_by_op, batch)
        else:
            op_by_op(batch)

    def release(self) -> None:
        """Let go of the graph and its memory; another may be captured later."""
        self._graph: CapturedCall | None = None  # of the gradient and the update, or where a message lies between
        self._update: CapturedCall | None = None  # them of the gradient alone, and this one of the update
        self._shape: _Shape | None = None  # of the graph
        self._phase: _Phase | None = None
        self._last: _Shape | None = None  # of the batch before
        self._in_a_row = 0

    def _phase_of(self, method: Method, epoch: int, on_output: OnOutput) -> _Phase:
        adversary = self._step.networks.adversary
        grows = any(weight.grows for weight in method.weights.values())
        return _Phase(method, epoch if grows else None, adversary.spec if adversary else None, on_output)

    def _count(self, phase: _Phase, batch: Batch, global_batch_size: int) -> _Shape:
        """The shape of the batch, which is counted among those in a row, from 1 after a change of phase."""
        if phase != self._phase:
            self.release()
            self._phase = phase
        num_classes = None if batch.mixture is None else batch.mixture.num_classes
        shape = _Shape(batch.x_nat.shape, num_classes, global_batch_size)
        self._in_a_row = self._in_a_row + 1 if shape == self._last else 1
        self._last = shape
        return shape

    def _capture(self, differentiate: Callable[[Batch], None], batch: Batch, shape: _Shape) -> None:
        def call(*tensors: Tensor) -> None:
            differentiate(_batch(tensors, shape.num_classes))
            if self._step.message is None:
                self._step.update()

        try:
            self._graph, self._shape = CapturedCall(call, *_tensors(batch)), shape
            if self._step.message is not None:
                self._update = CapturedCall(self._step.update)
        except torch.OutOfMemoryError:
            self._give_up()
            self._attack_is_possible = False
            _warn("the memory is too small for the graph of a step, so that nothing is captured")
        except RuntimeError as error:  # of a network or a loss of anybody's: a step op by op it has passed
            self._give_up()
            _warn(
                f"a step cannot be captured ({str(error).splitlines()[0]}), so that the attack alone is captured"
            )

    def _give_up(self) -> None:
        """Let go of what a failed capture has left."""
        self.release()
        self._step.optimizer.zero_grad()
        torch.cuda.empty_cache()
        self._is_possible = False

    def _replay(self, batch: Batch) -> None:
        assert self._graph is not None
        self._graph.replay(*_tensors(batch))
        if self._step.message is not None and self._update is not None:
            self._step.message.send()
            self._update.replay()

    def _watch(self, op_by_op: Callable[[Batch], None], batch: Batch) -> None:
        """Train on a batch, and see whether the host waits for the GPU."""
        with waits_noted() as waits:
            op_by_op(batch)
        if waits:
            self._is_possible = False
            _warn(f"the host waits for the GPU in a step ({waits[0]}), so that the attack alone is captured")


def _warn(text: str) -> None:
    warnings.warn(f"graphs: {text}", stacklevel=4)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    own = (batch.x_nat, batch.labels, batch.sample)
    return own if batch.mixture is None else (*own, batch.mixture.labels, batch.mixture.share)


def _batch(tensors: Sequence[Tensor], num_classes: int | None) -> Batch:
    """The inverse of `_tensors`."""
    mixture = None if num_classes is None else Mixture(tensors[3], tensors[4], num_classes)
    return Batch(tensors[0], tensors[1], tensors[2], mixture)

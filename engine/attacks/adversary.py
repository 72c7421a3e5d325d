"""The attack of the training: x~ against the student as it is now (Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine.attacks.pgd import Attacked, climb, started
from engine.attacks.twin import Forward, Twin
from engine.common.lookup import look_up
from engine.config import AttackSpec
from engine.objectives import ATTACK_LOSSES
from engine.pipelines.base import Batch
from engine.system.graphs import CapturedCall
from engine.system.precision import Precision


class Adversary:
    """Crafts adversarial images on a frozen twin of the student.

    teacher: the robust one, for an attack's loss that runs it. seed: of the random starts. counts: (2,) int64, to
    which the zero and the non-finite entries of all gradients are added. make_forward: makes the twin's pass, e.g.
    a compiled one.
    capture: on a GPU, the twin's refresh and all steps of the attack are captured as one CUDA graph at the second
    batch, and replayed for every batch of its shape; a batch of another shape is attacked op by op.
    """

    def __init__(
        self,
        student: nn.Module,
        spec: AttackSpec,
        precision: Precision,
        *,
        teacher: Forward | None = None,
        seed: int = 0,
        counts: Tensor | None = None,
        make_forward: Callable[[Forward], Forward] = lambda forward: forward,
        capture: bool = False,
    ) -> None:
        self.twin = Twin(student, spec.bn, precision, make_forward)
        self.counts = counts
        self._teacher = teacher
        self.spec, self._seed = spec, seed
        self._reads_t_nat = bool(look_up("attack.loss", spec.loss, ATTACK_LOSSES).reads)
        self._loss_scale = precision.attack_loss_scale
        self.capture = capture
        self._last_shape: torch.Size | None = None
        self._graph: CapturedCall | None = None

    def __call__(self, batch: Batch, counter: int | Tensor, t_nat: Tensor | None = None) -> Tensor:
        """x_adv (B, C, H, W), detached. A captured one is overwritten by the next call.

        counter: of the random start, see `random_start`. t_nat: T(x), (B, C), for an attack's loss that reads it.
        """
        reads = () if t_nat is None or not self._reads_t_nat else (t_nat,)
        with record_function("attack"):
            return self._craft(batch, counter, reads)

    def use(self, spec: AttackSpec) -> None:
        """Attack with other numbers from now on; loss and mode of BatchNorm stay."""
        if spec != self.spec:
            self.release()
            self.spec = spec

    def release(self) -> None:
        """Let go of the captured graph and its memory; another may be captured later."""
        self._graph = self._last_shape = None

    def _craft(self, batch: Batch, counter: int | Tensor, reads: tuple[Tensor, ...]) -> Tensor:
        x_adv = started(batch.x_nat, self.spec, seed=self._seed, counter=counter, sample=batch.sample)
        targets = batch.targets
        if not self.capture:
            self._climb(x_adv, batch.x_nat, targets, *reads)
            return x_adv
        if self._graph is None and self._last_shape == x_adv.shape:
            self._graph = CapturedCall(self._climb, x_adv, batch.x_nat, targets, *reads)
        if self._graph is not None and self._graph.fits(x_adv):
            return self._graph.replay(x_adv, batch.x_nat, targets, *reads)[0]
        self._last_shape = x_adv.shape  # what compiles or chooses an algorithm does so before the capture
        self._climb(x_adv, batch.x_nat, targets, *reads)
        return x_adv

    def _climb(self, x_adv: Tensor, x_nat: Tensor, targets: Tensor, t_nat: Tensor | None = None) -> None:
        self.twin.refresh()
        attacked = Attacked(self.twin, self._teacher, t_nat, self.twin.division)
        climb(attacked, x_adv, x_nat, targets, self.spec, loss_scale=self._loss_scale, counts=self.counts)

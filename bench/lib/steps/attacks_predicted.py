"""Seconds of AutoAttack on GPUs that are not here, by a roofline over the kernels of its steps.

Shape suffix: B images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib import pass_ops, roofline
from bench.lib.pass_ops import Execution
from bench.lib.roofline import Hardware, Op
from bench.lib.steps.attacks_timed import Subject, TimedAttack
from engine.attacks.auto.search import Ball, Start
from engine.attacks.auto.standard import AutoAttack
from engine.attacks.autoattack import NO_ATTACK
from engine.attacks.evaluated import prepared
from engine.evaluation.batches import size_of_batch
from engine.system.precision import Precision

ATTACK_ASSUMPTIONS = (
    "every pass is of a full batch of 250 images: as the package's batches thin out, it is slower than predicted",
    "the package: its passes by torch's ops, each launched by the host; what it computes beside them is left out",
    "the engine: whole steps of its attacks, as nodes of CUDA graphs, in float32 without TF32",
    "kernels and peaks are those of python -m bench.predict; float32 without TF32 reaches 60 % of its peak, too",
)


class PredictedSeconds(NamedTuple):
    """Seconds of the package with convolutions in float32, and in TF32, torch's default; of `aa` and `aa:tf32`."""

    published_s: float
    published_tf32_s: float
    engine_s: float
    engine_tf32_s: float


class StepOps(NamedTuple):
    """Kernels of one step of an attack on a batch, and the forward passes of each image in it."""

    ops: list[Op]
    forward: int


def predicted(
    subject: Subject, published: TimedAttack, engine: TimedAttack, hardware: Hardware
) -> PredictedSeconds:
    """Seconds of the passes that both were counted to run."""
    size = batch_on_gpu(subject)
    images = torch.zeros(size, *subject.x_nat.shape[1:]).contiguous(memory_format=torch.channels_last)
    ieee = hardware.without_tf32()

    forward, both = published_passes(subject.network, images)
    alone = published.forward - published.backward  # forward passes without a backward one

    def of_package(gpu: Hardware) -> float:
        seconds = [roofline.seconds(ops, gpu, launched=True) for ops in (forward, both)]
        return (alone * seconds[0] + published.backward * seconds[1]) / size

    network = prepared(subject.network, Precision(images.device, images.dtype))
    steps = {part: engine_step(network, part, subject.epsilon, images) for part in engine.forward_by_part}

    def of_engine(gpu: Hardware) -> float:
        seconds = 0.0
        for part, count in engine.forward_by_part.items():
            step = steps[part]
            seconds += count / step.forward / size * roofline.seconds(step.ops, gpu, launched=False)
        return seconds

    return PredictedSeconds(of_package(ieee), of_package(hardware), of_engine(ieee), of_engine(hardware))


def batch_on_gpu(subject: Subject) -> int:
    """Images of a pass on a GPU."""
    _, _, height, width = subject.x_nat.shape
    return size_of_batch(None, torch.device("cuda"), height, width)


def published_passes(network: nn.Module, images: Tensor) -> tuple[list[Op], list[Op]]:
    """Kernels of a forward pass, and of one with the gradient of the images."""
    labels_B = torch.zeros(len(images), dtype=torch.int64)

    @torch.no_grad()
    def classify(images: Tensor) -> None:
        network(images)

    def differentiate(images: Tensor) -> None:
        x = images.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(network(x), labels_B), x)

    plain = Execution.plain()
    return pass_ops.ops_of(classify, images, plain), pass_ops.ops_of(differentiate, images, plain)


def engine_step(network: nn.Module, part: str, epsilon: float, images: Tensor) -> StepOps:
    """One step of a part of AutoAttack on a network as of `prepared`; without an attack a forward pass."""
    labels_B = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        num_classes = network(images[:1]).shape[1]
    auto = AutoAttack(network, num_classes, Ball("Linf", epsilon), seed=0, heartbeat=lambda: None)
    on_gpu = Execution.gpu(compiled=False)
    if part == NO_ATTACK:
        return StepOps(pass_ops.ops_of(lambda fake: auto.look(fake, labels_B), images, on_gpu), 1)
    search = auto.search(part)
    state = search.begin(Start(images, labels_B, labels_B, labels_B + 2, labels_B + 1))
    ops = pass_ops.ops_of(lambda _: search.advance(state, last=False), images, on_gpu)
    return StepOps(ops, search.passes(1).forward)

"""Seconds of AutoAttack on GPUs that are not here, by a roofline over the kernels of its steps.

Shape suffix: B images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib import pass_ops, roofline
from bench.lib.pass_ops import FREE, Execution
from bench.lib.roofline import Hardware, Op
from bench.lib.steps.attacks_timed import Counted, Pass, Step, Subject, TimedAttack, calls_on_gpu, run_package
from engine.attacks.auto.search import Ball, Start
from engine.attacks.auto.standard import AutoAttack
from engine.attacks.evaluated import prepared
from engine.system.precision import Precision

ATTACK_ASSUMPTIONS = (
    "the calls are those that were counted here, on as many images",
    "the looks at the hits, on a GPU after every 16 steps, and the check of what was found are left out",
    "the package: its passes by torch's ops, with each as many others as in a short run; the host launches all",
    "the engine: whole steps of its attacks in batches of up to 250 images, as nodes of CUDA graphs",
    "kernels and peaks are those of python -m bench.predict; float32 without TF32 reaches 60 % of its peak, too",
)
_FEW_IMAGES, _SHORTER = 16, 20  # of the short run


class PredictedSeconds(NamedTuple):
    """Seconds of the package with convolutions in float32, and in TF32, torch's default; of `aa` and `aa:tf32`."""

    published_s: float
    published_tf32_s: float
    engine_s: float
    engine_tf32_s: float


class CountedOps(NamedTuple):
    """Ops of AutoAttack on a subject. passes, steps: how often what is called, and its kernels.

    others: ops of the package for each pass that are none of the network's.
    """

    passes: list[tuple[int, list[Op]]]
    steps: list[tuple[int, list[Op]]]
    others: float


def counted_ops(subject: Subject, published: TimedAttack) -> CountedOps:
    """Ops of the calls that the package was counted to make, and of the engine's in batches as on a GPU."""
    network = prepared(subject.network, Precision(torch.device("cpu"), torch.float32))
    passes = [(count, published_pass(subject, call)) for call, count in published.calls.items()]
    steps = [(count, engine_step(network, call, subject)) for call, count in calls_on_gpu(subject).items()]
    return CountedOps(passes, steps, other_ops(subject))


def predicted(ops: CountedOps, hardware: Hardware) -> PredictedSeconds:
    """Seconds of the package and of the engine."""

    def of_package(gpu: Hardware) -> float:
        beside = ops.others * gpu.launch
        return sum(
            count * (roofline.seconds(kernels, gpu, launched=True) + beside) for count, kernels in ops.passes
        )

    def of_engine(gpu: Hardware) -> float:
        return sum(count * roofline.seconds(kernels, gpu, launched=False) for count, kernels in ops.steps)

    ieee = hardware.without_tf32()
    return PredictedSeconds(of_package(ieee), of_package(hardware), of_engine(ieee), of_engine(hardware))


def published_pass(subject: Subject, call: Pass) -> list[Op]:
    """Kernels of a pass of the package."""
    labels_B = torch.zeros(call.images, dtype=torch.int64)

    @torch.no_grad()
    def classify(images: Tensor) -> None:
        subject.network(images)

    def differentiate(images: Tensor) -> None:
        x = images.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(subject.network(x), labels_B), x)

    run: Callable[[Tensor], None] = differentiate if call.has_backward else classify
    return pass_ops.ops_of(run, _images(subject, call.images), Execution.plain())


def engine_step(network: nn.Module, call: Step, subject: Subject) -> list[Op]:
    """Kernels of a step of the engine's, on a network as of `prepared`."""
    images, labels_B = _images(subject, call.slots), torch.zeros(call.slots, dtype=torch.int64)
    with torch.no_grad():
        num_classes = network(images[:1]).shape[1]
    auto = AutoAttack(network, num_classes, Ball("Linf", subject.epsilon), seed=0, heartbeat=lambda: None)
    search = auto.search(call.part)
    state = search.begin(Start(images, labels_B, labels_B, labels_B + 2, labels_B + 1))
    return pass_ops.ops_of(lambda _: search.advance(state, last=False), images, Execution.gpu(compiled=False))


def other_ops(subject: Subject) -> float:
    """Ops of the package for each of its passes that are none of the network's, in a short run on a few images."""
    few = replace(
        subject, x_nat=subject.x_nat[:_FEW_IMAGES], labels_N=subject.labels_N[:_FEW_IMAGES], shorter=_SHORTER
    )
    counted = Counted(few.network).eval()
    with _OpCount() as ops:
        run_package(counted, few, 0, len(few.x_nat))
    of_network = {call: len(published_pass(few, call)) for call in counted.calls}
    of_passes = sum(count * of_network[call] for call, count in counted.calls.items())
    return float(max(ops.count - of_passes, 0)) / counted.calls.total()


class _OpCount(TorchDispatchMode):
    """Counts ops that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func._schema.name in FREE)
        return func(*args, **(kwargs or {}))


def _images(subject: Subject, count: int) -> Tensor:
    return torch.zeros(count, *subject.x_nat.shape[1:]).contiguous(memory_format=torch.channels_last)

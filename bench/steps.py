"""Training steps to be timed: each method's, as a textbook writes it and as the engine runs it.

`python -m bench.steps VARIANT METHOD MODEL BATCH_SIZE DEVICE` prints the peak memory of one in MiB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import memory, reference
from engine import config, hostmemory, methods, models, precision
from engine.attack import started
from engine.config import RunConfig
from engine.learner import Learner
from engine.pipelines import datasets
from engine.pipelines.base import Batch
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.pipelines.tensor import TensorPipeline
from engine.precision import Precision

TEXTBOOK = "textbook"
RANDOM = "random"
BATCHES = 4


@dataclass(frozen=True)
class Variant:
    """One way to run a step. keys: of the configuration. description: what differs from the one before it."""

    description: str
    keys: dict[str, Any] = field(default_factory=dict)
    textbook: bool = False
    keeps_memory: bool = True  # as `engine train` does

    def settle(self) -> None:
        """Make the C library treat freed memory as it does in a process of this variant."""
        hostmemory.keep_freed() if self.keeps_memory else hostmemory.give_back_freed()


_PLAIN = {"compile": "off", "lanes": "off", "graphs": "off"}
_AMP = _PLAIN | {"amp": True}
_PUBLISHED = {"semantics": "official"}
VARIANTS = {
    TEXTBOOK: Variant("plain torch, float32, NCHW, the published forwards", _PUBLISHED, True, False),
    "textbook-paper": Variant("the same without the published code's idle forwards", {}, True, False),
    "fp32": Variant("the engine, float32", _PLAIN),
    "amp": Variant("passes in half precision", _AMP),
    "amp-malloc": Variant("amp, freed memory given back as glibc does by itself", _AMP, False, False),
    "amp-recompute": Variant("amp, blocks' activations computed again", _AMP | {"checkpoint_activations": True}),
    "amp-eval": Variant(
        "amp, BatchNorm folded in the attack (--attack-bn eval)", _AMP | {"attack": {"bn": "eval"}}
    ),
    "amp-compile": Variant("amp, passes compiled", _AMP | {"compile": "on"}),
    "amp-lanes": Variant("amp, teachers and next batch on lanes of their own", _AMP | {"lanes": "on"}),
    "amp-graph": Variant("amp, lanes, the attack captured", _AMP | {"lanes": "on", "graphs": "on"}),
    "all": Variant("amp, lanes, graph, compiled", {"amp": True, "compile": "on"}),
}
ON_CPU = (TEXTBOOK, "textbook-paper", "fp32", "amp-malloc", "amp", "amp-eval")
ON_CUDA = (TEXTBOOK, "fp32", "amp", "amp-eval", "amp-lanes", "amp-graph", "amp-compile", "all")


@dataclass(frozen=True)
class Workload:
    """What is trained on what."""

    method: str
    model: str
    batch_size: int
    images: Split
    device: torch.device

    def config(self, variant: Variant) -> RunConfig:
        """Of the run that the variant is a step of, after the warm-up."""
        given = {"method": self.method, "model": self.model, "batch_size": self.batch_size, "loss": {"warmup": 0}}
        return config.load(given, variant.keys, {"device": str(self.device)})

    def step(self, variant: Variant) -> Callable[[], object]:
        """A step of training on the next batch, parameters updated."""
        run = self.config(variant)
        chosen = precision.choose(run)
        method = methods.get(run.method, semantics=run.semantics, loss=run.loss)
        student, teacher, standard = _networks(run.model, len(self.images.class_names))
        if variant.textbook:
            placed = (network.to(self.device) for network in (student, teacher, standard))
            return self._textbook(run, *placed)
        student = chosen.place(student)
        needed = {"teacher": method.needs_teacher, "teacher_st": method.needs_teacher_st}
        given = {"teacher": teacher, "teacher_st": standard}
        teachers = {name: chosen.place(given[name]) for name, wanted in needed.items() if wanted}
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        learner = Learner(student, teachers, method, run, chosen, counts=counts)
        batches = learner.batches(self._batches(chosen))

        def step() -> None:
            batch = next(batches)
            whole = len(batch.labels)
            learner.learn(batch, method, run.lr, epoch=0, whole=whole, seen=lambda output, labels: None)

        return step

    def _textbook(
        self, run: RunConfig, student: nn.Module, teacher: nn.Module, standard: nn.Module
    ) -> Callable[[], object]:
        spec = run.attack
        setting = reference.Setting(run.method, run.semantics, spec.bn, spec.num_steps)
        sgd = torch.optim.SGD(student.parameters(), lr=run.lr, momentum=0.9, weight_decay=2e-4)
        step = reference.Step(setting, student, teacher, standard, sgd)
        batches = self._batches(Precision(self.device, torch.float32))

        def textbook() -> None:
            batch = next(batches)
            start = started(batch.x_nat, spec, sample=batch.sample)
            step(batch.x_nat.contiguous(), batch.labels, start.contiguous())

        return textbook

    def _batches(self, chosen: Precision) -> Iterator[Batch]:
        sampling = Sampling(len(self.images), self.batch_size)
        pipeline = TensorPipeline(self.images, sampling, augment=True, flip=True, device=chosen.device)
        epoch = 0
        while True:
            yield from pipeline.epoch(epoch)
            epoch += 1


def _networks(model: str, num_classes: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student, robust and standard teacher; the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher, standard = (models.build(model, num_classes) for _ in range(3))
    for network in (teacher, standard):
        network.eval().requires_grad_(False)
    return student, teacher, standard


def images_of(dataset: str, batch_size: int) -> Split:
    """A few batches of training images, or of random pixels. Raises ValueError where the data set is not found."""
    count = BATCHES * batch_size
    if dataset != RANDOM:
        return datasets.load(dataset, limit_train=count).train
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.randint(10, (count,), generator=generator), tuple(map(str, range(10))))


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products that are run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_mebibytes(workload: Workload, variant: Variant) -> float:
    """Peak memory of two steps and the networks: what the process grows by, or what a GPU's allocator held."""
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports torch's compiler: 150 MiB, which are no variant's
    variant.settle()
    memory.forget_peak()
    before = memory.mebibytes("VmRSS")
    step = workload.step(variant)
    for _ in range(2):
        step()
    if workload.device.type == "cuda":
        return torch.cuda.max_memory_allocated(workload.device) / 2**20
    return memory.mebibytes("VmHWM") - before


def main(variant: str, method: str, model: str, batch_size: str, device: str) -> None:
    """Print the peak memory of a variant, on random pixels."""
    size = int(batch_size)
    workload = Workload(method, model, size, images_of(RANDOM, size), torch.device(device))
    print(f"{peak_mebibytes(workload, VARIANTS[variant]):.1f}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Training steps to be timed: each method's, as a textbook and an expert write it and as the engine runs it.

`python -m bench.lib.steps.variants VARIANT METHOD MODEL BATCH_SIZE DEVICE` prints its
`memory.Peaks` in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.lib import memory
from bench.lib.steps import expert, textbook
from bench.lib.steps.engine_step import EngineStep, epochs_of
from bench.lib.steps.plain import PlainStep
from engine import config, models
from engine.attacks.pgd import started
from engine.common import host_memory
from engine.common.lookup import is_on
from engine.config import RunConfig
from engine.pipelines import datasets
from engine.pipelines.splits import Split
from engine.runs import assemble, format_probe
from engine.system import precision
from engine.training.capture.captured_step import CAPTURED_AT

TEXTBOOK = "textbook"
RANDOM = "random"
BATCHES = 4


class By(Enum):
    """Author of a step's code."""

    ENGINE = "engine"
    TEXTBOOK = "textbook"
    PLAIN = "plain"
    EXPERT = "expert"


@dataclass(frozen=True)
class Variant:
    """One way to run a step. keys: of the configuration. description: what differs from the one before it."""

    description: str
    keys: dict[str, Any] = field(default_factory=dict)
    by: By = By.ENGINE
    keeps_memory: bool = True  # as `engine train` does
    captured: bool = False  # the expert's networks are replayed from CUDA graphs

    def settle(self) -> None:
        """Make the C library treat freed memory as it does in a process of this variant."""
        host_memory.keep_freed_memory() if self.keeps_memory else host_memory.return_freed_memory()

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Memory and cuDNN as in a process of this variant: the trainer's determinism is the engine's alone."""
        self.settle()
        with _DETERMINISM[self.by](bool(self.keys.get("amp"))):
            yield


@contextmanager
def _cudnn_times_its_algorithms(amp: bool) -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_DETERMINISM: dict[By, Callable[[bool], AbstractContextManager[object]]] = {
    By.ENGINE: lambda amp: precision.deterministic(amp=amp),
    By.TEXTBOOK: lambda amp: nullcontext(),
    By.PLAIN: lambda amp: nullcontext(),
    By.EXPERT: _cudnn_times_its_algorithms,
}
_WRITTEN_BY = {By.TEXTBOOK: textbook.TextbookStep, By.PLAIN: PlainStep}
_PLAIN = {"compile": "off", "lanes": "off", "graphs": "off"}
_AMP = _PLAIN | {"amp": True}
_COMPILED = _PLAIN | {"compile": "on"}
_PUBLISHED = {"semantics": "official"}
VARIANTS = {
    TEXTBOOK: Variant("plain torch, float32, NCHW, the published forwards", _PUBLISHED, By.TEXTBOOK, False),
    "textbook-paper": Variant("the same without the published code's idle forwards", {}, By.TEXTBOOK, False),
    "plain": Variant("the textbook's, with backward() in the attack", _PUBLISHED, By.PLAIN, False),
    "expert": Variant(
        "plain torch: compiled, channels-last, autocast, frozen in the attack",
        _COMPILED | {"amp": True},
        By.EXPERT,
        False,
    ),
    "expert-fp32": Variant("the same in float32", _COMPILED, By.EXPERT, False),
    "expert-graph": Variant(
        "the same with autocast, and CUDA graphs", _COMPILED | {"amp": True}, By.EXPERT, False, True
    ),
    "engine": Variant("as `engine train` runs it by default"),
    "engine-amp": Variant("as `engine train --amp` runs it", {"amp": True}),
    "fp32": Variant("the engine, float32", _PLAIN),
    "fp32-direct": Variant("the same without Winograd's algorithm", _PLAIN | {"winograd": "off"}),
    "fp32-compile": Variant("the engine, float32, passes compiled", _COMPILED),
    "amp": Variant("passes in half precision", _AMP),
    "amp-malloc": Variant("amp, freed memory given back as glibc does by itself", _AMP, By.ENGINE, False),
    "amp-recompute": Variant("amp, blocks' activations computed again", _AMP | {"checkpoint_activations": True}),
    "amp-eval": Variant(
        "amp, BatchNorm folded in the attack (--attack-bn eval)", _AMP | {"attack": {"bn": "eval"}}
    ),
    "amp-compile": Variant("amp, passes compiled", _AMP | {"compile": "on"}),
    "amp-lanes": Variant("amp, teachers and next batch on lanes of their own", _AMP | {"lanes": "on"}),
    "amp-graph": Variant("amp, lanes, the attack captured", _AMP | {"lanes": "on", "graphs": "attack"}),
    "amp-graph-step": Variant("amp, lanes, the whole step captured", _AMP | {"lanes": "on", "graphs": "step"}),
    "all": Variant("amp, lanes, the step captured, compiled", {"amp": True, "compile": "on"}),
}
ON_CPU = (TEXTBOOK, "expert-fp32", "expert", "fp32", "fp32-direct", "amp", "amp-compile")
ON_CUDA = (
    TEXTBOOK, "expert-fp32", "expert", "expert-graph", "fp32", "fp32-compile",
    "amp", "amp-eval", "amp-compile", "amp-lanes", "amp-graph", "amp-graph-step", "all",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Method, model and images of a step that is timed."""

    method: str
    model: str
    batch_size: int
    images: Split
    device: torch.device

    def config(self, variant: Variant) -> RunConfig:
        """Configuration of the run that the variant is a step of, after the warm-up, its format decided.

        As `engine train` decides it: with freed memory kept.
        """
        given = {"method": self.method, "model": self.model, "batch_size": self.batch_size, "loss": {"warmup": 0}}
        host_memory.keep_freed_memory()
        try:
            return format_probe.resolve(config.load(given, variant.keys, {"device": str(self.device)}))
        finally:
            variant.settle()

    def step(self, variant: Variant) -> Callable[[], object]:
        """A step of training on the next batch, parameters updated."""
        run = self.config(variant)
        if is_on("compile", run.compile, auto=False):
            _compile_all()
        return EngineStep(run, self.images) if variant.by is By.ENGINE else self._baseline(variant, run)

    def _baseline(self, variant: Variant, run: RunConfig) -> Callable[[], object]:
        networks = random_networks(run.model, len(self.images.class_names))
        for network in networks:
            textbook.plain(network).to(self.device)
        chosen, spec = precision.choose(run), run.attack
        setting = textbook.StepSetting(run.method, run.semantics, spec.bn, spec.num_steps)
        if variant.by is By.EXPERT:
            scaler = chosen.scaler()
            compiler = {"mode": "reduce-overhead" if variant.captured else "default"}
            passes = (expert.AutocastNetwork(network, chosen.autocast, compiler) for network in networks)
            student, teacher, standard = passes
            sgd, layout = expert.sgd(student, run.lr), torch.channels_last
            step: textbook.TextbookStep = expert.ExpertStep(
                setting, student, teacher, standard, sgd, variant.captured, scaler
            )
        else:
            sgd = torch.optim.SGD(networks[0].parameters(), lr=run.lr, momentum=0.9, weight_decay=2e-4)
            layout = torch.contiguous_format
            step = _WRITTEN_BY[variant.by](setting, *networks, sgd)
        batches = epochs_of(assemble.build_pipeline(run, self.images, chosen, kind="tensor"))

        def baseline() -> None:
            batch = next(batches)
            start = started(batch.x_nat, spec, sample=batch.sample)
            step(
                batch.x_nat.contiguous(memory_format=layout), batch.labels, start.contiguous(memory_format=layout)
            )

        return baseline


def random_networks(model: str, num_classes: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student, robust and standard teacher: the same ones each time."""
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
    """Counts the floating-point operations of convolutions and matrix products that are run inside.

    The engine's ops are torch's meanwhile, whose operations are known.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._by_torch = mock.patch.dict(os.environ, {"ENGINE_KERNELS": "reference"})

    def __enter__(self) -> Flops:
        self._by_torch.start()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._by_torch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _compile_all() -> None:
    """Several methods and variants have the compiler's code in common; it must not give up after a few of them."""
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def peak_mebibytes(workload: Workload, variant: Variant) -> float:
    """Peak memory of the steps until all is captured, and of the networks.

    On a CPU what the process grows by, on a GPU what its allocator gave out at most.
    """
    memory.import_compiler()
    with variant.conditions():
        metered = memory.Meter(workload.device)
        step = workload.step(variant)
        for _ in range(CAPTURED_AT):
            step()
        return metered.peak()


def main(variant: str, method: str, model: str, batch_size: str, device: str) -> None:
    """Print the peaks of a variant, on random pixels."""
    smi, size = memory.Smi(), int(batch_size)
    workload = Workload(method, model, size, images_of(RANDOM, size), torch.device(device))
    allocated = peak_mebibytes(workload, VARIANTS[variant])
    peaks = memory.Peaks(allocated, memory.reserved(workload.device), smi.mebibytes(workload.device))
    print(json.dumps(asdict(peaks)))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The networks of a step, each in the form in which it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine import objectives
from engine.attacks.adversary import Adversary
from engine.attacks.pgd import bn_mode
from engine.attacks.twin import Forward, Twin
from engine.common.lookup import is_on, look_up
from engine.config import RunConfig
from engine.kernels import philox
from engine.methods import Method
from engine.models.layers import recompute
from engine.models.sync_batch_norm import is_synchronised
from engine.system import layout
from engine.system.distributed import World
from engine.system.precision import Precision

MOST_COMPILATIONS = 64


class Networks(NamedTuple):
    """Networks that a step runs: the student's training pass, in train mode, and others where they are needed.

    teachers: by section of the configuration.
    """

    student: Forward
    adversary: Adversary | None
    teachers: Mapping[str, Twin]


def build(
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    method: Method,
    config: RunConfig,
    precision: Precision,
    counts: Tensor | None = None,
    trained: nn.Module | None = None,
    is_frequent: Callable[[int], bool] = lambda images: True,
) -> Networks:
    """The student's training pass, its adversary and its teachers' twins, as the configuration wants them run.

    teachers: by section of the configuration, "teacher" and "teacher_st". counts: see `Adversary`.
    trained: the student as its training pass has to be called, see `data_parallel.replicate`.
    is_frequent: see `forward_maker`.
    """
    make_forward = forward_maker(config, precision.device, is_frequent)
    twins = {
        section: Twin(teacher, "eval", precision, make_forward, follows=False)
        for section, teacher in teachers.items()
    }
    adversary = None
    # What processes tell each other within the attack is not captured.
    talks = bn_mode(config.attack.bn).by_batch and is_synchronised(student)
    if method.needs_x_adv:
        adversary = Adversary(
            student,
            config.attack,
            precision,
            seed=config.seed,
            teacher=twins.get(objectives.LOGITS[objectives.TRUST].network),
            counts=counts,
            make_forward=make_forward,
            capture=captures(config, precision.device).attack and not talks,
        )
    if config.checkpoint_activations:
        recompute(student)
    if layout.is_debug():
        frozen = [*twins.values(), *([adversary.twin] if adversary is not None else [])]
        for network in (student, *(twin.module for twin in frozen)):
            layout.check_channels_last(network)
    forward = _in_range(make_forward(trained or student))
    return Networks(forward, adversary, twins)


class Captures(NamedTuple):
    """The parts of a step that are captured as a CUDA graph."""

    step: bool
    attack: bool


_CAPTURES = {"step": Captures(True, True), "attack": Captures(False, True), "off": Captures(False, False)}


def captures(config: RunConfig, device: torch.device) -> Captures:
    """The parts of a run's steps that are captured: on a GPU, where `graphs` wants it.

    The step is not in parts (`micro_batch`), nor with an attack on the weights, nor with apex, which keeps its
    learning rate on the host.
    """
    wanted = look_up("graphs", config.graphs, _CAPTURES)
    if device.type != "cuda":
        return Captures(False, False)
    is_plain = config.micro_batch is None and not config.awp.gamma and config.optim.implementation != "apex"
    return wanted._replace(step=wanted.step and is_plain)


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Seed torch's global generators, from which layers such as dropout draw, for a step of this process.

    So a run that goes on draws what it would have drawn.
    """
    sample = torch.tensor([step * world.size + world.rank])
    high, low = philox.random_words(seed, philox.Stream.DROPOUT, 0, sample, 2)[0].tolist()
    torch.manual_seed(high << 32 | low)


def _in_range(network: Forward) -> Forward:
    """The same pass, as the profiler's range of a network."""

    def forward(images: Tensor) -> Tensor:
        with record_function("network"):
            return network(images)

    return forward


def forward_maker(
    config: RunConfig, device: torch.device, is_frequent: Callable[[int], bool]
) -> Callable[[Forward], Forward]:
    """Make the function that makes a pass of a module, or of its method: as it is, or compiled.

    is_frequent: True if a pass over so many images comes often, and is worth a compilation.
    "auto" compiles on a GPU, unmeasured. On a CPU it takes minutes and gains 1 %: see docs/performance.md.
    """
    automatic = device.type == "cuda" and not config.checkpoint_activations
    if is_on("compile", config.compile, auto=automatic):
        # Passes of one class count together, and one too many would run op by op with nothing but a warning.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
        return lambda forward: _Compiled(forward, is_frequent)
    return lambda forward: forward


class _Compiled:
    """A pass that is compiled for frequent numbers of images, and run op by op for others."""

    def __init__(self, forward: Forward, is_frequent: Callable[[int], bool]) -> None:
        self._forward, self._is_frequent = forward, is_frequent
        self._compiled = torch.compile(forward, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        forward = self._compiled if self._is_frequent(len(images)) else self._forward
        logits: Tensor = forward(images)
        return logits

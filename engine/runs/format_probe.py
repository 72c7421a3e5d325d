"""Format of the passes where the configuration leaves it open: on a CPU the faster one, as timed.

What is timed is what a step runs: passes of the attack, of the training and of the teachers, each as often as in a
step, in bfloat16 and in float32, over a few images. The result is kept in the cache folder: the next run on this
machine does not measure again.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import methods, models
from engine.attacks.twin import Twin
from engine.common.files import cache_dir, code_hash, regular_file, write_json
from engine.config import RunConfig
from engine.pipelines.datasets import DATASETS
from engine.system import precision
from engine.system.precision import Precision
from engine.training import plan
from engine.training.speed import forward_flops

# Least gain of bfloat16 over float32 on a CPU: an equal speed does not justify its rounding.
MIN_GAIN = 1.1
# No round begins after so many seconds.
_SECONDS = 2.0
# Images of a pass: so many at most, and no more than a forward pass of so many operations takes.
_MOST_IMAGES, _OPERATIONS = 32, 8e9
_MOST_BYTES = 2**16
# Variables of the environment that change how torch computes on a CPU.
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ENGINE_KERNELS")


class _Pass(NamedTuple):
    """A pass of a network, and how many of it a step has."""

    call: Callable[[], object]
    number: int


def resolve_amp(
    config: RunConfig, local_rank: int = 0, say: Callable[[str], None] = lambda line: None
) -> RunConfig:
    """The configuration with the format of its passes decided where `amp_dtype` is "auto".

    On a CPU the faster of bfloat16 and float32. A run decides once, and keeps its decision in config.yaml.
    say: called with a line about the timing.
    """
    if not config.amp or config.amp_dtype != "auto":
        return config
    place = precision.device(config.device, local_rank)
    if place.type != "cpu":
        return config.model_copy(update={"amp_dtype": precision.format_of(place)})
    gain = bfloat16_gain(config)
    say(f"--amp: {describe_gain(gain)}")
    return config.model_copy(update={"amp_dtype": faster(gain)})


def faster(gain: float) -> str:
    """Name of the format that a CPU with such a gain of bfloat16 takes."""
    return "bfloat16" if gain >= MIN_GAIN else "float32"


def describe_gain(gain: float) -> str:
    """The value of `bfloat16_gain`, and what follows from it."""
    return f"bfloat16 is {gain:.2f}x of float32 on this processor: {faster(gain)} is used"


def bfloat16_gain(config: RunConfig) -> float:
    """Seconds of a step's passes in float32 / those in bfloat16, on this processor: measured once on a machine.

    0, so that float32 is used, where the network cannot be run: what is wrong is told when it is trained.
    """
    key = _key(config)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "formats" / f"{digest[:16]}.json"
    if (kept := _kept(path, key)) is not None:
        return kept
    try:
        seconds = measure(config)
    except Exception:  # a network that is not of this package may fail in any way
        return 0.0
    gain = seconds["float32"] / seconds["bfloat16"]
    with contextlib.suppress(OSError):  # without a cache it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "gain": gain})
    return gain


def _kept(path: Path, key: dict[str, Any]) -> float | None:
    """The gain in a file of the cache; None where there is none, or the file is damaged."""
    try:
        found = json.loads(regular_file(path, _MOST_BYTES).read_bytes())
        gain = float(found["gain"])
        return gain if found["key"] == key and 0 < gain < math.inf else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _key(config: RunConfig) -> dict[str, Any]:
    """Whatever changes the result, as JSON has it."""
    return {
        "processor": _processor(),
        "torch": torch.__version__,
        "engine": code_hash(),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
        "threads": torch.get_num_threads(),
        "model": config.model,
        "image": list(_image(config)),
        "batch": _batch(config),
        "bn": config.attack.bn,
        "passes": list(_passes(config)),
    }


def _processor() -> list[str]:
    """Model and flags of the processor, as Linux tells them; empty elsewhere."""
    wanted: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "model", "stepping", "CPU part", "flags", "Features"):
                wanted.setdefault(name.strip(), value.strip())
    return [f"{name}: {value}" for name, value in wanted.items()]


def _image(config: RunConfig) -> tuple[int, int]:
    """Height and width of the run's images as far as they are known before the data are read."""
    known = config.image_size or DATASETS[config.dataset].image_size
    side = known or min(models.get(config.model).input_sizes)
    return side, side


def _batch(config: RunConfig) -> int:
    """Images that a process runs at a time, as far as that is known before the run."""
    return config.micro_batch if isinstance(config.micro_batch, int) else config.batch_size


def _passes(config: RunConfig) -> plan.Passes:
    method = methods.get(config.method, semantics=config.semantics, loss=config.loss)
    return plan.passes(method, config.attack, config.forwards)


def measure(config: RunConfig) -> dict[str, float]:
    """Seconds of the passes of a step over a few images, by format.

    Of each pass the least of the rounds, in which formats take turns, without the first one if there are others.
    One thread over its share of a batch, timed by its own clock, so that other work of the machine does not count.
    """
    with torch.random.fork_rng(devices=[]), one_thread() as threads:
        network = copy.deepcopy(models.build(config.model, DATASETS[config.dataset].num_classes or 10))
        shape = (3, *_image(config))
        fits = _OPERATIONS / max(forward_flops(network, shape)[0], 1.0)
        images = max(1, min(_MOST_IMAGES, _batch(config) // threads, int(fits)))
        steps = {
            name: _step(network, torch.rand(images, *shape), config, precision.AMP_DTYPES[name])
            for name in ("float32", "bfloat16")
        }
        return _least(steps)


def _least(steps: dict[str, list[_Pass]]) -> dict[str, float]:
    rounds: list[dict[str, list[float]]] = []
    end = time.monotonic() + _SECONDS
    while not rounds or time.monotonic() < end:
        rounds.append({name: [_seconds(one.call) for one in step] for name, step in steps.items()})
    counted = rounds[1:] or rounds
    return {
        name: sum(one.number * min(taken[name][index] for taken in counted) for index, one in enumerate(step))
        for name, step in steps.items()
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _step(network: nn.Module, images: Tensor, config: RunConfig, amp_dtype: torch.dtype | None) -> list[_Pass]:
    """The kinds of passes that a step has, each over the images, as the engine runs them."""
    at = Precision(torch.device("cpu"), torch.float32, amp_dtype)
    student = at.place(network)
    images = images.contiguous(memory_format=torch.channels_last)
    attacked, teacher = Twin(student, config.attack.bn, at), Twin(student, "eval", at)

    def attack() -> None:
        x_adv = images.clone().requires_grad_()
        torch.autograd.grad(attacked(x_adv).sum(), x_adv)

    def train() -> None:
        with at.autocast():
            logits = student(images)
        torch.autograd.grad(logits.float().sum(), list(student.parameters()), allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            teacher(images)

    passes = zip((attack, train, forward), _passes(config), strict=True)
    return [_Pass(call, count) for call, count in passes if count]


@contextmanager
def one_thread() -> Iterator[int]:
    """Compute with one thread inside; gives the number of threads outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
